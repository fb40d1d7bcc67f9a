"""Reads an image of shapes back into words: colours, connected pixels, areas; nothing is learnt.

Backgrounds are grey, so in the plane of chroma (what is left of RGB without grey) a pixel's
direction says the colour and its length says how much of the pixel is covered, soft edges and
gradients included. A shape of known area and centroid is then fitted in closed form.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from models.shapes.data import scenes

Float32Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

#: Pixels; the smallest shape ever rendered has 67.
SMALLEST_AREA = 24
#: Overlap with the best template below which a blob looks like no shape at all.
LOWEST_OVERLAP = 0.6
#: Overlap with its template from which a thing is clearly of its kind. Of 231 things that the VQ
#: autoencoder encoded and decoded, all had 0.88 or more; what looks like a blob has less than 0.85.
CLEAR_OVERLAP = 0.85
_SATURATED = 64  # spread of a pixel's channels from which it is coloured, grey levels
_GRAY_TOLERANCE = 12.0  # mean grey levels by which a background may be off
_COVERED = 0.5  # share of a pixel that makes it part of a shape
_EDGE = 2  # pixels around a blob that may hold the rest of its soft edge

#: From RGB to the chroma plane; the grey axis goes to zero.
_PLANE = np.array([[1, 0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]], np.float32)
_COLORS = tuple(scenes.COLORS)
_CHROMA = np.array([scenes.COLORS[name] for name in _COLORS], np.float32) @ _PLANE
_STRENGTH = np.linalg.norm(_CHROMA, axis=1)
_DIRECTION = _CHROMA / _STRENGTH[:, None]

#: Area of each kind of half extent 1, and how far below its centre its centroid lies.
_MOMENTS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "circle": (math.pi, 0.0),
        "square": (1.8**2, 0.0),
        "triangle": (1.8 * 1.04, 0.2),
        "cross": (4 * 0.68 - 0.68**2, 0.0),
    }
)
_LARGE_FROM = (scenes.SIZES["small"][1] + scenes.SIZES["large"][0]) / 2


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The content of an image.

    Attributes:
        things: The shapes found, largest first.
        overlaps: How well each fits its template, 0 to 1 (soft intersection over union).
        background: Name of the colour of the background.
        gradient: Whether the background changes towards the bottom.
        stray_pixels: Coloured pixels that belong to nothing that was read.
        background_error: Mean grey levels by which the background is off, outside the things.
    """

    things: tuple[scenes.Thing, ...]
    overlaps: tuple[float, ...]
    background: str
    gradient: bool
    stray_pixels: int = 0
    background_error: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether every thing is clearly of its kind and nothing else but a background is there."""
        return (
            min(self.overlaps, default=1.0) >= CLEAR_OVERLAP
            and self.stray_pixels < SMALLEST_AREA
            and self.background_error <= _GRAY_TOLERANCE
        )


def read_image(image: npt.NDArray[np.uint8]) -> Reading:
    """Describe an image of shapes.

    Args:
        image: RGB (64, 64, 3).

    Raises:
        ValueError: The array has another type or shape.
    """
    wanted = (scenes.SIZE, scenes.SIZE, 3)
    if image.dtype != np.uint8 or image.shape != wanted:
        raise ValueError(f"an image is uint8 {wanted}, got {image.dtype} {image.shape}")
    softened = smooth(image.astype(np.float32))
    chroma = softened @ _PLANE
    blobs = list(_blobs(chroma))
    nothing = np.zeros(wanted[:2], np.bool_)
    occupied: Mask = np.any([nothing, *(mask for _, mask in blobs)], axis=0)
    found = []
    for color, blob in blobs:
        thing, overlap = _fit(chroma, color, blob, _grow(blob) & (blob | ~occupied))
        if overlap >= LOWEST_OVERLAP:
            found.append((thing, overlap))
    found.sort(key=lambda pair: -pair[0].radius)
    background, gradient = _read_background(softened.mean(axis=2), ~_grow(occupied))
    things = tuple(thing for thing, _ in found)
    covered = np.any([nothing, *(smooth(scenes.coverage(thing)) > 0 for thing in things)], axis=0)
    coloured = softened.max(axis=2) - softened.min(axis=2) > _SATURATED
    off = np.abs(image.mean(axis=2) - scenes.backdrop(background, gradient=gradient))[~covered]
    return Reading(
        things=things,
        overlaps=tuple(overlap for _, overlap in found),
        background=background,
        gradient=gradient,
        stray_pixels=int((coloured & ~covered).sum()),
        background_error=float(off.mean()) if off.size else math.inf,
    )


def _blobs(chroma: Float32Array) -> Iterator[tuple[int, Mask]]:
    """Yield a colour's index and a mask for each connected patch of one colour."""
    along = chroma @ _DIRECTION.T
    nearest = along.argmax(axis=2)
    covered = along.max(axis=2) > _COVERED * _STRENGTH[nearest]
    for color in range(len(_COLORS)):
        for mask in connected(covered & (nearest == color)):
            if mask.sum() >= SMALLEST_AREA:
                yield color, mask


def connected(mask: Mask) -> Iterator[Mask]:
    """Yield the parts of a mask whose pixels hang together by their sides, in reading order."""
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    for start in sorted(left):
        if start not in left:
            continue
        left.remove(start)
        part, front = np.zeros_like(mask), [start]
        while front:
            row, column = front.pop()
            part[row, column] = True
            sides = ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1))
            new = left.intersection(sides)
            left -= new
            front += new
        yield part


def _fit(chroma: Float32Array, color: int, blob: Mask, region: Mask) -> tuple[scenes.Thing, float]:
    """Return the shape that explains a blob best, and their overlap."""
    along = chroma @ _DIRECTION[color]
    # A model's colours may be pale; what counts is how far a pixel is from this blob's own colour.
    share = np.clip(along / np.percentile(along[blob], 75), 0, 1) * region
    candidates = [_same_moments(kind, _COLORS[color], share) for kind in scenes.SHAPES]
    overlaps = [_overlap(share, smooth(scenes.coverage(thing))) for thing in candidates]
    best = int(np.argmax(overlaps))
    return candidates[best], overlaps[best]


def _same_moments(kind: str, color: str, share: Float32Array) -> scenes.Thing:
    """Return the thing of a kind that has the area and the centroid of a patch."""
    area = float(share.sum())
    unit_area, below = _MOMENTS[kind]
    radius = math.sqrt(area / unit_area)
    pixels = np.arange(scenes.SIZE) + 0.5
    x, y = float(share.sum(axis=0) @ pixels) / area, float(share.sum(axis=1) @ pixels) / area
    size = "large" if radius > _LARGE_FROM else "small"
    return scenes.Thing(kind=kind, color=color, size=size, x=x, y=y - below * radius, radius=radius)


def _overlap(first: Float32Array, second: Float32Array) -> float:
    """Return intersection over union of two soft masks."""
    return float(np.minimum(first, second).sum() / np.maximum(first, second).sum())


def _read_background(gray: Float32Array, free: Mask) -> tuple[str, bool]:
    """Return the background that the free pixels are nearest to."""
    if not free.any():
        free = np.ones_like(free)
    choices: Sequence[tuple[str, bool]] = list(product(scenes.BACKGROUNDS, (False, True)))
    errors = [
        np.abs(gray - scenes.backdrop(name, gradient=gradient))[free].mean()
        for name, gradient in choices
    ]
    return choices[int(np.argmin(errors))]


def smooth(image: Float32Array) -> Float32Array:
    """Blur (H, W) or (H, W, C) with the weights 1 2 1 down and across."""
    for axis in (0, 1):
        padding = [(1, 1) if each == axis else (0, 0) for each in range(image.ndim)]
        padded = np.moveaxis(np.pad(image, padding, mode="edge"), axis, 0)
        total = padded[:-2] + 2 * padded[1:-1] + padded[2:]
        image = np.moveaxis(total / np.float32(4), 0, axis)
    return image


def _grow(mask: Mask) -> Mask:
    """Return a mask and all pixels within `_EDGE` of it."""
    height, width = mask.shape
    padded = np.pad(mask, _EDGE)
    steps = range(2 * _EDGE + 1)
    shifted = [padded[row : row + height, column:][:, :width] for row in steps for column in steps]
    grown: Mask = np.any(shifted, axis=0)
    return grown
