"""Low-rank branches next to the weights of an ONNX graph, whose matrices are inputs.

Where a graph computes y = W x, it then computes y + up (down x): a LoRA that every sample of a
batch has for itself, and that changes from call to call. Zeros are none.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ldm_runtime.bundle.onnx_messages import (
    ATTRIBUTE_INTEGER,
    ATTRIBUTE_INTEGERS,
    ATTRIBUTE_NAME,
    GRAPH_INITIALIZER,
    GRAPH_INPUT,
    GRAPH_NODE,
    GRAPH_VALUE,
    NODE_ATTRIBUTE,
    NODE_INPUT,
    NODE_OPERATOR,
    NODE_OUTPUT,
    SHAPE_DIMENSION,
    TENSOR_DIMS,
    TENSOR_NAME,
    TENSOR_TYPE_SHAPE,
    TYPE_TENSOR,
    VALUE_NAME,
    VALUE_TYPE,
    graph_of,
    inside,
    integers,
    read_graph,
    read_once,
    texts,
)
from ldm_runtime.bundle.onnx_writing import new_input, new_node, new_tensor, raw_fields, with_graph
from ldm_runtime.bundle.protocol_buffer import BYTES, Field, encoded
from ldm_runtime.specs.components import TensorSignature

#: Rank of the inputs of linear layers that a branch can be next to: (batch, tokens, channels).
_LINEAR_AXES = 3
#: Name of the shape (batch, channels, pixels) in a graph with branches.
_FLAT = "low_rank.flat"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A weight that a branch can be next to: it takes part in one node.

    Attributes:
        inputs: Channels that go in.
        outputs: Channels that come out.
        is_convolution: Whether it is of a convolution of single pixels, (batch, channels, height,
            width), and not of a linear layer, (batch, tokens, channels).
    """

    inputs: int
    outputs: int
    is_convolution: bool


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A branch next to a weight.

    Attributes:
        weight: The weight's name in the graph.
        place: The place of the weight.
        rank: Its rank, more than which the inputs cannot have.
    """

    weight: str
    place: Place
    rank: int

    @property
    def down(self) -> str:
        """Name of the input with the matrix that is applied first."""
        return f"{self.weight}.down"

    @property
    def up(self) -> str:
        """Name of the input with the other one."""
        return f"{self.weight}.up"

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Shape of both matrices of one sample, by the names of their inputs.

        A matrix of a convolution is applied from the left, one of a linear layer from the right.
        """
        down, up = (self.place.inputs, self.rank), (self.rank, self.place.outputs)
        if self.place.is_convolution:
            down, up = down[::-1], up[::-1]
        return {self.down: down, self.up: up}

    @property
    def signatures(self) -> tuple[TensorSignature, ...]:
        """Its inputs, whose axes are called after them."""
        return tuple(
            TensorSignature(
                name=name, dtype="float32", axes=("batch", f"{name} rows", f"{name} columns")
            )
            for name in self.shapes
        )

    @property
    def lengths(self) -> Mapping[str, int]:
        """Lengths of the axes of its inputs, but for the batch."""
        return {
            f"{name} {axis}": length
            for name, shape in self.shapes.items()
            for axis, length in zip(("rows", "columns"), shape, strict=True)
        }


def places(path: Path) -> Mapping[str, Place]:
    """Return the weights of an ONNX graph that a branch can be next to, by name.

    Repeated calls on an unchanged file are free.

    Raises:
        BundleError: The file is not an ONNX graph.
    """
    return _read(path)


def with_branches(path: Path, branches: Sequence[Branch]) -> bytes:
    """Return an ONNX graph with branches, each next to the weight of one of its `places`.

    Raises:
        BundleError: The file is not an ONNX graph.
    """
    of_weight = {each.weight: each for each in branches}
    return read_graph(
        path,
        lambda data: with_graph(data, lambda model, graph: _changed_graph(model, graph, of_weight)),
    )


def _places(data: bytes) -> Iterator[tuple[str, Place]]:
    graph = graph_of(data)
    shapes = {
        name: tuple(integers(data, tensor, TENSOR_DIMS))
        for tensor in inside(data, graph, GRAPH_INITIALIZER)
        for name in texts(data, tensor, TENSOR_NAME)
    }
    nodes: dict[str, list[Field]] = {}
    for weight, node in _uses(data, graph):
        nodes.setdefault(weight, []).append(node)
    axes = dict(_axes(data, graph))
    for weight, (node, *others) in nodes.items():
        shape = shapes.get(weight, ())
        (operator,) = texts(data, node, NODE_OPERATOR)
        first = next(texts(data, node, NODE_INPUT))
        if others:
            continue
        if operator == "MatMul" and len(shape) == 2 and axes.get(first) == _LINEAR_AXES:
            yield weight, Place(inputs=shape[0], outputs=shape[1], is_convolution=False)
        if operator == "Conv" and shape[2:] == (1, 1) and _is_plain(data, node):
            yield weight, Place(inputs=shape[1], outputs=shape[0], is_convolution=True)


_read: Callable[[Path], Mapping[str, Place]] = read_once(
    lambda data: MappingProxyType(dict(_places(data)))
)


def _uses(data: bytes, graph: Field) -> Iterator[tuple[str, Field]]:
    """Yield the second inputs of all nodes, each before any cast, with the node."""
    sources: dict[str, str] = {}
    for node in inside(data, graph, GRAPH_NODE):
        names = list(texts(data, node, NODE_INPUT))
        if list(texts(data, node, NODE_OPERATOR)) == ["Cast"]:
            sources.update({output: names[0] for output in texts(data, node, NODE_OUTPUT)})
        elif len(names) > 1:
            yield sources.get(names[1], names[1]), node


def _axes(data: bytes, graph: Field) -> Iterator[tuple[str, int]]:
    """Yield the number of axes of every value that the graph says it of."""
    for number in (GRAPH_INPUT, GRAPH_VALUE):
        for value in inside(data, graph, number):
            for kind in inside(data, value, VALUE_TYPE):
                for tensor in inside(data, kind, TYPE_TENSOR):
                    for shape in inside(data, tensor, TENSOR_TYPE_SHAPE):
                        (name,) = texts(data, value, VALUE_NAME)
                        yield name, len(list(inside(data, shape, SHAPE_DIMENSION)))


def _is_plain(data: bytes, node: Field) -> bool:
    """Return whether a convolution of single pixels has one group, no padding and strides of 1."""
    plain = {"group": 1, "strides": 1, "dilations": 1, "kernel_shape": 1, "pads": 0}
    for attribute in inside(data, node, NODE_ATTRIBUTE):
        (name,) = texts(data, attribute, ATTRIBUTE_NAME)
        found = {
            *integers(data, attribute, ATTRIBUTE_INTEGER),
            *integers(data, attribute, ATTRIBUTE_INTEGERS),
        }
        if name in plain and found != {plain[name]}:
            return False
    return True


def _changed_graph(data: bytes, graph: Field, branches: Mapping[str, Branch]) -> Iterator[bytes]:
    """Yield the fields of a graph with branches."""
    weights = {node.start: weight for weight, node in _uses(data, graph) if weight in branches}
    for field, raw in raw_fields(data, graph):
        if (field.number, field.kind) == (GRAPH_NODE, BYTES) and field.start in weights:
            yield from _branched(data, field, branches[weights[field.start]])
        else:
            yield raw
    for branch in branches.values():
        for name, shape in branch.shapes.items():
            yield new_input(name, ("batch", *shape))
    if any(each.place.is_convolution for each in branches.values()):
        yield new_tensor(_FLAT, np.array([0, 0, -1]))


def _branched(data: bytes, user: Field, branch: Branch) -> Iterator[bytes]:
    """Yield a node and the nodes of a branch, whose sum has the name of the node's output."""
    seen = next(texts(data, user, NODE_INPUT))
    (result,) = texts(data, user, NODE_OUTPUT)
    plain, low, update = (f"{branch.weight}.{each}" for each in ("plain", "low", "update"))
    renamed = encoded(NODE_OUTPUT, plain.encode())
    parts = (
        renamed if field.number == NODE_OUTPUT else raw for field, raw in raw_fields(data, user)
    )
    yield encoded(GRAPH_NODE, b"".join(parts))
    if branch.place.is_convolution:
        flat, raised, shape = (f"{branch.weight}.{each}" for each in ("flat", "raised", "shape"))
        yield new_node("Reshape", (seen, _FLAT), flat)
        yield new_node("MatMul", (branch.down, flat), low)
        yield new_node("MatMul", (branch.up, low), raised)
        yield new_node("Shape", (plain,), shape)
        yield new_node("Reshape", (raised, shape), update)
    else:
        yield new_node("MatMul", (seen, branch.down), low)
        yield new_node("MatMul", (low, branch.up), update)
    yield new_node("Add", (plain, update), result)
