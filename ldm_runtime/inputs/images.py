"""Images that requests carry: read from the usual formats, checked once, never changed."""

import io
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from ldm_runtime.inputs.frozen_array import FrozenRaster
from ldm_runtime.inputs.reading import (
    DAMAGE,
    MAX_PIXELS,
    NamedBytes,
    check_sides,
    decode_image,
    load_image,
    read_bytes,
    shown,
)

#: Formats that are read: those of cameras, browsers and editors. TIFF and the others that Pillow
#: knows stay out: they are rare here, and each is one more parser for a stranger's file to attack.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
UInt8Array = npt.NDArray[np.uint8]

#: How an image is turned by the value of its EXIF orientation; 1 and unknown ones are as stored.
_TURNS: Mapping[int, Image.Transpose] = MappingProxyType(
    {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
)
_MAX_BYTES = 4 * MAX_PIXELS + 2**20  # the largest image, not compressed, and some metadata


class InputImage(FrozenRaster):
    """An image in memory: immutable, hashable, and equal to any other with the same pixels.

    Args:
        pixels: RGB, uint8 (H, W, 3); copied.
        source: Where it was read from.

    Raises:
        ValueError: The array is not such an image, is empty, or has a side above `MAX_SIDE`.
    """

    def __init__(self, pixels: UInt8Array, source: str | None = None) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(
                f"an array of {pixels.dtype} and shape {pixels.shape} is not an RGB image; "
                "give uint8 (height, width, 3)"
            )
        check_sides("the array", pixels.shape[1], pixels.shape[0])
        # The header of a binary PPM.
        super().__init__(pixels, "P6\n{1} {0}\n255\n".format(*pixels.shape), source)

    @classmethod
    def read(cls, value: object) -> Self:
        """Return the image in `value`, or in the file that it names.

        The image is turned as its EXIF data says, transparent parts are laid on white, 16 bits
        become 8, and of an animation the first frame is taken. Colour profiles are ignored.

        Args:
            value: A path, a `data:` URL in base64, the bytes of a file, a PIL image, an array of
                uint8 with shape (H, W), (H, W, 3) or (H, W, 4), or an `InputImage`. A path lets
                the author of the text read any image that this process can; a server should
                only pass on text that starts with "data:".

        Raises:
            ValueError: In one sentence, why `value` is not an image, or is too large.
        """
        match value:
            case cls():
                return value
            case np.ndarray():
                return cls(_rgb(_image_of_array(value), "the array"))
            case Image.Image():
                return cls(_rgb(value, "the image"))
            case bytes() | bytearray() | memoryview() | str() | os.PathLike():
                named = read_bytes(value, _MAX_BYTES)
                return cls(_decoded(named), named.source)
        raise ValueError(
            f"{shown(value)} is not an image; give a path, a data: URL, the bytes of a file, "
            "a PIL image or an array of uint8"
        )

    @property
    def pixels(self) -> UInt8Array:
        """RGB, (H, W, 3), read-only."""
        return self._array

    def gray(self) -> UInt8Array:
        """Return the brightness (H, W), 0 to 255, as ITU-R BT.601 weighs the colours."""
        return np.asarray(self.to_image().convert("L"))

    def to_image(self) -> Image.Image:
        """Return a copy as a PIL image."""
        return Image.fromarray(self._array)

    def to_png_bytes(self) -> bytes:
        """Return it as a PNG file without metadata."""
        file = io.BytesIO()
        self.to_image().save(file, format="PNG")
        return file.getvalue()


def _decoded(named: NamedBytes) -> UInt8Array:
    def rgb(image: Image.Image) -> UInt8Array:
        load_image(image, named.name)
        return _rgb(image, named.name)

    unreadable = "is not a readable image; give PNG, JPEG, WebP or BMP"
    return decode_image(named, FORMATS, unreadable, rgb)


def _rgb(image: Image.Image, name: str) -> UInt8Array:
    """Return the pixels (H, W, 3) of a PIL image of any kind that has a fixed range."""
    check_sides(name, *image.size)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name} has mode {image.mode!r}, whose range is not known; convert it to 'RGB'"
        )
    turn = _turn_of(image, name)
    try:
        turned = image if turn is None else image.transpose(turn)
        return np.asarray(_opaque(_eight_bit(turned)).convert("RGB"))
    except DAMAGE as error:
        raise ValueError(f"{name} cannot be converted to RGB: {error}") from error


def _turn_of(image: Image.Image, name: str) -> Image.Transpose | None:
    """Return how an image is to be turned as its EXIF data says.

    Pillow's `exif_transpose` writes the other entries again too, and fails if one has an odd type.
    """
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGE as error:
        raise ValueError(
            f"{name} has damaged EXIF data ({error}); save it again without metadata"
        ) from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray, which Pillow would clip at 255."""
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    """Lay an image with transparent parts on white."""
    if not image.has_transparency_data:
        return image
    above = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)


def _image_of_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8:
        raise ValueError(f"an array of {array.dtype} is not an image; give uint8, from 0 to 255")
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ValueError(
            f"an array of shape {array.shape} is not an image; give (height, width), "
            "(height, width, 3) or (height, width, 4)"
        )
    check_sides("the array", array.shape[1], array.shape[0])
    return Image.fromarray(np.ascontiguousarray(array))


def resize(image: InputImage, width: int, height: int) -> InputImage:
    """Return an image of another size, by Lanczos' filter; the same one if it has that size.

    It is stretched if the sides are in another proportion; cropping is left to the caller.
    """
    if image.size == (width, height):
        return image
    resized = image.to_image().resize((width, height), Image.Resampling.LANCZOS)
    return InputImage(np.asarray(resized))
