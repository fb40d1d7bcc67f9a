"""The bytes and images that come with a request: a file, a `data:` URL, or the data itself."""

import base64
import binascii
import codecs
import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image

#: Inputs of `read_bytes`, as error messages list them.
FORMS = "a path, a data: URL, the bytes of a file"
#: Longest side of an image in pixels.
MAX_SIDE = 16384
#: Most pixels of an encoded image, 8192 times 8192: a few kilobytes can decode to any size.
MAX_PIXELS = 2**26

#: Errors that damaged image files were seen to raise (the first three), or running out of bytes.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error)
#: Most scans of a JPEG file. Cameras write one and editors ten; each costs a pass over the image.
_MAX_SCANS = 100
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)

_T = TypeVar("_T")


class NamedBytes(NamedTuple):
    """Bytes that were read.

    Attributes:
        data: The bytes.
        name: Their name in error messages.
        source: The path they were read from, if they were.
    """

    data: bytes
    name: str
    source: str | None


def read_bytes(
    value: bytes | bytearray | memoryview | str | os.PathLike[str], limit: int
) -> NamedBytes:
    """Return the bytes in `value`, or in the file that it names.

    Args:
        value: Bytes, a `data:` URL in base64, or a path. A path lets the author of the text read
            any file that this process can; a server should only pass on text that starts with
            "data:".
        limit: Most bytes to read.

    Raises:
        ValueError: In one sentence, why it cannot be read, or that it is longer than `limit`.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        named = NamedBytes(bytes(value), "the data", None)
    elif isinstance(value, str) and is_data_url(value):
        named = NamedBytes(data_of_url(value), "the data: URL", None)
    else:
        named = _read_file(Path(value), limit)
    if len(named.data) > limit:
        raise ValueError(f"{named.name} has more than {limit} bytes; make it smaller")
    return named


def is_data_url(text: str) -> bool:
    """Return whether a text is a `data:` URL and not a path."""
    return text[:5].lower() == "data:"


def data_of_url(url: str) -> bytes:
    """Return the data of a `data:` URL, whose type is not looked at.

    Raises:
        ValueError: It is not in base64.
    """
    header, _, data = url.partition(",")
    if not header.lower().endswith(";base64"):
        raise ValueError(
            f"{shown(url)} is not a data: URL in base64; write data:image/png;base64,…"
        )
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters beyond ASCII
        raise ValueError(f"{shown(url)} is not valid base64: {error}") from error


def shown(value: object, limit: int = 60) -> str:
    """Return a value as it may stand in a sentence, text without quotation marks."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def without_byte_order_mark(data: bytes, name: str) -> bytes:
    """Return a text in UTF-8 without the byte order mark that some editors write before it.

    Raises:
        ValueError: The mark is that of UTF-16.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{name} is text in UTF-16; save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def text_of(named: NamedBytes) -> str:
    """Return the text of a file, without a byte order mark.

    Raises:
        ValueError: It is not UTF-8.
    """
    try:
        return without_byte_order_mark(named.data, named.name).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{named.name} is not UTF-8 text: {error}") from error


def check_sides(name: str, width: int, height: int) -> None:
    """Check the size of an image in pixels.

    Raises:
        ValueError: A side is 0 or above `MAX_SIDE`.
    """
    if not 1 <= min(width, height) <= max(width, height) <= MAX_SIDE:
        raise ValueError(
            f"{name} has {width}x{height} pixels; both sides must lie between 1 and {MAX_SIDE}"
        )


def decode_image(
    named: NamedBytes, formats: tuple[str, ...], unreadable: str, take: Callable[[Image.Image], _T]
) -> _T:
    """Open an encoded image, check its size before a pixel is decoded, and return `take` of it.

    Args:
        named: The bytes of the file.
        formats: Formats that Pillow may try.
        unreadable: The end of the sentence that says that it is of none of them.
        take: Given the opened image, of which nothing is loaded yet; loads what it needs.

    Raises:
        ValueError: In one sentence, why it cannot be decoded, or that it is too large.
    """
    too_large = f"{named.name} has more than {MAX_PIXELS} pixels; make it smaller"
    try:
        image = Image.open(io.BytesIO(named.data), formats=formats)
    except _BOMB as error:
        raise ValueError(too_large) from error
    except DAMAGE as error:
        raise ValueError(f"{named.name} {unreadable}") from error
    with image:
        check_sides(named.name, *image.size)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(too_large)
        # Compressed data never has these two bytes in a row: there, 0 follows every 255.
        if image.format == "JPEG" and named.data.count(b"\xff\xda") > _MAX_SCANS:
            raise ValueError(f"{named.name} has more than {_MAX_SCANS} scans; save it again")
        return take(image)


def load_image(image: Image.Image, name: str) -> None:
    """Decode the pixels of an opened image.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        image.load()
    except DAMAGE as error:
        raise ValueError(f"{name} is damaged or cut off: {error}") from error


def _read_file(path: Path, limit: int) -> NamedBytes:
    name = shown(str(path), limit=255)
    try:
        with path.open("rb") as file:
            return NamedBytes(file.read(limit + 1), name, str(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} cannot be read: {reason}") from error
