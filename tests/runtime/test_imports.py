import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ldm_runtime

PACKAGE = Path(ldm_runtime.__file__).parent
HEAVY = {"torch", "transformers", "onnx", "diffusers", "onnxscript", "onnx_ir", "safetensors"}


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )


def test_importing_the_runtime_and_drawing_a_picture_load_nothing_heavy(tiny_bundle):
    code = (
        "import sys; from ldm_runtime import Generator\n"
        "with Generator(sys.argv[1]) as generator: generator(prompt='a red circle')\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )

    modules = set(python("-c", code, str(tiny_bundle)).stdout.split())

    assert "onnxruntime" in modules
    assert HEAVY.isdisjoint(modules)
    assert "ldm_export" not in modules


def test_importing_the_runtime_loads_no_engine():
    modules = python("-c", "import sys, ldm_runtime; print(*sys.modules)").stdout.split()

    assert "onnxruntime" not in modules
    assert "importlib.metadata" not in modules  # slow, and only the version needs it


@pytest.mark.quiet
def test_importing_the_runtime_takes_at_most_150_ms_beyond_numpy(tmp_path):
    code = "import numpy, ldm_runtime"
    # As an installed package has it, whatever the environment says: compiled once.
    bytecode = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    python("-c", code, **bytecode)
    seconds = {"numpy": [], "ldm_runtime": []}
    for _ in range(5):
        report = python("-X", "importtime", "-c", code, **bytecode).stderr
        for name, measured in seconds.items():
            (cumulative,) = re.findall(rf"\| +(\d+) \| {name}$", report, re.MULTILINE)
            measured.append(int(cumulative) / 1e6)

    # Anything beyond the least is the machine's other work; NumPy says how fast the machine is.
    least = {name: min(measured) for name, measured in seconds.items()}
    assert least["ldm_runtime"] <= max(0.150, 3 * least["numpy"]), least


def test_everything_promised_is_there():
    assert all(hasattr(ldm_runtime, name) for name in ldm_runtime.__all__)
    assert re.match(r"\d+", ldm_runtime.__version__)
    with pytest.raises(AttributeError, match="no attribute 'generate'"):
        ldm_runtime.generate  # noqa: B018
