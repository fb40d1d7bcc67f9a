"""Data from a file, or from standard input where the name of the file is "-"."""

import sys
from pathlib import Path

from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.reading import without_byte_order_mark

#: The name of standard input on a command line.
STDIN = "-"


def read_data(name: str, field: str) -> bytes:
    """Return the bytes of a file or of standard input, without a byte order mark.

    Args:
        name: The file, or "-".
        field: The field of a request that they are for.

    Raises:
        RequestError: They are UTF-16.
        OSError: The file cannot be read.
    """
    data = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    try:
        return without_byte_order_mark(data, place_of(name))
    except ValueError as error:
        raise RequestError(field, str(error)) from error


def decoded(data: bytes, field: str, place: str) -> str:
    """Return bytes as text.

    Args:
        data: The bytes.
        field: The field of a request that they are for.
        place: Where they are from, for the message.

    Raises:
        RequestError: They are not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            field, f"{place} is not UTF-8 at byte {error.start}; save it as UTF-8"
        ) from error


def place_of(name: str) -> str:
    """Return the name of a file for a message, or "standard input"."""
    return "standard input" if name == STDIN else name
