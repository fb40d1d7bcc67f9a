"""Parts of ONNX graphs as bytes, and graphs with parts in the place of others.

A graph is a list of fields, most of which are copied as they are; no package is needed for that.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_runtime.bundle.onnx_messages import (
    ATTRIBUTE_INTEGER,
    ATTRIBUTE_NAME,
    ATTRIBUTE_TYPE,
    DIMENSION_LENGTH,
    DIMENSION_NAME,
    GRAPH_INITIALIZER,
    GRAPH_INPUT,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    MODEL_GRAPH,
    NODE_ATTRIBUTE,
    NODE_INPUT,
    NODE_NAME,
    NODE_OPERATOR,
    NODE_OUTPUT,
    SHAPE_DIMENSION,
    TENSOR_DIMS,
    TENSOR_NAME,
    TENSOR_RAW,
    TENSOR_TYPE,
    TENSOR_TYPE_ELEMENT,
    TENSOR_TYPE_SHAPE,
    TYPE_TENSOR,
    VALUE_NAME,
    VALUE_TYPE,
)
from ldm_runtime.bundle.protocol_buffer import BYTES, Field, encoded, fields

#: Numbers of element types.
_TYPES: Mapping[np.dtype[Any], int] = MappingProxyType(
    {
        np.dtype(np.float32): 1,
        np.dtype(np.uint8): 2,
        np.dtype(np.int8): 3,
        np.dtype(np.int64): 7,
    }
)
_INTEGER_ATTRIBUTE = 2  # a value of ATTRIBUTE_TYPE


def with_graph(data: bytes, change: Callable[[bytes, Field], Iterator[bytes]]) -> bytes:
    """Return a model whose graph has other fields.

    Args:
        data: The model.
        change: Given the model and where its graph is, yields the fields of the new graph.
    """
    parts, end = [], 0
    for field in fields(data, 0, len(data)):
        is_graph = (field.number, field.kind) == (MODEL_GRAPH, BYTES)
        changed = b"".join(change(data, field)) if is_graph else b""
        parts.append(encoded(MODEL_GRAPH, changed) if is_graph else data[end : field.end])
        end = field.end
    return b"".join(parts)


def raw_fields(data: bytes, message: Field) -> Iterator[tuple[Field, bytes]]:
    """Yield every field of a message with all its bytes, tag and length included."""
    end = message.start
    for field in fields(data, message.start, message.end):
        yield field, data[end : field.end]
        end = field.end


def new_node(
    operator: str,
    inputs: Sequence[str],
    output: str,
    attributes: Mapping[str, int] = MappingProxyType({}),
) -> bytes:
    """Return a field of a graph: a node that is called after its output."""
    parts = [encoded(NODE_INPUT, each.encode()) for each in inputs]
    parts += [encoded(NODE_OUTPUT, output.encode()), encoded(NODE_NAME, f"{output}/node".encode())]
    parts += [encoded(NODE_OPERATOR, operator.encode())]
    for name, value in attributes.items():
        attribute = encoded(ATTRIBUTE_NAME, name.encode()) + encoded(ATTRIBUTE_INTEGER, value)
        attribute += encoded(ATTRIBUTE_TYPE, _INTEGER_ATTRIBUTE)
        parts.append(encoded(NODE_ATTRIBUTE, attribute))
    return encoded(GRAPH_NODE, b"".join(parts))


def new_tensor(name: str, values: npt.NDArray[Any]) -> bytes:
    """Return a field of a graph: a constant, of float32, uint8, int8 or int64."""
    little = values.astype(values.dtype.newbyteorder("<"))
    parts = [encoded(TENSOR_DIMS, each) for each in values.shape]
    parts += [encoded(TENSOR_TYPE, _TYPES[values.dtype]), encoded(TENSOR_NAME, name.encode())]
    return encoded(GRAPH_INITIALIZER, b"".join([*parts, encoded(TENSOR_RAW, little.tobytes())]))


def new_input(name: str, axes: Sequence[str | int]) -> bytes:
    """Return a field of a graph: an input of float32, by names or lengths of its axes."""
    return encoded(GRAPH_INPUT, _value(name, axes))


def new_output(name: str, axes: Sequence[str | int]) -> bytes:
    """Return a field of a graph: an output of float32, likewise."""
    return encoded(GRAPH_OUTPUT, _value(name, axes))


def _value(name: str, axes: Sequence[str | int]) -> bytes:
    dimensions = [
        encoded(DIMENSION_NAME, each.encode())
        if isinstance(each, str)
        else encoded(DIMENSION_LENGTH, each)
        for each in axes
    ]
    whole = b"".join(encoded(SHAPE_DIMENSION, each) for each in dimensions)
    element = encoded(TENSOR_TYPE_ELEMENT, _TYPES[np.dtype(np.float32)])
    kind = encoded(TYPE_TENSOR, element + encoded(TENSOR_TYPE_SHAPE, whole))
    return encoded(VALUE_NAME, name.encode()) + encoded(VALUE_TYPE, kind)
