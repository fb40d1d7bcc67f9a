"""Scripts and programs in the virtual environment of a peer, without a network."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_runtime.errors import LdmError
from measuring.processes import script_environment
from peers.entrants import ENVIRONMENTS, WORKERS

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_OFFLINE = {
    **{name: "1" for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DIFFUSERS_OFFLINE")},
    **{name: "1" for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "DISABLE_TELEMETRY")},
    "ORT_DISABLE_TELEMETRY": "1",  # read when ONNX Runtime is imported
}


class PeerError(LdmError):
    """A peer is not installed, or its process failed."""


def python_of(environment: str | None) -> Path:
    """Return the interpreter of an environment; None is this one.

    Raises:
        PeerError: The environment is not there, or `make peers` was interrupted in it.
    """
    if environment is None:
        return Path(sys.executable)
    folder = ENVIRONMENTS / environment
    if not (folder / ".installed").is_file():
        raise PeerError(f"not installed: run `make peers PEERS={environment}`")
    return folder / "bin/python"


def run_in(
    environment: str | None,
    command: Sequence[str],
    *,
    threads: int | None = None,
    cache: Path | None = None,
) -> str:
    """Run a command of an environment's interpreter and return what it printed.

    Args:
        environment: Name of the environment; None is this one.
        command: Arguments of the interpreter.
        threads: Threads that libraries take from the environment variables.
        cache: Folder for what torch compiles.

    Raises:
        PeerError: The environment is not there, or the command failed; its last words.
    """
    done = subprocess.run(
        [str(python_of(environment)), *command],
        env=_variables(environment, threads, cache),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["without a word"]
        print("\n".join(f"  {line}" for line in lines[-20:]), file=sys.stderr, flush=True)
        raise PeerError(f"ended with {done.returncode}: {lines[-1].strip()}")
    return done.stdout


def ask(
    environment: str | None, worker: str, job: Mapping[str, Any], *, threads: int, cache: Path
) -> dict[str, Any]:
    """Run a worker with a job and return its answer.

    Raises:
        PeerError: See `run_in`.
    """
    command = [str(WORKERS / worker), json.dumps(job)]
    printed = run_in(environment, command, threads=threads, cache=cache)
    answer: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return answer


def _variables(environment: str | None, threads: int | None, cache: Path | None) -> dict[str, str]:
    """Return the variables of a process; a peer imports nothing of ours but the protocol."""
    own = {name: value for name, value in os.environ.items() if name not in _THREAD_VARIABLES}
    variables = {**(script_environment() if environment is None else own), **_OFFLINE}
    known = variables.get("PYTHONPATH", "") if environment is None else ""
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(WORKERS), known)))
    for name in _THREAD_VARIABLES:
        variables.pop(name, None)
        if threads is not None:
            variables[name] = str(threads)
    if cache is not None:
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
    return variables
