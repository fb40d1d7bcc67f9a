"""The bytes of what people hand in: a file, a `data:` URL, or the bytes themselves."""

import base64
import binascii
import os
from pathlib import Path
from typing import NamedTuple

#: What `read_bytes` reads, as sentences list it.
FORMS = "a path, a data: URL, the bytes of a file"


class Named(NamedTuple):
    """Bytes that were read.

    Attributes:
        data: The bytes.
        name: What a sentence may call them.
        source: The path they were read from, if they were.
    """

    data: bytes
    name: str
    source: str | None


def read_bytes(value: bytes | bytearray | memoryview | str | os.PathLike[str], limit: int) -> Named:
    """Return the bytes that `value` is, holds or names.

    Args:
        value: Bytes, a `data:` URL in base64, or a path. A path lets whoever chose the text read
            any file that this process can; a server should only pass on text that starts with
            "data:".
        limit: Most bytes to read.

    Raises:
        ValueError: In one sentence, why it cannot be read, or that it is longer than `limit`.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        named = Named(bytes(value), "the data", None)
    elif isinstance(value, str) and is_data_url(value):
        named = Named(data_of_url(value), "the data: URL", None)
    else:
        named = _read_file(Path(value), limit)
    if len(named.data) > limit:
        raise ValueError(f"{named.name} has more than {limit} bytes; make it smaller")
    return named


def is_data_url(text: str) -> bool:
    """Return whether a text is a `data:` URL and no path."""
    return text[:5].lower() == "data:"


def data_of_url(url: str) -> bytes:
    """Return the data of a `data:` URL, whose type is not looked at.

    Raises:
        ValueError: It is not in base64.
    """
    header, _, data = url.partition(",")
    if not header.lower().endswith(";base64"):
        raise ValueError(f"{shown(url)} is no data: URL in base64; write data:image/png;base64,…")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters beyond ASCII
        raise ValueError(f"{shown(url)} is not valid base64: {error}") from error


def shown(value: object, limit: int = 60) -> str:
    """Return a value as it may stand in a sentence, text without quotation marks."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _read_file(path: Path, limit: int) -> Named:
    name = shown(str(path), limit=255)
    try:
        with path.open("rb") as file:
            return Named(file.read(limit + 1), name, str(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} cannot be read: {reason}") from error
