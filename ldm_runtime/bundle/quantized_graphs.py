"""ONNX graphs in which convolutions and matrix products are computed in 8 bits.

A quantised graph has the weights file of the graph that it is made of. Before each of its layers,
what goes in and the weight are quantised and dequantised again, at scales that the graph holds; a
runtime makes of that pattern products of 8-bit integers, and quantises weights when it compiles:
OpenVINO in both kinds of layers, ONNX Runtime in matrix products alone.

Activations are unsigned, with one scale and zero point per tensor. Weights are signed and
symmetric, with one scale per output channel.

Sources: Jacob et al. 2018 (arXiv:1712.05877), equation 1; the operators QuantizeLinear and
DequantizeLinear of ONNX.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ldm_runtime.bundle.graph_weights import StoredWeight, stored_weights
from ldm_runtime.bundle.onnx_messages import (
    GRAPH_NODE,
    NODE_INPUT,
    NODE_NAME,
    NODE_OPERATOR,
    NODE_OUTPUT,
    graph_of,
    inside,
    read_graph,
    read_once,
    texts,
)
from ldm_runtime.bundle.onnx_writing import (
    new_node,
    new_output,
    new_tensor,
    raw_fields,
    with_graph,
)
from ldm_runtime.bundle.protocol_buffer import BYTES, Field, encoded

#: Name of a component's graph in 8 bits, and of one that is only tried.
GRAPH_FILE = "model.int8.onnx"
CANDIDATE_FILE = "model.int8.candidate.onnx"
INT8_FILES = frozenset({GRAPH_FILE, CANDIDATE_FILE})

#: Layers that are computed in 8 bits, with the axis of the weight's output channels.
_CHANNEL_AXES: Mapping[str, int] = MappingProxyType({"Conv": 0, "MatMul": 1})
_MATRIX, _KERNEL = 2, 4  # axes of weights
_LARGEST_WEIGHT, _LEVELS = 127, 255
_TINY = np.finfo(np.float32).tiny  # the scale of a tensor of zeros

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution or a matrix product of a graph, with a weight of the weights file.

    Attributes:
        weight: Name of the weight.
        activation: Name of the tensor that goes in.
        operator: "Conv" or "MatMul".
    """

    weight: str
    activation: str
    operator: str


@dataclass(frozen=True, kw_only=True)
class Range:
    """The smallest and the largest number of a tensor; 0 lies between them."""

    minimum: float
    maximum: float

    def joined(self, other: "Range") -> "Range":
        """Return the range of the numbers of both."""
        return Range(
            minimum=min(self.minimum, other.minimum), maximum=max(self.maximum, other.maximum)
        )

    @property
    def scale(self) -> float:
        """Distance of neighbouring levels of 8 bits."""
        return max((self.maximum - self.minimum) / _LEVELS, float(_TINY))

    @property
    def zero_point(self) -> int:
        """The level of 0."""
        return round(-self.minimum / self.scale)


def layers_of(path: Path) -> tuple[Layer, ...]:
    """Return the layers of a graph that can be computed in 8 bits, in the order of computation.

    They are convolutions over pixels and linear layers over tokens whose weight nothing else uses.
    Repeated calls on an unchanged file are free.

    Raises:
        BundleError: The file is not an ONNX graph.
    """
    stored = stored_weights(path)
    ranks = {"Conv": _KERNEL, "MatMul": _MATRIX}
    return tuple(
        layer
        for layer in _read(path)
        if layer.weight in stored and len(stored[layer.weight].shape) == ranks[layer.operator]
    )


def with_ranges(path: Path, layers: Sequence[Layer]) -> bytes:
    """Return a graph with outputs more: smallest and largest number that goes into every layer.

    Args:
        path: The graph.
        layers: Layers of it.

    Raises:
        BundleError: The file is not an ONNX graph.
    """
    names = dict.fromkeys(layer.activation for layer in layers)

    def changed(data: bytes, graph: Field) -> Iterator[bytes]:
        yield data[graph.start : graph.end]
        for name in names:
            for operator, output in zip(
                ("ReduceMin", "ReduceMax"), range_outputs(name), strict=True
            ):
                yield new_node(operator, (name,), output, {"keepdims": 0})
                yield new_output(output, ())

    return read_graph(path, lambda data: with_graph(data, changed))


def range_outputs(activation: str) -> tuple[str, str]:
    """Return the names of the outputs with the smallest and the largest number of a tensor."""
    return f"{activation}.minimum", f"{activation}.maximum"


def with_errors(path: Path, weights: Path, ranges: Mapping[Layer, Range]) -> bytes:
    """Return a graph with outputs more: what 8 bits cost each layer alone.

    Each layer is computed once more in 8 bits, from what goes into it in the graph. Outputs are the
    mean square of the difference and that of the layer's own result, `error_outputs`.

    Args:
        path: The graph.
        weights: Its weights file.
        ranges: Layers of it, with the ranges of what goes in.

    Raises:
        BundleError: The file is not an ONNX graph.
    """
    scales = _weight_scales(path, weights, ranges)

    def changed(data: bytes, graph: Field) -> Iterator[bytes]:
        quantizer = _Quantizer(ranges=ranges, scales=scales)
        for field, raw in raw_fields(data, graph):
            yield raw
            layer = quantizer.layer(data, field)
            if layer is not None:
                yield from quantizer.nodes(layer, _input_of(data, field, 1))
                (result,) = texts(data, field, NODE_OUTPUT)
                rounded = f"{result}.rounded"
                yield quantizer.replaced(data, field, layer, output=rounded)
                difference, loss, power = f"{result}.difference", *error_outputs(layer)
                yield new_node("Sub", (rounded, result), difference)
                for tensor, output in ((difference, loss), (result, power)):
                    yield new_node("Mul", (tensor, tensor), f"{output}.square")
                    yield new_node("ReduceMean", (f"{output}.square",), output, {"keepdims": 0})
                    yield new_output(output, ())

    return read_graph(path, lambda data: with_graph(data, changed))


def error_outputs(layer: Layer) -> tuple[str, str]:
    """Return the names of the outputs with the mean square of a layer's error and of its result."""
    return f"{layer.weight}.error", f"{layer.weight}.power"


def quantized_graph(path: Path, weights: Path, ranges: Mapping[Layer, Range]) -> bytes:
    """Return a graph of which some layers are computed in 8 bits.

    Args:
        path: The graph.
        weights: Its weights file.
        ranges: Layers of it, with the ranges of what goes in; numbers beyond saturate.

    Raises:
        BundleError: The file is not an ONNX graph.
    """
    scales = _weight_scales(path, weights, ranges)

    def changed(data: bytes, graph: Field) -> Iterator[bytes]:
        quantizer = _Quantizer(ranges=ranges, scales=scales)
        for field, raw in raw_fields(data, graph):
            layer = quantizer.layer(data, field)
            if layer is None:
                yield raw
            else:
                yield from quantizer.nodes(layer, _input_of(data, field, 1))
                yield quantizer.replaced(data, field, layer)

    return read_graph(path, lambda data: with_graph(data, changed))


class _Quantizer:
    """Nodes that quantise and dequantise what goes into the layers of one graph.

    Layers that take the same tensor share its nodes, at the range of all of them.
    """

    def __init__(
        self, *, ranges: Mapping[Layer, Range], scales: Mapping[str, Float32Array]
    ) -> None:
        self._layers = {(each.weight, each.activation): each for each in ranges}
        self._scales = scales
        self._ranges: dict[str, Range] = {}
        for layer, found in ranges.items():
            known = self._ranges.get(layer.activation, found)
            self._ranges[layer.activation] = known.joined(found)
        self._written: set[str] = set()
        self._sources: dict[str, str] = {}

    def layer(self, data: bytes, field: Field) -> Layer | None:
        """Return the layer that a field of the graph is, if it is one; called for every field."""
        if (field.number, field.kind) != (GRAPH_NODE, BYTES):
            return None
        (operator,) = texts(data, field, NODE_OPERATOR)
        inputs = list(texts(data, field, NODE_INPUT))
        if operator == "Cast":
            self._sources.update({each: inputs[0] for each in texts(data, field, NODE_OUTPUT)})
        if operator not in _CHANNEL_AXES:
            return None
        return self._layers.get((self._sources.get(inputs[1], inputs[1]), inputs[0]))

    def nodes(self, layer: Layer, weight: str) -> Iterator[bytes]:
        """Yield what must come before a layer.

        Args:
            layer: The layer.
            weight: Its weight as the layer takes it, after a conversion.
        """
        if layer.activation not in self._written:
            self._written.add(layer.activation)
            seen = self._ranges[layer.activation]
            scale, zero = np.float32(seen.scale), np.uint8(seen.zero_point)
            yield from _rounded(layer.activation, layer.activation, scale, zero, {})
        scales = self._scales[layer.weight]
        zeros = np.zeros(scales.shape, np.int8)
        axis = {"axis": _CHANNEL_AXES[layer.operator]}
        yield from _rounded(weight, layer.weight, scales, zeros, axis)

    def replaced(self, data: bytes, field: Field, layer: Layer, output: str | None = None) -> bytes:
        """Return a layer that takes what was quantised, with an output of another name if given."""
        inputs = list(texts(data, field, NODE_INPUT))
        inputs[:2] = (_dequantized(layer.activation), _dequantized(layer.weight))
        parts = [encoded(NODE_INPUT, each.encode()) for each in inputs]
        for part, raw in raw_fields(data, field):
            if part.number in (NODE_OUTPUT, NODE_NAME) and output is not None:
                parts.append(encoded(part.number, output.encode()))
            elif part.number != NODE_INPUT:
                parts.append(raw)
        return encoded(GRAPH_NODE, b"".join(parts))


def _rounded(
    source: str,
    name: str,
    scale: npt.NDArray[np.float32] | np.float32,
    zero: npt.NDArray[np.integer] | np.integer,
    axis: Mapping[str, int],
) -> Iterator[bytes]:
    """Yield the nodes that quantise and dequantise a tensor, and their constants."""
    constants = f"{name}.scale", f"{name}.zero_point"
    for constant, values in zip(constants, (scale, zero), strict=True):
        yield new_tensor(constant, np.asarray(values))
    yield new_node("QuantizeLinear", (source, *constants), f"{name}.quantized", axis)
    inputs = f"{name}.quantized", *constants
    yield new_node("DequantizeLinear", inputs, _dequantized(name), axis)


def _dequantized(name: str) -> str:
    return f"{name}.dequantized"


def _input_of(data: bytes, node: Field, index: int) -> str:
    return list(texts(data, node, NODE_INPUT))[index]


def _weight_scales(
    path: Path, weights: Path, layers: Mapping[Layer, Range]
) -> dict[str, Float32Array]:
    """Return the scales of every output channel (channels,), by the names of weights."""
    stored = stored_weights(path)
    return {each.weight: _channel_scales(stored[each.weight], weights, each) for each in layers}


def _channel_scales(stored: StoredWeight, weights: Path, layer: Layer) -> Float32Array:
    values = np.memmap(
        weights, dtype=stored.dtype, mode="r", offset=stored.offset, shape=stored.shape
    )
    channels = _CHANNEL_AXES[layer.operator]
    others = tuple(axis for axis in range(values.ndim) if axis != channels)
    largest = np.maximum(values.max(axis=others), -values.min(axis=others)).astype(np.float32)
    scales: Float32Array = np.maximum(largest / _LARGEST_WEIGHT, _TINY)
    return scales


def _layers(data: bytes) -> tuple[Layer, ...]:
    """Return all nodes with operators of layers whose weight no other node takes."""
    found: dict[str, list[Layer]] = {}
    sources: dict[str, str] = {}
    for each in inside(data, graph_of(data), GRAPH_NODE):
        (operator,) = texts(data, each, NODE_OPERATOR)
        inputs = list(texts(data, each, NODE_INPUT))
        if operator == "Cast":
            sources.update({output: inputs[0] for output in texts(data, each, NODE_OUTPUT)})
        if operator in _CHANNEL_AXES:
            weight = sources.get(inputs[1], inputs[1])
            layer = Layer(weight=weight, activation=inputs[0], operator=operator)
            found.setdefault(weight, []).append(layer)
    return tuple(layer for layer, *others in found.values() if not others)


_read: Callable[[Path], tuple[Layer, ...]] = read_once(_layers)
