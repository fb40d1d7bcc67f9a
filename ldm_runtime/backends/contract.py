"""The interface of everything that can run a network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar, cast, runtime_checkable

import numpy.typing as npt

from ldm_runtime.bundle.files import checked_file
from ldm_runtime.bundle.manifest import ComponentRecord, GraphVariant, Manifest
from ldm_runtime.errors import BackendError

Resource = TypeVar("Resource")


#: Arrays by the names of `ldm_runtime.specs.components.COMPONENTS`.
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


@runtime_checkable
class BindingRunner(Runner, Protocol):
    """A runner that can keep some of its inputs from call to call."""

    def bind(self, constants: Tensors) -> Runner:
        """Return this network with some inputs fixed, for `run` to be given only the others.

        A device backend uploads them once. The engine itself does not change, so that threads do
        not meet each other's constants.
        """
        ...


class Engine(BindingRunner, Protocol):
    """One loaded network. Opened on construction, closed by `with`; never half-ready.

    Several threads may call `run` at once.
    """

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
    if isinstance(runner, BindingRunner):
        return runner.bind(constants)
    return BoundInputs(runner=runner, constants=constants)


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What the engines of a backend can do, and when it is expected to run.

    Attributes:
        variant: The graphs that its engines are made from, on which the bounds of `ldm verify`
            depend.
        limited_shapes: Whether an engine takes the shapes of its profiles and no others.
        min_shared_samples: Batch size from which on a sample has the same bits whatever else is in
            its batch; see `ldm_runtime.pipeline.batching`.
        is_prepared: Whether the user made this machine or this bundle (None: any bundle) ready for
            the backend, so that choosing another one deserves a sentence.
    """

    variant: GraphVariant
    limited_shapes: bool
    min_shared_samples: int
    is_prepared: Callable[[Manifest | None], bool]


def always_prepared(_manifest: Manifest | None) -> bool:
    """Say that passing over a backend always deserves a sentence."""
    return True


def check_input_names(component: ComponentRecord, inputs: Mapping[str, object]) -> None:
    """Check that a run is given every input of a component and nothing else.

    Raises:
        BackendError: An input is missing or unknown.
    """
    names = [signature.name for signature in component.inputs]
    if inputs.keys() != set(names):
        raise BackendError(
            f"{component.name} takes {', '.join(names)}; "
            f"it was given {', '.join(inputs) or 'nothing'}"
        )


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


class SharedResources:
    """What the engines of one generator have in common, such as scratch memory on a GPU."""

    def __init__(self) -> None:
        self._things: dict[str, Any] = {}
        self._lock = Lock()

    def obtain(self, name: str, make: Callable[[], Resource]) -> Resource:
        """Return the thing of that name, made by the first to ask."""
        with self._lock:
            if name not in self._things:
                self._things[name] = make()
            return cast("Resource", self._things[name])


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
    shared: SharedResources = field(default_factory=SharedResources, compare=False)

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
