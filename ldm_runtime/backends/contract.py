"""The interface of a backend: engines, their inputs, and the resources that they share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar, cast, runtime_checkable

import numpy.typing as npt

from ldm_runtime.bundle.files import checked_file
from ldm_runtime.bundle.graph_files import check_graph_files
from ldm_runtime.bundle.low_rank_branches import Branch
from ldm_runtime.bundle.manifest import ComponentRecord, GraphVariant, Manifest, has_graph
from ldm_runtime.errors import BackendError
from ldm_runtime.specs.model import axis_sizes

Resource = TypeVar("Resource")


#: Precisions that a network computes in.
Precision = Literal["fp32", "bf16", "fp16", "int8"]

#: Arrays by the names of `ldm_runtime.specs.components.COMPONENTS`.
Tensors = Mapping[str, npt.NDArray[Any]]
NO_TENSORS: Tensors = MappingProxyType({})


class Runner(Protocol):
    """The part of an engine that runs the network."""

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
        """Return this network with some inputs fixed; `run` then takes only the others.

        A device backend uploads them once. The engine itself does not change, so that threads do
        not see each other's constants.
        """
        ...


class Engine(BindingRunner, Protocol):
    """One loaded network: ready to run once constructed, closed by `with`.

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
    """A runner with constants that are passed on with every call, for engines without `bind`."""

    runner: Runner
    constants: Tensors

    def run(self, inputs: Tensors) -> Tensors:
        """Run with `inputs` and the constants; see `Runner`."""
        return self.runner.run({**self.constants, **inputs})


def bind_constants(runner: Runner, constants: Tensors) -> Runner:
    """Return `runner` with some inputs fixed, by its `bind` method if it has one."""
    if isinstance(runner, BindingRunner):
        return runner.bind(constants)
    return BoundInputs(runner=runner, constants=constants)


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """Abilities of the engines of a backend, and when it is expected to run.

    Attributes:
        variant: Precision of the graphs that its engines run, on which the bounds of `ldm verify`
            depend.
        reduced: Precisions below that of the graphs that its engines can compute in as well.
        fastest: Returns the precision that engines compute in unless told otherwise; None is that
            of the graphs.
        limited_shapes: Whether an engine takes the shapes of its profiles and no others.
        min_shared_samples: Smallest batch size from which on results are batch-invariant, bit for
            bit; see `ldm_runtime.pipeline.batching`.
        is_prepared: Whether the user prepared this machine or this bundle (None: any bundle) for
            the backend, so that choosing another one is logged.
        survives_fork: Whether a process that is forked after engines were opened can open its own.
        takes_weights: Whether engines run with other weights than those of the bundle.
        takes_branches: Whether their graphs can have branches, see `EngineSource`.
        kept_shapes: Returns how many shapes of a network of so many bytes of weights are ready to
            run once they have been seen; None is any number.
    """

    variant: GraphVariant
    limited_shapes: bool
    min_shared_samples: int
    is_prepared: Callable[[Manifest | None], bool]
    survives_fork: bool = False
    takes_weights: bool = False
    takes_branches: bool = False
    kept_shapes: Callable[[int], int] | None = None
    reduced: tuple[Precision, ...] = ()
    fastest: Callable[[], Precision] | None = None

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Precisions that engines can compute in, the most exact first."""
        return (self.variant, *self.reduced)

    def precision_of(self, options: "RunOptions") -> Precision:
        """Return the precision that engines compute in."""
        if options.precision is not None:
            return options.precision
        return self.variant if self.fastest is None else self.fastest()


def always_prepared(_manifest: Manifest | None) -> bool:
    """Return True: passing over the backend is always logged."""
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


def lacks_graph(name: str, variant: GraphVariant, manifest: Manifest | None) -> str | None:
    """Say which component of a bundle lacks the graph that a backend needs; None if none does."""
    for component in manifest.components if manifest else ():
        if not any(graph.variant == variant for graph in component.graphs):
            reason = f"{name} needs an {variant} graph, which {component.name} lacks"
            return reason + ("; export without --no-fp16" if variant == "fp16" else "")
    return None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of how engines run; backends without the choice ignore them.

    Attributes:
        cuda_graphs: Whether a GPU replays a captured CUDA graph for shapes that it has seen, which
            saves the launch of every kernel; the results are the same.
        spinning: Whether threads of the CPU wait for work by running in circles, ONNX Runtime's own
            default. On processors that others use too, a step then takes 1.4 to 2.3 times as long
            (`docs/deployment.md`).
        precision: Precision that networks compute in, of those that the backend has; None is its
            own choice: fp16 on GPUs, and on CPUs bf16 where OpenVINO and the processor have it.
            With "int8" the UNet computes in 8 bits, from graphs of `ldm quantize`, and whatever has
            no such graph in the backend's own choice.
        specialization: When TensorRT-RTX compiles kernels for the exact input shapes: "lazy" in
            the background while generic ones run, "eager" before the first result, "none" never.
    """

    cuda_graphs: bool = True
    trust_engines: bool = False
    spinning: bool = False
    precision: Precision | None = None
    specialization: Literal["lazy", "eager", "none"] = "lazy"


DEFAULT_OPTIONS = RunOptions()


class SharedResources:
    """Resources that the engines of one generator share, such as scratch memory on a GPU."""

    def __init__(self) -> None:
        self._resources: dict[str, Any] = {}
        self._lock = Lock()

    def obtain(self, name: str, make: Callable[[], Resource]) -> Resource:
        """Return the resource of that name, made on first use."""
        with self._lock:
            if name not in self._resources:
                self._resources[name] = make()
            return cast("Resource", self._resources[name])


class WeightChanges(Protocol):
    """Changes of a bundle's weights, such as adapters."""

    @property
    def key(self) -> str:
        """A text that is the same for the same changes only."""
        ...

    def changed_weights(self, component: ComponentRecord, graph: Path) -> Tensors:
        """Return the weights of a graph that are not those of its weight file, by their names.

        Each has the shape and type of the one in whose place it is.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class NoChanges:
    """The weights of the bundle, as they are."""

    key: str = ""

    def changed_weights(self, component: ComponentRecord, graph: Path) -> Tensors:
        """Return no weights; see `WeightChanges`."""
        return NO_TENSORS


@dataclass(frozen=True, kw_only=True)
class EngineSource:
    """One component of one bundle, for a backend to open.

    Attributes:
        bundle: The bundle's folder.
        manifest: Its manifest.
        component: The record of the network to open.
        threads: Number of compute threads; None leaves it to the backend.
        check_hashes: Whether to compare the contents of files with the manifest, or only sizes.
        options: How the engine runs.
        shared: Resources that it shares with the other engines of its generator.
        changes: Changes of its weights, for a backend that takes them.
        branches: Low-rank branches that its graphs get, for a backend that takes them; `component`
            has their inputs.
    """

    bundle: Path
    manifest: Manifest
    component: ComponentRecord
    threads: int | None = None
    check_hashes: bool = True
    options: RunOptions = RunOptions()
    shared: SharedResources = field(default_factory=SharedResources, compare=False)
    changes: WeightChanges = NoChanges()
    branches: tuple[Branch, ...] = ()

    @property
    def sizes(self) -> Mapping[str, int]:
        """Lengths of the fixed axes of its inputs and outputs."""
        lengths = dict(axis_sizes(self.manifest.spec, self.component.name))
        for branch in self.branches:
            lengths.update(branch.lengths)
        return lengths

    def graph(self, variant: GraphVariant) -> Path:
        """Check a graph and its weights, and return the path of the graph.

        Raises:
            BackendError: The component has no such graph.
            BundleError: A file is missing or altered, or the graph names other files.
        """
        for record in self.component.graphs:
            if record.variant == variant:
                weights = self.component.weights_file
                self._checked(weights)
                path = self._checked(record.file)
                check_graph_files(self.bundle, record.file, weights)
                return path
        raise BackendError(
            f"component {self.component.name!r} of {self.bundle} has no {variant} graph; "
            f"export the bundle again{', without --no-fp16' if variant == 'fp16' else ''}"
        )

    def changed_weights(self, path: Path) -> Tensors:
        """Return the weights of the graph at `path` that are not those of its weight file."""
        return self.changes.changed_weights(self.component, path)

    def has_graph(self, variant: GraphVariant) -> bool:
        """Return whether the component has a graph of that variant."""
        return has_graph(self.component, variant)

    def hashes(self, variant: GraphVariant) -> tuple[str, ...]:
        """Return hashes of a graph and its weights, of all that defines the network."""
        files = {graph.file for graph in self.component.graphs if graph.variant == variant}
        files.add(self.component.weights_file)
        hashes = [record.sha256 for record in self.manifest.files if record.path in files]
        branches = [f"{each.weight} {each.rank}" for each in self.branches]
        return tuple(each for each in (*hashes, self.changes.key, *branches) if each)

    def _checked(self, path: str) -> Path:
        return checked_file(self.bundle, self.manifest, path, hashed=self.check_hashes)
