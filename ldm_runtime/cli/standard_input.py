"""Data from a file, or from standard input where the name of the file is "-"."""

import sys
from contextlib import nullcontext
from pathlib import Path

from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.reading import without_byte_order_mark

#: The name of standard input on a command line.
STDIN = "-"
#: Lines of requests may have images in them.
_MAX_BYTES = 256 << 20


def read_data(name: str, field: str) -> bytes:
    """Return the bytes of a file or of standard input, without a byte order mark.

    Args:
        name: The file, or "-".
        field: The field of a request that they are for.

    Raises:
        RequestError: They are UTF-16, or more than a request can need.
        OSError: The file cannot be read.
    """
    with nullcontext(sys.stdin.buffer) if name == STDIN else Path(name).open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise RequestError(
            field, f"{place_of(name)} has more than {_MAX_BYTES} bytes; split it into several files"
        )
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
