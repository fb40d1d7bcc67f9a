"""Diagnosis of this machine: the backends that can run, and why the others cannot."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ldm_runtime.backends import BACKENDS, BackendEntry, get_backend
from ldm_runtime.backends.onnxruntime.packages import conflict, installed_packages
from ldm_runtime.backends.processors import usable_processors
from ldm_runtime.errors import BackendError


@dataclass(frozen=True, kw_only=True)
class BackendReport:
    """Status of one backend.

    Attributes:
        name: The backend.
        version: Version of the library that it uses, or None if that does not load.
        why_not: Why it cannot run here, with the fix; None if it can.
    """

    name: str
    version: str | None
    why_not: str | None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """This machine, as far as generating images is concerned.

    Attributes:
        python: Version of the interpreter.
        numpy: Version of NumPy.
        system: Operating system and processor.
        processors: Logical processors that this process may use.
        backends: Every backend, in order of preference.
        problem: Conflict of the installed packages, with its fix; None if there is none.
    """

    python: str
    numpy: str
    system: str
    processors: int
    backends: tuple[BackendReport, ...]
    problem: str | None

    @property
    def can_run(self) -> bool:
        """Whether any backend can run."""
        return any(backend.why_not is None for backend in self.backends)


def diagnose(
    entries: Mapping[str, BackendEntry] = BACKENDS, packages: Mapping[str, str] | None = None
) -> Diagnosis:
    """Return the diagnosis of this machine, from every backend.

    Args:
        entries: The backends.
        packages: Versions of the packages of ONNX Runtime; None is those installed.
    """
    return Diagnosis(
        python=platform.python_version(),
        numpy=np.__version__,
        system=f"{platform.system()} {platform.machine()}",
        processors=usable_processors(),
        backends=tuple(_report(name, entries) for name in entries),
        problem=conflict(installed_packages() if packages is None else packages),
    )


def _report(name: str, entries: Mapping[str, BackendEntry]) -> BackendReport:
    try:
        backend = get_backend(name, entries)
    except BackendError as error:
        return BackendReport(name=name, version=None, why_not=str(error))
    return BackendReport(name=name, version=backend.version(), why_not=backend.why_not(None))
