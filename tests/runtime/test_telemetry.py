"""ONNX Runtime's telemetry is off: nothing is left in the home folder, and no socket is opened."""

import os
import signal

import pytest

from ldm_runtime.backends.onnxruntime.library import TELEMETRY_VARIABLE, onnxruntime
from tests.runtime.sockets import can_forbid_sockets, run_without_sockets

HAS_TELEMETRY = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 29)

GENERATE = """
import sys
from ldm_runtime import Generator
with Generator(sys.argv[1]) as generator: generator("a red circle", num_inference_steps=2)
"""
DOCTOR = (
    "import sys; from ldm_runtime.cli import main; sys.argv = ['ldm', 'doctor']; sys.exit(main())"
)

pytestmark = pytest.mark.skipif(not can_forbid_sockets(), reason="needs Linux to forbid sockets")


def run(code, home, *arguments, **environment):
    home.mkdir()
    names = ("PATH", "PYTHONPATH", "LDM_BACKEND")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    done = run_without_sockets(
        code, *map(str, arguments), environment={**kept, "HOME": str(home), **environment}
    )
    return done, sorted(path.name for path in home.rglob("*") if path.is_file())


def test_a_process_that_opens_a_socket_is_killed(tmp_path):
    done, _ = run("import socket; socket.socket()", tmp_path / "home")

    assert done.returncode == -signal.SIGSYS


@pytest.mark.parametrize("code", [GENERATE, DOCTOR])
def test_an_empty_home_stays_empty_and_no_socket_is_opened(tiny_bundle, tmp_path, code):
    done, files = run(code, tmp_path / "home", tiny_bundle)

    assert done.returncode == 0, done.stderr
    assert files == []


@pytest.mark.skipif(not HAS_TELEMETRY, reason="this ONNX Runtime has no telemetry")
def test_who_asks_for_telemetry_gets_it(tiny_bundle, tmp_path):
    done, files = run(GENERATE, tmp_path / "home", tiny_bundle, **{TELEMETRY_VARIABLE: "0"})

    assert done.returncode == -signal.SIGSYS or "deviceid" in files
