"""Pictures that requests carry: read from whatever people have, checked once, never changed."""

import hashlib
import io
import os
import struct
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ldm_runtime.inputs.reading import data_of_url, is_data_url, shown

#: What is read: what cameras, browsers and editors write. TIFF and the rest of what Pillow knows
#: stay out: they are rare here, and each is one more parser for a stranger's file to attack.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
#: Longest side of a picture in pixels.
MAX_SIDE = 16384
#: Most pixels of an encoded picture, 8192 times 8192: a few kilobytes can claim any size.
MAX_PIXELS = 2**26

UInt8Array = npt.NDArray[np.uint8]

# The first three are what spoilt files were seen to raise; the rest is running out of bytes.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class Picture:
    """A picture in memory: immutable, hashable, and equal to any other with the same pixels.

    Args:
        pixels: RGB, uint8 (H, W, 3); copied.
        source: Where it was read from.

    Raises:
        ValueError: The array is no such picture, is empty, or has a side above `MAX_SIDE`.
    """

    def __init__(self, pixels: UInt8Array, source: str | None = None) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(
                f"an array of {pixels.dtype} and shape {pixels.shape} is no RGB picture; "
                "give uint8 (height, width, 3)"
            )
        _check_size("the array", pixels.shape[1], pixels.shape[0])
        # Over bytes, because the owner of an array could make it writable again.
        data = np.frombuffer(pixels.tobytes(), dtype=np.uint8)
        self._pixels: UInt8Array = data.reshape(pixels.shape)
        self._source = source

    @classmethod
    def read(cls, value: object) -> "Picture":
        """Return the picture that `value` is, names or holds.

        The picture is turned as its EXIF data says, transparent parts are laid on white, 16 bits
        become 8, and of an animation the first frame is taken. Colour profiles are ignored.

        Args:
            value: A path, a `data:` URL in base64, the bytes of a file, a PIL image, an array of
                uint8 with shape (H, W), (H, W, 3) or (H, W, 4), or a `Picture`. A path lets
                whoever chose the text read any picture that this process can; a server should
                only pass on text that starts with "data:".

        Raises:
            ValueError: In one sentence, why `value` is no picture or too large a one.
        """
        match value:
            case Picture():
                return value
            case np.ndarray():
                return cls(_rgb(_image_of_array(value), "the array"))
            case Image.Image():
                return cls(_rgb(value, "the image"))
            case bytes() | bytearray() | memoryview():
                return cls(_decoded(io.BytesIO(value), "the data"))
            case str() if is_data_url(value):
                return cls(_decoded(io.BytesIO(data_of_url(value)), "the data: URL"))
            case str() | os.PathLike():
                return cls(_opened(Path(value)), str(value))
        raise ValueError(
            f"{shown(value)} is no picture; give a path, a data: URL, the bytes of a file, "
            "a PIL image or an array of uint8"
        )

    @property
    def pixels(self) -> UInt8Array:
        """RGB, (H, W, 3), read-only."""
        return self._pixels

    @property
    def source(self) -> str | None:
        """The path it was read from, if it was; no part of equality."""
        return self._source

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, in this order, as PIL has it."""
        return self._pixels.shape[1], self._pixels.shape[0]

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal sha256 of the picture as a binary PPM file.

        So that it depends on nothing but the pixels, and other programs can compute it.
        """
        digest = hashlib.sha256("P6\n{} {}\n255\n".format(*self.size).encode())
        digest.update(self._pixels.data)
        return digest.hexdigest()

    def gray(self) -> UInt8Array:
        """Return the brightness (H, W), 0 to 255, as ITU-R BT.601 weighs the colours."""
        return np.asarray(self.to_image().convert("L"))

    def to_image(self) -> Image.Image:
        """Return it as a PIL image of the caller's own."""
        return Image.fromarray(self._pixels)

    def to_png_bytes(self) -> bytes:
        """Return it as a PNG file without metadata."""
        file = io.BytesIO()
        self.to_image().save(file, format="PNG")
        return file.getvalue()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Picture):
            return NotImplemented
        return self is other or np.array_equal(self._pixels, other._pixels)

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        width, height = self.size
        source = f", {self._source!r}" if self._source else ""
        return f"Picture({width}x{height}, sha256 {self.sha256[:12]}{source})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Picture":
        return self  # nothing in it can change; `dataclasses.asdict` asks for a copy

    def __reduce__(self) -> tuple[type["Picture"], tuple[UInt8Array, str | None]]:
        return Picture, (self._pixels, self._source)


def _opened(path: Path) -> UInt8Array:
    name = shown(str(path), limit=255)
    try:
        file = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} cannot be read: {reason}") from error
    with file:
        return _decoded(file, name)


def _decoded(file: io.BufferedReader | io.BytesIO, name: str) -> UInt8Array:
    too_large = f"{name} has more than {MAX_PIXELS} pixels; make it smaller"
    try:
        image = Image.open(file, formats=FORMATS)
    except _BOMB as error:
        raise ValueError(too_large) from error
    except _DAMAGE as error:
        raise ValueError(
            f"{name} is no picture that can be read; give PNG, JPEG, WebP or BMP"
        ) from error
    with image:
        _check_size(name, *image.size)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(too_large)
        try:
            image.load()
        except _DAMAGE as error:
            raise ValueError(f"{name} is damaged or cut off: {error}") from error
        return _rgb(image, name)


def _rgb(image: Image.Image, name: str) -> UInt8Array:
    """Return the pixels (H, W, 3) of a PIL image of any kind that has a fixed range."""
    _check_size(name, *image.size)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name} has mode {image.mode!r}, whose range is not known; convert it to 'RGB'"
        )
    try:
        return np.asarray(_opaque(_eight_bit(ImageOps.exif_transpose(image))).convert("RGB"))
    except _DAMAGE as error:
        raise ValueError(f"{name} cannot be converted to RGB: {error}") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray, which Pillow would clip at 255."""
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    """Lay a picture with transparent parts on white."""
    if not image.has_transparency_data:
        return image
    above = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)


def _image_of_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8:
        raise ValueError(f"an array of {array.dtype} is no picture; give uint8, from 0 to 255")
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ValueError(
            f"an array of shape {array.shape} is no picture; give (height, width), "
            "(height, width, 3) or (height, width, 4)"
        )
    _check_size("the array", array.shape[1], array.shape[0])
    return Image.fromarray(np.ascontiguousarray(array))


def _check_size(name: str, width: int, height: int) -> None:
    if not 1 <= min(width, height) <= max(width, height) <= MAX_SIDE:
        raise ValueError(
            f"{name} has {width}x{height} pixels; both sides must lie between 1 and {MAX_SIDE}"
        )


def resize(picture: Picture, width: int, height: int) -> Picture:
    """Return a picture of another size, by Lanczos' filter; the same one if it has that size.

    It is stretched if the sides are in another proportion; cropping is left to the caller.
    """
    if picture.size == (width, height):
        return picture
    resized = picture.to_image().resize((width, height), Image.Resampling.LANCZOS)
    return Picture(np.asarray(resized))
