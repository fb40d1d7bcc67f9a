"""What can run a network: the one interface, and how to find something that satisfies it.

A backend is a module with three functions (see `Backend`); it is imported on first use, so that a
package that is not installed only matters to whoever asks for it.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PurePosixPath
from threading import Lock
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar, cast

import numpy.typing as npt

from ldm_runtime.errors import BackendError, BundleError
from ldm_runtime.manifest import ComponentRecord, GraphVariant, Manifest, check_file

_LOGGER = logging.getLogger(__name__)

Thing = TypeVar("Thing")

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
class RunOptions:
    """How engines run, for the backends that have the choice; the others ignore it.

    Attributes:
        cuda_graphs: Whether a GPU replays a recorded graph for shapes that it has seen, which
            saves the launch of every kernel; the results are the same.
        specialization: When TensorRT-RTX compiles kernels for the very shapes asked for: "lazy" in
            the background while general ones run, "eager" before the first result, "none" never.
    """

    cuda_graphs: bool = True
    specialization: Literal["lazy", "eager", "none"] = "lazy"


class Shared:
    """What the engines of one generator have in common, such as scratch memory on a GPU."""

    def __init__(self) -> None:
        self._things: dict[str, Any] = {}
        self._lock = Lock()

    def obtain(self, name: str, make: Callable[[], Thing]) -> Thing:
        """Return the thing of that name, made by the first to ask."""
        with self._lock:
            if name not in self._things:
                self._things[name] = make()
            return cast("Thing", self._things[name])


@dataclass(frozen=True, kw_only=True)
class EngineSource:
    """What a backend opens: one component of one bundle.

    Attributes:
        bundle: The bundle's folder.
        manifest: Its manifest.
        component: The record of the network to open.
        threads: How many threads may compute; None leaves it to the backend.
        check_hashes: Whether to compare the contents of files with the manifest, or only sizes.
        options: How the engine runs.
        shared: What it has in common with the other engines of its generator.
    """

    bundle: Path
    manifest: Manifest
    component: ComponentRecord
    threads: int | None = None
    check_hashes: bool = True
    options: RunOptions = RunOptions()
    shared: Shared = field(default_factory=Shared, compare=False)

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

    def why_not(self, manifest: Manifest | None, bundle: Path | None = None) -> str | None:
        """Say why this machine cannot run a bundle (None: any bundle); None if it can.

        Args:
            manifest: The bundle's.
            bundle: Its folder, for backends that run more than the manifest describes.
        """
        ...

    def version(self) -> str:
        """Return the version of the library behind it."""
        ...


@dataclass(frozen=True, kw_only=True)
class BackendEntry:
    """Where a backend's module is, and the extra of `ldm-deploy` that installs what it needs.

    Attributes:
        module: The module.
        extra: The extra.
        automatic: Whether "auto" may choose it; the others run only when asked for by name.
    """

    module: str
    extra: str
    automatic: bool = True


#: Every backend, the one to prefer first.
BACKENDS: Mapping[str, BackendEntry] = MappingProxyType(
    {
        "tensorrt": BackendEntry(module="ldm_runtime.backends.tensorrt", extra="tensorrt"),
        "cuda": BackendEntry(module="ldm_runtime.backends.onnxruntime_cuda", extra="cuda"),
        "onnxruntime": BackendEntry(module="ldm_runtime.backends.onnxruntime", extra="cpu"),
        "tensorrt-ort": BackendEntry(
            module="ldm_runtime.backends.onnxruntime_tensorrt", extra="cuda", automatic=False
        ),
        "tensorrt-rtx-ort": BackendEntry(
            module="ldm_runtime.backends.onnxruntime_tensorrt_rtx", extra="cpu", automatic=False
        ),
    }
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
    name: str,
    manifest: Manifest | None,
    entries: Mapping[str, BackendEntry] = BACKENDS,
    *,
    bundle: Path | None = None,
) -> str:
    """Return the name of the backend to use: `name` itself, or for "auto" the first that can run.

    Every step down from a backend that the bundle or the machine was made ready for is logged in
    one sentence.

    Raises:
        BackendError: `name` cannot run this bundle here, or for "auto" none can.
    """
    if name != "auto":
        if reason := _why_not(name, manifest, bundle, entries):
            raise BackendError(reason)
        return name
    reasons: dict[str, str] = {}
    for candidate in (name for name, entry in entries.items() if entry.automatic):
        reason = _why_not(candidate, manifest, bundle, entries)
        if reason is None:
            for passed_over, why in reasons.items():
                if _is_prepared(passed_over, manifest, entries):
                    _LOGGER.warning("%s; using %s", why, candidate)
            return candidate
        reasons[candidate] = reason
    raise BackendError(f"no backend can run here: {'; '.join(reasons.values())}")


def _why_not(
    name: str,
    manifest: Manifest | None,
    bundle: Path | None,
    entries: Mapping[str, BackendEntry],
) -> str | None:
    try:
        return get_backend(name, entries).why_not(manifest, bundle)
    except BackendError as error:
        return str(error)


def _is_prepared(name: str, manifest: Manifest | None, entries: Mapping[str, BackendEntry]) -> bool:
    """Say whether somebody would expect it to run, by its own `is_prepared` if it has one."""
    try:
        ask = getattr(get_backend(name, entries), "is_prepared", None)
    except BackendError:
        return True
    return ask is None or bool(ask(manifest))
