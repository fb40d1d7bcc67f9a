"""The weights of an ONNX graph as its component's weight file stores them.

They keep the names of the network's parameters, in the layout in which the graph uses them. Which
layout that is, only the nodes tell: a square matrix looks the same transposed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ldm_runtime.bundle.onnx_messages import (
    GRAPH_INITIALIZER,
    GRAPH_NODE,
    NODE_INPUT,
    NODE_OPERATOR,
    NODE_OUTPUT,
    TENSOR_DIMS,
    TENSOR_EXTERNAL,
    TENSOR_NAME,
    TENSOR_TYPE,
    graph_of,
    inside,
    integers,
    is_set,
    read_once,
    texts,
)
from ldm_runtime.bundle.protocol_buffer import Field

Array = npt.NDArray[np.floating]

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
    return _read(path)


def _stored_weights(data: bytes) -> dict[str, StoredWeight]:
    graph = graph_of(data)
    transposed = _transposed(data, graph)
    return {
        name: StoredWeight(
            shape=shape, dtype=_DTYPES[kind], offset=offset, is_transposed=name in transposed
        )
        for name, shape, kind, offset in _external_tensors(data, graph)
    }


_read: Callable[[Path], Mapping[str, StoredWeight]] = read_once(
    lambda data: MappingProxyType(_stored_weights(data))
)


def _external_tensors(data: bytes, graph: Field) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Yield name, shape, type and offset of every initializer that lies in another file."""
    for tensor in inside(data, graph, GRAPH_INITIALIZER):
        entries = dict(_entry(data, each) for each in inside(data, tensor, TENSOR_EXTERNAL))
        if entries:
            (name,) = texts(data, tensor, TENSOR_NAME)
            (kind,) = integers(data, tensor, TENSOR_TYPE)
            shape = tuple(integers(data, tensor, TENSOR_DIMS))
            yield name, shape, kind, int(entries.get("offset", "0"))


def _transposed(data: bytes, graph: Field) -> set[str]:
    """Return the matrices that are multiplied from the right, as they are."""
    found, sources = set(), dict[str, str]()
    for node in inside(data, graph, GRAPH_NODE):
        inputs = list(texts(data, node, NODE_INPUT))
        (operator,) = texts(data, node, NODE_OPERATOR)
        if operator == "Cast":
            sources.update({output: inputs[0] for output in texts(data, node, NODE_OUTPUT)})
        if operator == "MatMul" or (operator == "Gemm" and not is_set(data, node, "transB")):
            found.add(sources.get(inputs[1], inputs[1]))
    return found


def _entry(data: bytes, entry: Field) -> tuple[str, str]:
    (key,), (value,) = texts(data, entry, _ENTRY_KEY), texts(data, entry, _ENTRY_VALUE)
    return key, value
