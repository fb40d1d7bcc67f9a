"""Ctrl-C for processes that exist for it.

A signal to the process that runs the tests can end it without a word, and the run with it.
"""

import os
import subprocess
import sys

_AS_IN_A_TERMINAL = """
import os, signal, sys, threading
sys.path[:] = {path!r}
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
"""


def output_of_interrupted(code, *, seconds=60):
    """Run `code`, which sends its process SIGINT and says with `print` what came of that."""
    done = subprocess.run(
        [sys.executable, "-c", _AS_IN_A_TERMINAL.format(path=sys.path) + code],
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
