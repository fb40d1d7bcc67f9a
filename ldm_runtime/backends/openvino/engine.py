"""One component in OpenVINO's CPU plugin: static shapes, compiled when they are first needed."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends.contract import NO_TENSORS, Precision, Tensors
from ldm_runtime.backends.host_engine import Compute, HostEngine, NativeErrors
from ldm_runtime.backends.openvino.compiled_models import Latest
from ldm_runtime.backends.openvino.library import keeps_scores, load_openvino
from ldm_runtime.backends.openvino.model_cache import ModelCache
from ldm_runtime.backends.processors import compute_threads
from ldm_runtime.backends.signatures import check_names
from ldm_runtime.bundle.low_rank_branches import Branch
from ldm_runtime.bundle.manifest import ComponentRecord
from ldm_runtime.errors import BackendError
from ldm_runtime.specs.model import ModelSpec

#: From the type of stored weights to that of the graph.
_WIDENED = ["f16", "f32"]
_HINTS: Mapping[str, str] = {"fp32": "f32", "bf16": "bf16"}

#: The lengths of every axis of every input, by which a compiled model is known.
_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """How graphs are compiled.

    Attributes:
        precision: "fp32", or "bf16" inside while inputs and outputs stay in fp32.
        threads: Compute threads; None is one per physical core that this process may use.
        cache: Compiled models on disk, or None without them.
        kept: Compiled shapes that stay in memory.
    """

    precision: Precision
    threads: int | None = None
    cache: ModelCache | None = None
    kept: int = 2

    def compiled(self, core: Any, model: Any, shapes: _Shapes) -> Any:  # noqa: ANN401
        """Return a model of fixed shapes, compiled or read from the cache."""
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[self.precision],
            "INFERENCE_NUM_THREADS": compute_threads(self.threads),
            "ENABLE_CPU_PINNING": False,  # or two processes would share one core
            "CPU_DENORMALS_OPTIMIZATION": True,
        }

        def compile_in(folder: Path | None) -> Any:  # noqa: ANN401
            cached = {} if folder is None else {"CACHE_DIR": str(folder)}
            return core.compile_model(model, "CPU", settings | cached)

        return compile_in(None) if self.cache is None else self.cache.compiled(shapes, compile_in)


class OpenVinoEngine(HostEngine):
    """One graph in OpenVINO's CPU plugin.

    Every new set of shapes is compiled, which takes seconds for a large network; the last ones are
    kept. Denormals count as zero. Weights next to the graph are memory-mapped by OpenVINO. Any
    number of threads may call `run` at once.

    Args:
        path: The graph, which names its weights file relative to itself.
        component: Its inputs and outputs.
        sizes: Lengths of the fixed axes, from `specs.model.axis_sizes`.
        compilation: How it is compiled.
        spec: The model, to refuse runs that this machine has no memory for; None refuses none.
        weights: Weights that replace those of the weights file, by name.
        branches: Low-rank branches that the graph gets.

    Raises:
        BackendError: OpenVINO cannot load the graph, or there are more threads than
            `processors.MAX_THREADS`.
    """

    def __init__(  # noqa: PLR0913  (all but the graph by name)
        self,
        path: Path,
        component: ComponentRecord,
        sizes: Mapping[str, int],
        compilation: Compilation,
        *,
        spec: ModelSpec | None = None,
        weights: Tensors = NO_TENSORS,
        branches: Sequence[Branch] = (),
    ) -> None:
        super().__init__(component, sizes, _ERRORS, spec, keeps_scores=keeps_scores())
        core = load_openvino().Core()
        model = _read(core, path)
        _replace_weights(model, weights)
        _add_branches(model, branches)
        _keep_half_weights(model)
        check_names(path, [each.get_any_name() for each in model.inputs], component)

        def compiled(shapes: _Shapes) -> _CompiledModel:
            shaped = model.clone()
            shaped.reshape({name: list(shape) for name, shape in shapes})
            return _CompiledModel(compilation.compiled(core, shaped, shapes))

        self._compiled: Latest[_Shapes, _CompiledModel] | None = Latest(compiled, compilation.kept)

    def _opened(self) -> Compute | None:
        compiled = self._compiled
        return None if compiled is None else lambda feed: compiled[_shapes_of(feed)].run(feed)

    def close(self) -> None:
        """Release the models; calls that are running finish."""
        self._compiled = None


def _shapes_of(feed: Tensors) -> _Shapes:
    return tuple(sorted((name, array.shape) for name, array in feed.items()))


class _CompiledModel:
    """A compiled model, and the memory of as many runs as there ever were at once."""

    def __init__(self, compiled: Any) -> None:  # noqa: ANN401  (of a compiled module)
        self._compiled = compiled
        self._idle: deque[Any] = deque()

    def run(self, feed: Tensors) -> dict[str, npt.NDArray[Any]]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        outputs = request.infer(dict(feed), share_inputs=True)
        found = {each.get_any_name(): outputs[each] for each in self._compiled.outputs}
        self._idle.append(request)
        return found


def _read(core: Any, path: Path) -> Any:  # noqa: ANN401
    try:
        return core.read_model(path)
    except RuntimeError as error:
        raise BackendError(f"OpenVINO cannot load {path}: {_first_line(error)}") from error


def _replace_weights(model: Any, weights: Tensors) -> None:  # noqa: ANN401
    """Put weights in the place of constants that have their names."""
    openvino = load_openvino()
    nodes = _named_nodes(model) if weights else {}
    for name, array in weights.items():
        old = nodes[name]
        new = openvino.op.Constant(array)
        new.set_friendly_name(name)
        openvino.utils.replace_node(old, new)


def _add_branches(model: Any, branches: Sequence[Branch]) -> None:  # noqa: ANN401
    """Add low-rank branches, as `low_rank_branches.with_branches` does to a graph."""
    openvino = load_openvino()
    opset = openvino.opset15
    nodes = _named_nodes(model) if branches else {}
    for branch in branches:
        node = _user_of(nodes[branch.weight])
        users = list(node.output(0).get_target_inputs())
        down, up = (
            _parameter(name, shape, openvino.Type.f32) for name, shape in branch.shapes.items()
        )
        model.add_parameters([down, up])
        seen = node.input_value(0)
        if branch.place.is_convolution:
            flat = opset.reshape(seen, np.array([0, 0, -1]), special_zero=True)
            raised = opset.matmul(up, opset.matmul(down, flat, False, False), False, False)
            update = opset.reshape(raised, opset.shape_of(node), special_zero=False)
        else:
            update = opset.matmul(opset.matmul(seen, down, False, False), up, False, False)
        result = opset.add(node, update)
        for user in users:
            user.replace_source_output(result.output(0))
    if branches:
        model.validate_nodes_and_infer_types()


def _keep_half_weights(model: Any) -> None:  # noqa: ANN401
    """Let weights stay fp16 in memory until a kernel takes them in its own order and precision.

    A conversion to fp32 is computed when the model is compiled, which takes four bytes for every
    weight in addition, unless it is marked as decompression. Python cannot set the mark; the
    conversions that OpenVINO makes when it compresses a model have it, and take the others' places.
    """
    openvino = load_openvino()
    conversions = [each for each in model.get_ordered_ops() if _widens_a_weight(each)]
    marked = _marked_conversions(len(conversions)) if conversions else []
    for old, new in zip(conversions, marked, strict=True):
        new.input(0).replace_source_output(old.input_value(0))
        new.set_friendly_name(old.get_friendly_name())
        openvino.utils.replace_node(old, new)
    model.validate_nodes_and_infer_types()


def _widens_a_weight(node: Any) -> bool:  # noqa: ANN401
    if node.get_type_name() != "Convert":
        return False
    types = node.get_input_element_type(0), node.get_output_element_type(0)
    source = node.input_value(0).get_node()
    return source.get_type_name() == "Constant" and [each.to_string() for each in types] == _WIDENED


def _marked_conversions(count: int) -> list[Any]:
    """Return conversions that are marked as decompression, of small constants."""
    openvino = load_openvino()
    transformations = import_module("openvino._offline_transformations")
    opset, small = openvino.opset15, np.full((4, 4), 0.5, np.float32)
    seen = opset.parameter([4, 4], openvino.Type.f32)
    sums = [opset.add(seen, opset.constant(small)) for _ in range(count)]
    model = openvino.Model(sums, [seen], "decompression")
    transformations.compress_model_transformation(model)
    return [each for each in model.get_ordered_ops() if each.get_type_name() == "Convert"]


def _named_nodes(model: Any) -> dict[str, Any]:  # noqa: ANN401
    return {each.get_friendly_name(): each for each in model.get_ops()}


def _user_of(node: Any) -> Any:  # noqa: ANN401
    """Return the one node that takes a weight, after a conversion of its type."""
    (user,) = (each.get_node() for each in node.output(0).get_target_inputs())
    return _user_of(user) if user.get_type_name() == "Convert" else user


def _parameter(name: str, shape: Sequence[int], kind: Any) -> Any:  # noqa: ANN401
    """Return an input with a batch of any size."""
    openvino = load_openvino()
    parameter = openvino.op.Parameter(kind, openvino.PartialShape([-1, *shape]))
    parameter.set_friendly_name(name)
    parameter.output(0).set_names({name})
    return parameter


def _first_line(error: Exception) -> str:
    """Return what an error of OpenVINO says after the places in its source that it came through."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return (told or lines or [type(error).__name__])[0].rstrip(" .;")


_ERRORS = NativeErrors(library="OpenVINO", classes=(RuntimeError,), describe=_first_line)
