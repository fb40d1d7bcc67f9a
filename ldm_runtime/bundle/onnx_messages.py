"""The messages of ONNX graphs: which field of which message is where.

Source: onnx/onnx.proto of ONNX 1.20 for the numbers of fields.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from ldm_runtime.bundle.protocol_buffer import BYTES, VARINT, Field, fields, read_varint
from ldm_runtime.errors import BundleError

Result = TypeVar("Result")

MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_VALUE = 1, 5, 11, 12, 13
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OPERATOR, NODE_ATTRIBUTE = 1, 2, 3, 4, 5
ATTRIBUTE_NAME, ATTRIBUTE_INTEGER, ATTRIBUTE_INTEGERS, ATTRIBUTE_TYPE = 1, 3, 8, 20
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_RAW, TENSOR_EXTERNAL = 1, 2, 8, 9, 13
VALUE_NAME, VALUE_TYPE = 1, 2
TYPE_TENSOR = 1
TENSOR_TYPE_ELEMENT, TENSOR_TYPE_SHAPE = 1, 2
SHAPE_DIMENSION = 1
DIMENSION_LENGTH, DIMENSION_NAME = 1, 2


def graph_of(data: bytes) -> Field:
    """Return the graph of a model.

    Raises:
        ValueError: There is none, or there are several.
    """
    (graph,) = inside(data, Field(0, BYTES, 0, len(data)), MODEL_GRAPH)
    return graph


def read_graph(path: Path, read: Callable[[bytes], Result]) -> Result:
    """Return what a function reads out of the file of a graph.

    Raises:
        BundleError: The file is not an ONNX graph.
    """
    data = path.read_bytes()
    try:
        return read(data)
    except (ValueError, KeyError) as error:
        raise BundleError(
            f"{path} is not an ONNX graph: {error}; export the bundle again"
        ) from None


def read_once(read: Callable[[bytes], Result]) -> Callable[[Path], Result]:
    """Return a function of a graph's path; repeated calls on an unchanged file are free.

    The function raises what `read_graph` raises.
    """

    @lru_cache(maxsize=16)
    def kept(path: Path, size: int, modified: int, inode: int) -> Result:
        return read_graph(path, read)

    def of_path(path: Path) -> Result:
        status = path.stat()
        return kept(path, status.st_size, status.st_mtime_ns, status.st_ino)

    return of_path


def inside(data: bytes, message: Field, number: int) -> Iterator[Field]:
    """Yield the fields of that number of a message which have a length."""
    for field in fields(data, message.start, message.end):
        if field.number == number and field.kind == BYTES:
            yield field


def texts(data: bytes, message: Field, number: int) -> Iterator[str]:
    """Yield the texts of a field."""
    for field in inside(data, message, number):
        yield data[field.start : field.end].decode()


def integers(data: bytes, message: Field, number: int) -> Iterator[int]:
    """Yield the integers of a field, of which each is one or all are packed into one."""
    for field in fields(data, message.start, message.end):
        position = field.start
        while field.number == number and field.kind in (VARINT, BYTES) and position < field.end:
            value, position = read_varint(data, position)
            yield value


def is_set(data: bytes, node: Field, name: str) -> bool:
    """Return whether a node has an attribute of that name that is 1."""
    return any(
        list(texts(data, attribute, ATTRIBUTE_NAME)) == [name]
        and list(integers(data, attribute, ATTRIBUTE_INTEGER)) == [1]
        for attribute in inside(data, node, NODE_ATTRIBUTE)
    )
