"""Depth maps that requests carry: how near every pixel is, read once and never changed."""

import os
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.inputs.frozen_array import FrozenRaster, as_float32
from ldm_runtime.inputs.images import FORMATS
from ldm_runtime.inputs.npy_files import MAX_HEADER, decode_npy
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

Float32Array = npt.NDArray[np.float32]

_MAX_BYTES = 8 * MAX_PIXELS + MAX_HEADER
_BATCHED = 3  # axes of a batch of maps
_NPY = b"\x93NUMPY"
#: Kinds of image whose pixels are one number each.
_GRAY = ("1", "L", "I", "F")


class DepthMap(FrozenRaster):
    """A depth map in memory: immutable, hashable, and equal to any other with the same numbers.

    Larger numbers are nearer, as in the inverse depth of MiDaS and in the gray images that other
    programs make of it. Only their order and proportions count, not their range.

    Args:
        values: Inverse depth of every pixel, any real numbers (H, W); kept as float32.
        source: Where it was read from.

    Raises:
        ValueError: The array is not such a map, is empty, has a side above `MAX_SIDE`, or holds a
            number that is not finite in float32.
    """

    def __init__(self, values: npt.NDArray[Any], source: str | None = None) -> None:
        _check(values.dtype, values.shape, "the array")
        narrow = as_float32(values)
        if not np.isfinite(narrow).all():
            row, column = np.argwhere(~np.isfinite(narrow))[0]
            raise ValueError(
                f"the depth in row {row}, column {column} is NaN, infinite or too large for "
                "float32; give every pixel a depth"
            )
        # The header of a gray PFM.
        super().__init__(narrow, "Pf\n{1} {0}\n-1.0\n".format(*narrow.shape), source)

    @classmethod
    def read(cls, value: object) -> Self:
        """Return the depth map in `value`, or in the file that it names.

        Args:
            value: A path, a `data:` URL in base64 or the bytes of a `.npy` file or of a gray image,
                of 8 or 16 bits; a PIL image of such a kind; an array of numbers (H, W), or
                (1, H, W) as diffusers has it, or anything that NumPy can take for one; or a
                `DepthMap`. Images with three colours are taken if they are equal everywhere. A path
                lets the author of the text read any map that this process can; a server should only
                pass on text that starts with "data:".

        Raises:
            ValueError: In one sentence, why `value` is not a depth map, or is too large.
        """
        match value:
            case cls():
                return value
            case Image.Image():
                return cls(_values(value, "the image"))
            case bytes() | bytearray() | memoryview() | str() | os.PathLike():
                named = read_bytes(value, _MAX_BYTES)
                is_npy = named.data.startswith(_NPY)
                array = decode_npy(named, _check) if is_npy else _decoded(named)
                return cls(array, named.source)
        if hasattr(value, "__array__"):
            array = np.asarray(value)
            return cls(array[0] if array.ndim == _BATCHED and len(array) == 1 else array)
        raise ValueError(
            f"{shown(value)} is not a depth map; give {FORMS}, a PIL image or an array of numbers"
        )

    @property
    def values(self) -> Float32Array:
        """Inverse depth of every pixel, (H, W), read-only."""
        return self._array


def _check(dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> None:
    if dtype.kind not in "iuf" or len(shape) != 2:
        raise ValueError(
            f"{name} is of {dtype} and shape {shape}; a depth map is numbers (height, width)"
        )
    check_sides(name, shape[1], shape[0])


def _decoded(named: NamedBytes) -> npt.NDArray[Any]:
    def values(image: Image.Image) -> npt.NDArray[Any]:
        load_image(image, named.name)
        return _values(image, named.name)

    unreadable = "is neither a .npy file nor a readable image; give .npy, PNG, JPEG, WebP or BMP"
    return decode_image(named, FORMATS, unreadable, values)


def _values(image: Image.Image, name: str) -> npt.NDArray[Any]:
    """Return the numbers (H, W) that the pixels of a PIL image are."""
    if image.mode in _GRAY or image.mode.startswith("I;16"):
        array = np.asarray(image)
        return array.astype(np.uint8) if image.mode == "1" else array
    colours = np.asarray(image.convert("RGB"))
    if (colours != colours[..., :1]).any():
        raise ValueError(
            f"{name} is in colours; a depth map is gray, the nearest white, so save it without a "
            "colour map"
        )
    return colours[..., 0]
