"""Small ONNX graphs, written without the onnx package, for the tiny bundle of `testing`.

ONNX files are protocol buffers, of which this writes the few messages that a graph needs. Field
numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ldm_runtime.specs.components import TensorSignature

_IR_VERSION, _OPSET = 8, 17
_ELEMENT_TYPES = {"float32": 1, "int64": 7}
_INT, _STRING, _INTS = 2, 3, 7
_EXTERNAL = 1
#: Where tensors in a file of weights begin, so that they can be memory-mapped.
ALIGNMENT = 4096

Attribute = int | str | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator of a graph."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


def pack_weights(
    weights: Mapping[str, npt.NDArray[np.float32]],
) -> tuple[bytes, dict[str, int]]:
    """Return the bytes of a file of weights, and the offset of each in it."""
    data, offsets = bytearray(), {}
    for name, array in weights.items():
        data += bytes(-len(data) % ALIGNMENT)
        offsets[name] = len(data)
        data += array.tobytes()
    return bytes(data), offsets


def encode_model(
    nodes: Sequence[Node],
    inputs: Sequence[TensorSignature],
    outputs: Sequence[TensorSignature],
    weights: Mapping[str, npt.NDArray[np.float32]],
    axes: Mapping[str, tuple[int, ...]],
) -> bytes:
    """Return the bytes of a model whose weights lie in `weights.bin` next to it.

    Args:
        nodes: The operators, in an order in which they can run.
        inputs: Its inputs; every axis is left free.
        outputs: Its outputs, likewise.
        weights: Names and values, in the order of `pack_weights`.
        axes: Names and values of constant lists of axes, stored in the model itself.
    """
    _, offsets = pack_weights(weights)
    graph = b"".join(
        (
            *(_field(1, _node(node)) for node in nodes),
            _field(2, "graph"),
            *(_field(5, _external(name, weights[name], at)) for name, at in offsets.items()),
            *(_field(5, _inline(name, value)) for name, value in axes.items()),
            *(_field(11, _value_info(signature)) for signature in inputs),
            *(_field(12, _value_info(signature)) for signature in outputs),
        )
    )
    return _field(1, _IR_VERSION) + _field(7, graph) + _field(8, _field(1, "") + _field(2, _OPSET))


def _node(node: Node) -> bytes:
    return b"".join(
        (
            *(_field(1, name) for name in node.inputs),
            _field(2, node.output),
            _field(4, node.op),
            *(_field(5, _attribute(name, value)) for name, value in node.attributes.items()),
        )
    )


def _attribute(name: str, value: Attribute) -> bytes:
    match value:
        case int():
            return _field(1, name) + _field(3, value) + _field(20, _INT)
        case str():
            return _field(1, name) + _field(4, value) + _field(20, _STRING)
        case _:
            values = b"".join(_field(8, each) for each in value)
            return _field(1, name) + values + _field(20, _INTS)


def _external(name: str, array: npt.NDArray[np.float32], offset: int) -> bytes:
    entries = {"location": "weights.bin", "offset": str(offset), "length": str(array.nbytes)}
    return b"".join(
        (
            *(_field(1, length) for length in array.shape),
            _field(2, _ELEMENT_TYPES["float32"]),
            _field(8, name),
            *(_field(13, _field(1, key) + _field(2, text)) for key, text in entries.items()),
            _field(14, _EXTERNAL),
        )
    )


def _inline(name: str, axes: tuple[int, ...]) -> bytes:
    data = np.array(axes, dtype="<i8").tobytes()
    return (
        _field(1, len(axes))
        + _field(2, _ELEMENT_TYPES["int64"])
        + _field(8, name)
        + _field(9, data)
    )


def _value_info(signature: TensorSignature) -> bytes:
    shape = b"".join(_field(1, _field(2, axis)) for axis in signature.axes)
    tensor = _field(1, _ELEMENT_TYPES[signature.dtype]) + _field(2, shape)
    return _field(1, signature.name) + _field(2, _field(1, tensor))


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*digits, value))
