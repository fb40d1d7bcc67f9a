"""Both commands in processes of their own, with a stdout that cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ldm_runtime

ROOT = Path(ldm_runtime.__file__).parents[1]
_FULL = Path("/dev/full")

needs_full_device = pytest.mark.skipif(not _FULL.exists(), reason="there is no full device")


def run_module(module, *arguments, stdout=subprocess.PIPE, **environment):
    """Run a module as a command; keywords are variables of its environment."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
        cwd=ROOT,
    )


def run_on_full_disk(module, *arguments, unbuffered):
    """Run it with a stdout whose disk is full."""
    with _FULL.open("wb") as full:
        return run_module(module, *arguments, stdout=full, PYTHONUNBUFFERED=unbuffered)


def run_into_closed_pipe(module, *arguments, unbuffered):
    """Run it with a pipe as stdout whose reader has closed it."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return run_module(module, *arguments, stdout=writer, PYTHONUNBUFFERED=unbuffered)
    finally:
        os.close(writer)
