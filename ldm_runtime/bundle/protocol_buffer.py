"""The encoding of protocol buffers, of which ONNX graphs are made: fields, not their meaning.

Source: the encoding page of the protocol buffers documentation.
"""

from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {FIXED64: 8, FIXED32: 4}


class Field(NamedTuple):
    """A field of a message: its number, its kind, and the bytes of its value."""

    number: int
    kind: int
    start: int
    end: int


def fields(data: bytes, start: int, end: int) -> Iterator[Field]:
    """Yield every field of the message that lies between two bytes.

    Raises:
        ValueError: It is not a message.
    """
    position = start
    while position < end:
        tag, position = read_varint(data, position)
        kind = tag & 7
        if kind == BYTES:
            length, position = read_varint(data, position)
        elif kind == VARINT:
            length = read_varint(data, position)[1] - position
        elif kind in _FIXED_SIZES:
            length = _FIXED_SIZES[kind]
        else:
            raise ValueError(f"a field at byte {position} is of the unknown kind {kind}")
        yield Field(tag >> 3, kind, position, position + length)
        position += length
    if position != end:
        raise ValueError(f"a field reaches beyond byte {end}, where its message ends")


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the number at a position, and the position after it.

    Raises:
        ValueError: It has no end.
    """
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number at byte {position} has no end")


def encoded(number: int, value: int | bytes) -> bytes:
    """Return a field of a message: a number that is not negative, or what has a length."""
    if isinstance(value, int):
        return _varint(number << 3 | VARINT) + _varint(value)
    return _varint(number << 3 | BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)
