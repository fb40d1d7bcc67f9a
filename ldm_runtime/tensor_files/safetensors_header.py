"""Files in the safetensors format: a JSON header followed by one buffer of tensors.

Source: the format section of the safetensors README at version 0.6, whose rules are kept here in
full: no gaps, no overlaps, no duplicate keys, little-endian and contiguous. One bound is tighter:
the header may have 16 MiB, room for a hundred thousand tensors, instead of 100 MB.
"""

import json
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from ldm_runtime.tensor_files.errors import FormatError
from ldm_runtime.tensor_files.tensor_extent import (
    DTYPE_BYTES,
    MAX_DIMS,
    TensorExtent,
    check_inside,
    check_name,
    contiguous_stride,
    is_size,
)

# A header of many small values takes some 30 times its size in memory while it is decoded.
_MAX_HEADER_BYTES = 16 << 20
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_DAMAGED = "the file is damaged or incomplete, get it again"

_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "U16": "uint16",
        "I16": "int16",
        "F16": "float16",
        "BF16": "bfloat16",
        "U32": "uint32",
        "I32": "int32",
        "F32": "float32",
        "U64": "uint64",
        "I64": "int64",
        "F64": "float64",
        "C64": "complex64",
    }
)


def is_safetensors(head: bytes) -> bool:
    """Return whether a JSON object follows eight bytes of length, the last of which are 0."""
    return head[8:9] == b"{" and b"\0" in head[:8]


def read_safetensors_header(
    data: memoryview,
) -> tuple[Mapping[str, TensorExtent], Mapping[str, str]]:
    """Find the tensors of a safetensors file.

    Returns:
        The tensors by name, in the order of the file, and the file's own metadata. The metadata is
        untrusted text: escape it before showing it.

    Raises:
        FormatError: The header is not what the format demands or contradicts the file.
    """
    size = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if size > _MAX_HEADER_BYTES:
        raise FormatError(
            f"its header declares {size} bytes, more than the {_MAX_HEADER_BYTES} allowed"
        )
    if _LENGTH_BYTES + size > len(data):
        raise FormatError(f"its header declares {size} bytes of {len(data)}; {_DAMAGED}")
    header = _decode(bytes(data[_LENGTH_BYTES : _LENGTH_BYTES + size]))
    metadata = _checked_metadata(header.pop(_METADATA, {}))
    begin = _LENGTH_BYTES + size
    _check_end(header.values(), len(data) - begin)
    extents = {
        check_name(name): _extent_of(name, entry, begin, len(data))
        for name, entry in header.items()
    }
    if not extents:
        raise FormatError("holds no tensors")
    _check_order(extents, begin, len(data))
    return extents, metadata


def _decode(header: bytes) -> dict[str, object]:
    try:
        entries = json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its header is not the JSON it should be: {error}") from error
    if not isinstance(entries, dict):
        raise FormatError("its header is not a JSON object")
    return entries


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise FormatError("a key appears twice")
    return members


def _no_constant(name: str) -> object:
    raise FormatError(f"{name} is not valid JSON")


def _checked_metadata(metadata: object) -> Mapping[str, str]:
    if not isinstance(metadata, dict):
        raise FormatError(f"{_METADATA} is not a JSON object")
    for text in (*metadata, *metadata.values()):
        if not isinstance(text, str):
            raise FormatError(f"{_METADATA} holds something other than strings")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise FormatError(f"{_METADATA} holds half a character (a lone surrogate)")
    return MappingProxyType(metadata)


def _check_end(entries: Iterable[object], available: int) -> None:
    """Check that the file has the bytes that its header promises."""
    ends = (
        last
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list)
        for last in entry["data_offsets"][1:2]
        if is_size(last)
    )
    missing = max(ends, default=0) - available
    if missing > 0:
        lost = "1 byte" if missing == 1 else f"{missing} bytes"
        raise FormatError(f"ends {lost} early: it is incomplete; download it again")


def _extent_of(name: str, entry: object, begin: int, file_size: int) -> TensorExtent:
    try:
        return _checked_extent(entry, begin, file_size)
    except FormatError as error:
        raise FormatError(f"tensor {name!a}: {error}") from error


def _checked_extent(entry: object, begin: int, file_size: int) -> TensorExtent:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [first, last], **rest}:
            pass
        case _:
            raise FormatError("its entry in the header lacks dtype, shape or data_offsets")
    if rest:
        raise FormatError("its entry in the header has more than dtype, shape and data_offsets")
    if dtype not in _DTYPES:
        raise FormatError(f"its type {dtype[:20]!a} is none of {', '.join(_DTYPES)}")
    if len(shape) > MAX_DIMS or not all(map(is_size, (*shape, first, last))):
        raise FormatError("its shape or its offsets are not sizes")
    size = math.prod(shape) * DTYPE_BYTES[_DTYPES[dtype]]
    if last - first != size:
        raise FormatError(f"it is given {last - first} bytes and its shape takes {size}")
    extent = TensorExtent(
        dtype=_DTYPES[dtype],
        shape=tuple(shape),
        stride=contiguous_stride(tuple(shape)),
        start=begin + first,
    )
    check_inside(extent, file_size - extent.start, file_size)
    return extent


def _check_order(extents: Mapping[str, TensorExtent], begin: int, file_size: int) -> None:
    """Prove that the tensors follow one another without gaps from the header to the end."""
    position = begin
    for name, extent in sorted(extents.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if extent.start != position:
            how = "overlaps the one before" if extent.start < position else "follows a gap"
            raise FormatError(f"tensor {name!a} {how} (byte {extent.start}, not {position})")
        position += extent.nbytes
    if position != file_size:
        raise FormatError(f"its tensors end at byte {position} of {file_size}; {_DAMAGED}")
