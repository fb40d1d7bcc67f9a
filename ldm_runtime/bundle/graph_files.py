"""The files that an ONNX graph names, which must be the weights that its manifest lists.

A graph can leave any tensor in a file next to it, and a runtime opens that file without asking. So
the names are read from the graph before it is loaded, by a walk over its protocol buffer: of all
messages only those that can lead to a tensor are entered.

Source: onnx/onnx.proto of ONNX 1.20 for the numbers of fields.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from ldm_runtime.bundle.protocol_buffer import BYTES, fields
from ldm_runtime.errors import BundleError

_MAX_DEPTH = 64  # of messages in each other; a graph in an attribute is three more
_LOCATION = b"location"
#: Messages in the fields of each message, as far as they lead to tensors.
_FIELDS: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "Model": {7: "Graph", 20: "Training", 25: "Function"},
        "Training": {1: "Graph", 2: "Graph"},
        "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
        "Function": {7: "Node", 11: "Attribute"},
        "Node": {5: "Attribute"},
        "Attribute": {
            **{5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph"},
            **{22: "SparseTensor", 23: "SparseTensor"},
        },
        "SparseTensor": {1: "Tensor", 2: "Tensor"},
        "Tensor": {13: "Entry"},
    }
)
_KEY, _VALUE = 1, 2  # fields of an entry of external data


def check_graph_files(bundle: Path, graph: str, weights_file: str) -> None:
    """Check that a graph of a bundle names no file but its weights.

    Args:
        bundle: The bundle's folder.
        graph: Path of the graph inside it.
        weights_file: Path of the weights inside it.

    Raises:
        BundleError: It names another, or is not an ONNX graph.
    """
    path = bundle / graph
    try:
        names = external_files(path.read_bytes())
    except ValueError as error:
        raise BundleError(
            f"{path} is not an ONNX graph: {error}; export the bundle again"
        ) from None
    for name in sorted(names):
        if PurePosixPath(graph).parent / name != PurePosixPath(weights_file):
            raise BundleError(
                f"{path} names the file {name!r}, but the manifest says that its weights are in "
                f"{weights_file}; export the bundle again"
            )


def external_files(data: bytes) -> set[str]:
    """Return the names of all files in which an ONNX model keeps tensors.

    Raises:
        ValueError: The data is not a protocol buffer, or is nested too deeply.
    """
    names = set()
    waiting = [("Model", 0, len(data), 0)]
    while waiting:
        message, start, end, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"it nests more than {_MAX_DEPTH} deep")
        if message == "Entry":
            names |= _location(data, start, end)
            continue
        inner = _FIELDS[message]
        for number, first, last in _messages(data, start, end):
            if number in inner:
                waiting.append((inner[number], first, last, depth + 1))
    return names


def _location(data: bytes, start: int, end: int) -> set[str]:
    entry = {number: data[first:last] for number, first, last in _messages(data, start, end)}
    if entry.get(_KEY) != _LOCATION:
        return set()
    return {entry.get(_VALUE, b"").decode()}


def _messages(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, first byte and end of every field of a message that has a length."""
    for field in fields(data, start, end):
        if field.kind == BYTES:
            yield field.number, field.start, field.end
