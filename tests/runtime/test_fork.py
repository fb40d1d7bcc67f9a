"""A process that is forked after a bundle was opened generates, closes and ends like any other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("threads", [1, 2, 0, 4])
@pytest.mark.parametrize("ending", ["exit", "generate", "generate and close"])
def test_a_forked_process_generates_the_same_and_ends(tiny_bundle, threads, ending):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tiny_bundle), str(threads), ending],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == (["0"] if ending == "exit" else ["equal", "0"])
