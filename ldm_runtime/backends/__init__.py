"""What can run a network: the one interface, and how to find something that satisfies it.

A backend is a module with three functions (see `Backend`); it is imported on first use, so that a
package that is not installed only matters to whoever asks for it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self, cast

import numpy.typing as npt

from ldm_runtime.errors import BackendError, BundleError
from ldm_runtime.manifest import ComponentRecord, GraphVariant, Manifest, check_file

_LOGGER = logging.getLogger(__name__)

#: Arrays by the names of `ldm_runtime.components.COMPONENTS`.
Tensors = Mapping[str, npt.NDArray[Any]]


class Runner(Protocol):
    """The half of an engine that computes."""

    def run(self, inputs: Tensors) -> Tensors:
        """Run once.

        The returned arrays belong to the caller: a later `run` does not overwrite them.

        Raises:
            ShapeError: A shape is not one that the network takes.
            BackendError: An input is missing, unknown or of the wrong type, the engine is closed,
                or the computation failed.
        """
        ...


class Engine(Runner, Protocol):
    """One loaded network. Opened on construction, closed by `with`; never half-ready.

    Several threads may call `run` at once.
    """

    def bind(self, constants: Tensors) -> Runner:
        """Return this network with some inputs fixed, for `run` to be given only the others.

        A device backend uploads them once. The engine itself does not change, so that threads do
        not meet each other's constants.
        """
        ...

    def close(self) -> None:
        """Free everything; `run` raises from then on. Closing twice is harmless."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


@dataclass(frozen=True, kw_only=True)
class BoundInputs:
    """A `bind` for engines that gain nothing from it: the constants travel with every call."""

    runner: Runner
    constants: Tensors

    def run(self, inputs: Tensors) -> Tensors:
        """Run with `inputs` and the constants; see `Runner`."""
        return self.runner.run({**self.constants, **inputs})


def bind_constants(runner: Runner, constants: Tensors) -> Runner:
    """Return `runner` with some inputs fixed, by its own `bind` if it has one."""
    bind = getattr(runner, "bind", None)
    if bind is None:
        return BoundInputs(runner=runner, constants=constants)
    return cast("Engine", runner).bind(constants)


@dataclass(frozen=True, kw_only=True)
class EngineSource:
    """What a backend opens: one component of one bundle.

    Attributes:
        bundle: The bundle's folder.
        manifest: Its manifest.
        component: The record of the network to open.
        threads: How many threads may compute; None leaves it to the backend.
        check_hashes: Whether to compare the contents of files with the manifest, or only sizes.
    """

    bundle: Path
    manifest: Manifest
    component: ComponentRecord
    threads: int | None = None
    check_hashes: bool = True

    def graph(self, variant: GraphVariant) -> Path:
        """Return the path of a graph, having checked it and its weights.

        Raises:
            BackendError: The component has no such graph.
            BundleError: A file is missing or altered.
        """
        for record in self.component.graphs:
            if record.variant == variant:
                self._checked(self.component.weights_file)
                return self._checked(record.file)
        raise BackendError(
            f"component {self.component.name!r} of {self.bundle} has no {variant} graph; "
            "export the bundle again"
        )

    def _checked(self, path: str) -> Path:
        return checked_file(self.bundle, self.manifest, path, hashed=self.check_hashes)


def checked_file(bundle: Path, manifest: Manifest, path: str, *, hashed: bool = True) -> Path:
    """Return the full path of a file of a bundle, having compared it with its record.

    Raises:
        BundleError: The path leaves the bundle, is not in the manifest, or the file is missing
            or altered.
    """
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise BundleError(f"the manifest of {bundle} names {path!r}, which lies outside the bundle")
    for record in manifest.files:
        if record.path == path:
            check_file(bundle, record, hashed=hashed)
            return bundle / path
    raise BundleError(f"the manifest of {bundle} lists no file {path!r}; export the bundle again")


class Backend(Protocol):
    """A module that opens engines."""

    def open_engine(self, source: EngineSource) -> Engine:
        """Open one component, ready to run.

        Raises:
            BackendError: It cannot run here.
            BundleError: A file is missing or altered.
        """
        ...

    def why_not(self, manifest: Manifest | None) -> str | None:
        """Say why this machine cannot run a bundle (None: any bundle); None if it can."""
        ...

    def version(self) -> str:
        """Return the version of the library behind it."""
        ...


@dataclass(frozen=True, kw_only=True)
class BackendEntry:
    """Where a backend's module is, and the extra of `ldm-deploy` that installs what it needs."""

    module: str
    extra: str


#: Every backend, the one to prefer first.
BACKENDS: Mapping[str, BackendEntry] = MappingProxyType(
    {"onnxruntime": BackendEntry(module="ldm_runtime.backends.onnxruntime", extra="cpu")}
)


def get_backend(name: str, entries: Mapping[str, BackendEntry] = BACKENDS) -> Backend:
    """Import a backend.

    Raises:
        BackendError: There is no such backend, its package is not installed, or it does not load.
    """
    if name not in entries:
        raise BackendError(f"unknown backend {name!r}; choose auto, {', '.join(entries)}")
    entry = entries[name]
    try:
        module = import_module(entry.module)
    except ModuleNotFoundError as error:
        raise BackendError(
            f"backend {name!r} needs the package {error.name!r}, which is not installed; "
            f"run `pip install 'ldm-deploy[{entry.extra}]'`"
        ) from error
    except (ImportError, OSError) as error:
        raise BackendError(f"backend {name!r} is installed but does not load: {error}") from error
    return cast("Backend", module)


def choose_backend(
    name: str, manifest: Manifest | None, entries: Mapping[str, BackendEntry] = BACKENDS
) -> str:
    """Return the name of the backend to use: `name` itself, or for "auto" the first that can run.

    Every step down from a preferred backend is logged in one sentence.

    Raises:
        BackendError: `name` cannot run this bundle here, or for "auto" none can.
    """
    if name != "auto":
        if reason := _why_not(name, manifest, entries):
            raise BackendError(reason)
        return name
    reasons: list[str] = []
    for candidate in entries:
        reason = _why_not(candidate, manifest, entries)
        if reason is None:
            for each in reasons:
                _LOGGER.warning("%s; using %s", each, candidate)
            return candidate
        reasons.append(reason)
    raise BackendError(f"no backend can run here: {'; '.join(reasons)}")


def _why_not(
    name: str, manifest: Manifest | None, entries: Mapping[str, BackendEntry]
) -> str | None:
    try:
        return get_backend(name, entries).why_not(manifest)
    except BackendError as error:
        return str(error)
