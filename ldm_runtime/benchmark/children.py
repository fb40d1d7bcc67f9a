"""Child processes that measure: a file of this package is run, and prints one line of JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ldm_runtime
from ldm_runtime.errors import LdmError

_NOTHING: Mapping[str, str] = MappingProxyType({})


def run_child(
    purpose: str,
    file: str,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] = _NOTHING,
) -> Any:  # noqa: ANN401  (whatever JSON holds)
    """Run a file in its own process and return what the last line that it prints says.

    The file is run as it is and not as a module, so that it can time the import of this package.

    Args:
        purpose: What for, in the message of a failure.
        file: Path of the file.
        arguments: Its arguments.
        environment: Variables to set.

    Raises:
        LdmError: The process failed, with what it printed, or the signal that killed it.
    """
    package = str(Path(ldm_runtime.__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, "-P", file, *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise LdmError(f"{purpose} failed: {_reason(done)}")
    return json.loads(done.stdout.splitlines()[-1])


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a process printed on stderr; one that was killed may have printed nothing."""
    printed = done.stderr.strip()
    if done.returncode > 0:
        return printed or f"exit status {done.returncode}"
    killed = f"killed by signal {-done.returncode}, perhaps out of memory"
    return f"{killed}: {printed}" if printed else killed
