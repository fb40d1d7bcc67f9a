"""The weights of an ONNX graph as its component's weight file stores them.

They keep the names of the network's parameters, in the layout in which the graph uses them. Which
layout that is, only the nodes tell: a square matrix looks the same transposed.

Source: onnx/onnx.proto of ONNX 1.20 for the numbers of fields.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ldm_runtime.bundle.protocol_buffer import BYTES, VARINT, Field, fields, read_varint
from ldm_runtime.errors import BundleError

Array = npt.NDArray[np.floating]

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER = 1, 3
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 2, 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_DTYPES: Mapping[int, np.dtype[np.floating]] = MappingProxyType(
    {1: np.dtype("<f4"), 10: np.dtype("<f2")}
)


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A parameter of a network in a weight file.

    Attributes:
        shape: Its shape there.
        dtype: Its element type, float32 or float16.
        offset: Its first byte.
        is_transposed: Whether it is the transpose of the matrix (out, in) of a linear layer.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.floating]
    offset: int
    is_transposed: bool

    def read(self, file: Path) -> npt.NDArray[np.float32]:
        """Return the parameter as the network has it, in float32; a scale as (channels, 1, 1)."""
        array = np.memmap(file, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)
        return np.asarray(array.T if self.is_transposed else array, dtype=np.float32)

    def stored(self, parameter: npt.NDArray[np.float32]) -> Array:
        """Return a parameter, which the network has, as the file stores it.

        Raises:
            ValueError: Its numbers are beyond the range of the element type.
        """
        laid_out = parameter.T if self.is_transposed else parameter
        largest = float(np.abs(parameter).max(initial=0.0))
        if not largest <= float(np.finfo(self.dtype).max):
            raise ValueError(f"reaches {largest:.3g}, beyond the range of {self.dtype.name}")
        return np.ascontiguousarray(laid_out.reshape(self.shape), dtype=self.dtype)


def stored_weights(path: Path) -> Mapping[str, StoredWeight]:
    """Return the weights outside an ONNX graph by the names of the network's parameters.

    Repeated calls on an unchanged file are free.

    Raises:
        BundleError: The file is not an ONNX graph.
    """
    status = path.stat()
    return _stored_weights_of(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=16)
def _stored_weights_of(
    path: Path, size: int, modified: int, inode: int
) -> Mapping[str, StoredWeight]:
    data = path.read_bytes()
    try:
        return MappingProxyType(_stored_weights(data))
    except (ValueError, KeyError) as error:
        raise BundleError(
            f"{path} is not an ONNX graph: {error}; export the bundle again"
        ) from None


def _stored_weights(data: bytes) -> dict[str, StoredWeight]:
    (graph,) = _inside(data, Field(0, BYTES, 0, len(data)), _MODEL_GRAPH)
    transposed = _transposed(data, graph)
    return {
        name: StoredWeight(
            shape=shape, dtype=_DTYPES[kind], offset=offset, is_transposed=name in transposed
        )
        for name, shape, kind, offset in _external_tensors(data, graph)
    }


def _external_tensors(data: bytes, graph: Field) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Yield name, shape, type and offset of every initializer that lies in another file."""
    for tensor in _inside(data, graph, _GRAPH_INITIALIZER):
        entries = dict(_entry(data, each) for each in _inside(data, tensor, _TENSOR_EXTERNAL))
        if entries:
            (name,) = _texts(data, tensor, _TENSOR_NAME)
            (kind,) = _integers(data, tensor, _TENSOR_TYPE)
            shape = tuple(_integers(data, tensor, _TENSOR_DIMS))
            yield name, shape, kind, int(entries.get("offset", "0"))


def _transposed(data: bytes, graph: Field) -> set[str]:
    """Return the matrices that are multiplied from the right, as they are."""
    found, sources = set(), dict[str, str]()
    for node in _inside(data, graph, _GRAPH_NODE):
        inputs = list(_texts(data, node, _NODE_INPUT))
        (operator,) = _texts(data, node, _NODE_OPERATOR)
        if operator == "Cast":
            sources.update({output: inputs[0] for output in _texts(data, node, _NODE_OUTPUT)})
        if operator == "MatMul" or (operator == "Gemm" and not _is_set(data, node, "transB")):
            found.add(sources.get(inputs[1], inputs[1]))
    return found


def _is_set(data: bytes, node: Field, name: str) -> bool:
    return any(
        list(_texts(data, attribute, _ATTRIBUTE_NAME)) == [name]
        and list(_integers(data, attribute, _ATTRIBUTE_INTEGER)) == [1]
        for attribute in _inside(data, node, _NODE_ATTRIBUTE)
    )


def _entry(data: bytes, entry: Field) -> tuple[str, str]:
    (key,), (value,) = _texts(data, entry, _ENTRY_KEY), _texts(data, entry, _ENTRY_VALUE)
    return key, value


def _inside(data: bytes, message: Field, number: int) -> Iterator[Field]:
    """Yield the fields of that number of a message which have a length."""
    for field in fields(data, message.start, message.end):
        if field.number == number and field.kind == BYTES:
            yield field


def _texts(data: bytes, message: Field, number: int) -> Iterator[str]:
    for field in _inside(data, message, number):
        yield data[field.start : field.end].decode()


def _integers(data: bytes, message: Field, number: int) -> Iterator[int]:
    """Yield the integers of a field, of which each is one or all are packed into one."""
    for field in fields(data, message.start, message.end):
        position = field.start
        while field.number == number and field.kind in (VARINT, BYTES) and position < field.end:
            value, position = read_varint(data, position)
            yield value
