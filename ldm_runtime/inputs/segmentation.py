"""Segmentation maps that requests carry: a class for every pixel, read once and never changed."""

import os
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.inputs.frozen_array import FrozenRaster
from ldm_runtime.inputs.reading import (
    FORMS,
    MAX_PIXELS,
    NamedBytes,
    check_sides,
    decode_image,
    load_image,
    read_bytes,
    shown,
)

#: Highest number of a class: a pixel of a map is one byte.
MAX_CLASS_ID = 255

UInt8Array = npt.NDArray[np.uint8]

_MAX_BYTES = 2 * MAX_PIXELS  # the largest map, not compressed, and some metadata
# Kinds of PNG whose pixels are single numbers; of a palette, places in it.
_MODES = ("1", "L", "P", "I;16")
# Pillow spreads the values of gray PNGs of two and four bits over 0 to 255.
_SPREAD = {"L;2": 85, "L;4": 17}


class SegmentationMap(FrozenRaster):
    """A segmentation map in memory: immutable, hashable, and equal to any other with the same ids.

    Args:
        ids: The class of every pixel, any integers from 0 to `MAX_CLASS_ID`, (H, W); copied.
        source: Where it was read from.

    Raises:
        ValueError: The array is not such a map, is empty, or has a side above `MAX_SIDE`.
    """

    def __init__(self, ids: npt.NDArray[Any], source: str | None = None) -> None:
        pixels = _bytes_of_array(ids, "the array")
        # The header of a binary PGM.
        super().__init__(pixels, "P5\n{1} {0}\n255\n".format(*pixels.shape), source)

    @classmethod
    def read(cls, value: object) -> Self:
        """Return the segmentation map in `value`, or in the file that it names.

        Pixels are taken as the numbers that the file holds, whatever colours a palette gives them
        and however many bits they have; transparency and orientation are ignored.

        Args:
            value: A path, a `data:` URL in base64 or the bytes of a gray or palette PNG, a PIL
                image of such a kind, an array of integers (H, W), or a `SegmentationMap`. A path
                lets the author of the text read any map that this process can; a server should
                only pass on text that starts with "data:".

        Raises:
            ValueError: In one sentence, why `value` is not a segmentation map, or is too large.
        """
        match value:
            case cls():
                return value
            case np.ndarray():
                return cls(value)
            case Image.Image():
                spread = _spread(value)
                return cls(_ids(value, "the image") // spread)
            case bytes() | bytearray() | memoryview() | str() | os.PathLike():
                named = read_bytes(value, _MAX_BYTES)
                return cls(_decoded(named), named.source)
        raise ValueError(
            f"{shown(value)} is not a segmentation map; give {FORMS}, a PIL image or an array of "
            "integers"
        )

    @property
    def ids(self) -> UInt8Array:
        """The class of every pixel, (H, W), read-only."""
        return self._array

    def resized(self, width: int, height: int) -> "SegmentationMap":
        """Return the map in another size.

        Every new pixel has the class of the old one that its centre lies in; between two, the
        right or lower one.

        Raises:
            ValueError: A side lies outside 1 to `MAX_SIDE`.
        """
        check_sides("the result", width, height)
        if (width, height) == self.size:
            return self
        rows, columns = (
            (2 * np.arange(new) + 1) * old // (2 * new)
            for new, old in zip((height, width), self._array.shape, strict=True)
        )
        return SegmentationMap(self._array[rows[:, None], columns], self._source)


def _decoded(named: NamedBytes) -> npt.NDArray[Any]:
    def ids(image: Image.Image) -> npt.NDArray[Any]:
        spread = _spread(image)
        load_image(image, named.name)
        return _ids(image, named.name) // spread

    unreadable = "is not a PNG; a segmentation map is a gray or palette PNG"
    return decode_image(named, ("PNG",), unreadable, ids)


def _spread(image: Image.Image) -> int:
    """Return the factor that Pillow multiplies the numbers of an opened file with on loading.

    It is unknown of an image that was loaded before: its numbers are taken as they are.
    """
    tiles = getattr(image, "tile", None)
    return _SPREAD.get(str(tiles[0].args), 1) if tiles else 1


def _ids(image: Image.Image, name: str) -> npt.NDArray[Any]:
    """Return the numbers (H, W) that the pixels of a PIL image are."""
    if image.mode not in _MODES:
        raise ValueError(
            f"{name} has mode {image.mode!r}, whose pixels are not class numbers; "
            "save it as a gray or palette PNG"
        )
    ids = np.asarray(image)
    return _bytes_of_array(ids.astype(np.uint8) if image.mode == "1" else ids, name)


def _bytes_of_array(ids: npt.NDArray[Any], name: str) -> UInt8Array:
    if ids.dtype.kind not in "iu" or ids.ndim != 2:
        raise ValueError(
            f"an array of {ids.dtype} and shape {ids.shape} is not a segmentation map; "
            "give integers (height, width)"
        )
    check_sides(name, ids.shape[1], ids.shape[0])
    for id_ in (int(ids.min()), int(ids.max())):
        if not 0 <= id_ <= MAX_CLASS_ID:
            raise ValueError(
                f"{name} has a pixel of class {id_}; classes lie between 0 and {MAX_CLASS_ID}"
            )
    return ids.astype(np.uint8)
