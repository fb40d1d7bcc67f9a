"""Graph rewrites between torch's exporter and the files of a bundle, in the order they run."""

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ldm_export.graphs.precision import NodePrecision

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})

#: Inputs that an operator takes in float32, whatever its precision.
_PRESCRIBED: Mapping[str, frozenset[int]] = {"Resize": frozenset({1, 2, 3})}


class LayOutWeights(ir.passes.InPlacePass):
    """Store weights as they are used: transposed or with added axes, still under their own names.

    Torch's exporter transposes a matrix in front of every product and adds two axes to every scale
    of a normalisation. Done here, without copying, no engine needs to do it when it loads a graph.
    A weight that is used in several layouts keeps its own.

    Args:
        weights: Names of the initializers to lay out.
    """

    def __init__(self, weights: Collection[str]) -> None:
        super().__init__()
        self.weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the pass to the main graph."""
        laid_out = [
            self._lay_out(model.graph, value)
            for name, value in model.graph.initializers.items()
            if name in self.weights
        ]
        return ir.passes.PassResult(model, modified=any(laid_out))

    def _lay_out(self, graph: ir.Graph, value: ir.Value) -> bool:
        nodes = list(value.consumers())
        layouts = {_layout(node, value) for node in nodes}
        if len(layouts) != 1 or value.const_value is None:
            return False
        (layout,) = layouts
        if layout is None:
            return False
        kind, numbers = layout
        array = value.const_value.numpy()
        view = array.transpose(numbers) if kind == "Transpose" else np.expand_dims(array, numbers)
        value.const_value = ir.Tensor(view, name=value.name)
        value.shape = ir.Shape(view.shape)
        for node in nodes:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            graph.remove(node, safe=True)
        return True


class ShareConstants(ir.passes.InPlacePass):
    """Keep one of several equal constants, so that nodes that differ in nothing else are equal.

    Args:
        weights: Names of the initializers that are not shared, even if they are equal.
    """

    def __init__(self, weights: Collection[str]) -> None:
        super().__init__()
        self.weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the pass to the main graph."""
        kept: dict[tuple[object, ...], ir.Value] = {}
        shared = False
        for name, value in list(model.graph.initializers.items()):
            tensor = value.const_value
            if name in self.weights or tensor is None or value.is_graph_output():
                continue
            key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
            if kept.setdefault(key, value) is not value:
                ir.convenience.replace_all_uses_with(value, kept[key])
                del model.graph.initializers[name]
                shared = True
        return ir.passes.PassResult(model, modified=shared)


class AssignPrecision(ir.passes.InPlacePass):
    """Give every node the precision it computes in, with casts where two precisions meet.

    Graph inputs and outputs stay float32, whatever is in between. External initializers keep the
    type they are stored in and are cast where they are used; small inline ones are converted. A
    value that is used in another precision several times is cast once. Nodes without floating
    inputs (a constant shape) and casts stay as they are.

    Args:
        precision: Precision of each node, float32 or float16.
    """

    def __init__(self, precision: NodePrecision) -> None:
        super().__init__()
        self.precision = precision

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the pass to the main graph."""
        graph = model.graph
        casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        for node in list(graph):
            if node.op_type != "Cast":
                self._give(graph, node, casts)
        for index, output in enumerate(graph.outputs):
            if output.dtype == ir.DataType.FLOAT16:
                graph.outputs[index] = _as_output(graph, output)
        return ir.passes.PassResult(model, modified=True)

    def _give(
        self,
        graph: ir.Graph,
        node: ir.Node,
        casts: dict[tuple[ir.Value, ir.DataType], ir.Value],
    ) -> None:
        """Cast the floating inputs of `node` to its precision, and give its outputs that type."""
        precision = self.precision(node)
        prescribed = _PRESCRIBED.get(node.op_type, frozenset())
        computes = False
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in _FLOATS:
                continue
            wanted = ir.DataType.FLOAT if index in prescribed else precision
            computes |= index not in prescribed
            if value.dtype != wanted:
                if (value, wanted) not in casts:
                    casts[value, wanted] = _cast(graph, node, value, wanted)
                node.replace_input_with(index, casts[value, wanted])
        for output in node.outputs:
            if computes and output.dtype in _FLOATS:
                output.dtype = precision


def name_dynamic_axes(model: ir.Model, names: Mapping[str, tuple[str, ...]]) -> None:
    """Name the dynamic axes of the graph's inputs and outputs as the component table does.

    Args:
        model: The model; changed in place.
        names: Axis names by input or output name. Fixed axes keep their length.
    """
    for value in [*model.graph.inputs, *model.graph.outputs]:
        assert value.shape is not None  # the exporter gives both
        assert value.name is not None
        axes = zip(value.shape, names[value.name], strict=True)
        value.shape = ir.Shape([dim if isinstance(dim, int) else name for dim, name in axes])


def _layout(node: ir.Node, weight: ir.Value) -> tuple[str, tuple[int, ...]] | None:
    """Return how a node changes the layout of a weight, or None if it does anything else."""
    output = node.outputs[0]
    if node.domain or node.inputs[0] is not weight or output.is_graph_output():
        return None
    if node.op_type == "Transpose" and "perm" in node.attributes:
        return "Transpose", tuple(node.attributes["perm"].as_ints())
    if node.op_type == "Unsqueeze":
        assert node.inputs[1] is not None  # the operator demands its axes
        axes = ir.convenience.get_const_tensor(node.inputs[1])
        return None if axes is None else ("Unsqueeze", tuple(axes.numpy().tolist()))
    return None


def _cast(graph: ir.Graph, user: ir.Node, value: ir.Value, wanted: ir.DataType) -> ir.Value:
    inline = value.const_value
    name = f"{value.name}.{wanted.name.lower()}"
    if inline is not None and not isinstance(inline, ir.ExternalTensor):
        converted = ir.Value(
            name=name,
            shape=value.shape,
            type=ir.TensorType(wanted),
            const_value=ir.tensor(_converted(inline.numpy(), wanted), name=name),
        )
        graph.register_initializer(converted)
        return converted
    cast = ir.node("Cast", [value], {"to": wanted}, name=f"cast.{name}")
    graph.insert_before(user, cast)
    return _typed(cast.outputs[0], value, name, wanted)


def _converted(array: npt.NDArray[np.floating], wanted: ir.DataType) -> npt.NDArray[np.floating]:
    """Convert a constant. What is finite stays so: a mask of -3e38 becomes fp16's lowest number."""
    if wanted == ir.DataType.FLOAT:
        return array.astype(np.float32)
    limit = np.finfo(np.float16).max
    return np.where(np.isfinite(array), array.clip(-limit, limit), array).astype(np.float16)


def _as_output(graph: ir.Graph, value: ir.Value) -> ir.Value:
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"cast.{value.name}")
    graph.append(cast)
    name, value.name = value.name, f"{value.name}.float16"
    assert name is not None  # outputs are named by the exporter
    return _typed(cast.outputs[0], value, name, ir.DataType.FLOAT)


def _typed(result: ir.Value, source: ir.Value, name: str, dtype: ir.DataType) -> ir.Value:
    result.name, result.shape, result.dtype = name, source.shape, dtype
    return result
