"""Graph rewrites between torch's exporter and the files of a bundle, in the order they run."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ldm_export.precision import NodePrecision

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})

#: Inputs whose type an operator prescribes, whatever it computes in.
_PRESCRIBED: Mapping[str, frozenset[int]] = {"Resize": frozenset({1, 2, 3})}


class AssignPrecision(ir.passes.InPlacePass):
    """Give every node the precision it computes in, with casts where two precisions meet.

    Graph inputs and outputs stay float32, whatever is in between. External initializers keep the
    type they are stored in and are cast where they are used; small inline ones are converted. A
    value that is used in another precision several times is cast once. Nodes without floating
    inputs (a constant shape, a cast of integers) stay as they are.

    Args:
        precision: What each node computes in, float32 or float16.
    """

    def __init__(self, precision: NodePrecision) -> None:
        super().__init__()
        self.precision = precision

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the pass to the main graph."""
        graph = model.graph
        casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        for node in list(graph):
            wanted = self._give(graph, node, casts)
            for output in node.outputs:
                if wanted is not None and output.dtype in _FLOATS:
                    output.dtype = wanted
        for index, output in enumerate(graph.outputs):
            if output.dtype == ir.DataType.FLOAT16:
                graph.outputs[index] = _as_output(graph, output)
        return ir.passes.PassResult(model, modified=True)

    def _give(
        self,
        graph: ir.Graph,
        node: ir.Node,
        casts: dict[tuple[ir.Value, ir.DataType], ir.Value],
    ) -> ir.DataType | None:
        """Cast the inputs of `node` to what it computes in; return that, or None if it does not."""
        wanted = self.precision(node)
        prescribed = _PRESCRIBED.get(node.op_type, frozenset())
        floating = [
            (index, value)
            for index, value in enumerate(node.inputs)
            if value is not None and value.dtype in _FLOATS and index not in prescribed
        ]
        for index, value in floating:
            if value.dtype != wanted:
                if (value, wanted) not in casts:
                    casts[value, wanted] = _cast(graph, node, value, wanted)
                node.replace_input_with(index, casts[value, wanted])
        return wanted if floating and node.op_type != "Cast" else None


def name_dynamic_axes(model: ir.Model, names: Mapping[str, tuple[str, ...]]) -> None:
    """Name the dynamic axes of the graph's inputs and outputs as the component table does.

    Args:
        model: The model; changed in place.
        names: Axis names by input or output name. Fixed axes keep their length.
    """
    for value in [*model.graph.inputs, *model.graph.outputs]:
        assert value.shape is not None and value.name is not None  # the exporter gives both
        axes = zip(value.shape, names[value.name], strict=True)
        value.shape = ir.Shape([dim if isinstance(dim, int) else name for dim, name in axes])


def _cast(graph: ir.Graph, user: ir.Node, value: ir.Value, wanted: ir.DataType) -> ir.Value:
    inline = value.const_value
    name = f"{value.name}.{wanted.name.lower()}"
    if inline is not None and not isinstance(inline, ir.ExternalTensor):
        converted = ir.Value(
            name=name,
            shape=value.shape,
            type=ir.TensorType(wanted),
            const_value=ir.tensor(_converted(inline.numpy(), wanted)),
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
