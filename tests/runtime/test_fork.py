"""A process that is forked after a bundle was opened generates, closes and ends like any other."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ldm_runtime.backends.networks import OpenNetworks
from ldm_runtime.errors import BackendError
from ldm_runtime.testing import FakeEngine

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

CODE = """
import faulthandler, os, sys, threading
from ldm_runtime import Generator

def request(): return generator("a red circle", seed=1, num_inference_steps=2).images[0].tobytes()

threads = int(sys.argv[2]) or None
generator = Generator(sys.argv[1], threads=threads)
expected = request()
receiver, sender = os.pipe()
child = os.fork()
if child == 0:
    faulthandler.dump_traceback_later(60, exit=True)
    if sys.argv[3] != "exit":
        os.write(sender, b"equal" if request() == expected else b"other")
    if sys.argv[3] == "generate and close":
        generator.close()
    sys.exit(0)
os.close(sender)
print(os.read(receiver, 5).decode(), os.waitpid(child, 0)[1])
assert request() == expected
generator.close()
"""


@pytest.mark.parametrize(
    ("threads", "ending"),
    [
        (1, "generate and close"),
        (2, "generate and close"),
        (4, "generate and close"),
        (4, "exit"),
        (0, "generate"),
    ],
)
def test_a_forked_process_generates_the_same_and_ends(tiny_bundle, threads, ending):
    quiet = "ignore::DeprecationWarning"  # Python 3.12 warns of any fork of a process with threads

    done = subprocess.run(
        [sys.executable, "-W", quiet, "-c", CODE, str(tiny_bundle), str(threads), ending],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == (["0"] if ending == "exit" else ["equal", "0"])


def networks_over(engines, *, survives_fork):
    """Open networks that note every engine."""

    def open_engine(_name):
        engines.append(FakeEngine(lambda _: {"x": np.zeros(1)}))
        return engines[-1]

    return OpenNetworks(open_engine, "the generator", survives_fork=survives_fork)


def is_closed(engine):
    try:
        engine.run({})
    except BackendError:
        return True
    return False


def test_a_forked_process_opens_its_own_networks_and_closes_no_others():
    engines = []
    networks = networks_over(engines, survives_fork=True)
    networks("unet")

    networks.abandon()
    networks("unet")
    networks.close()

    assert [is_closed(engine) for engine in engines] == [False, True]


def test_on_a_gpu_a_forked_process_is_told_to_open_the_bundle_itself():
    engines = []
    networks = networks_over(engines, survives_fork=False)
    networks("unet")

    networks.abandon()
    with pytest.raises(BackendError, match="its backend does not follow a fork; open it in every"):
        networks("unet")
    networks.close()

    assert not is_closed(engines[0])
