"""Random masks for inpainting: rectangles and strokes of up to about half of an image."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from models.shapes.data import scenes

Mask = npt.NDArray[np.bool_]

_SMALLEST, _LARGEST = 0.05, 0.5  # share of the image
_SIDES = (14, 48)  # of a rectangle, pixels
_WIDTHS = (5.0, 11.0)  # of a stroke, pixels
_BENDS = (2, 5)  # corners of a stroke, the first included


def random_mask(rng: np.random.Generator) -> Mask:
    """Return a mask (SIZE, SIZE), true where the image is missing, 5 to 50 % of it.

    One to three parts, each a rectangle or a stroke with corners.
    """
    while True:
        parts = [
            _rectangle(rng) if rng.random() < 0.5 else _stroke(rng)
            for _ in range(rng.integers(1, 4))
        ]
        mask: Mask = np.any(parts, axis=0)
        if _SMALLEST <= mask.mean() <= _LARGEST:
            return mask


def _rectangle(rng: np.random.Generator) -> Mask:
    mask = np.zeros((scenes.SIZE, scenes.SIZE), np.bool_)
    height, width = rng.integers(_SIDES[0], _SIDES[1] + 1, size=2)
    top, left = rng.integers(0, scenes.SIZE - height + 1), rng.integers(0, scenes.SIZE - width + 1)
    mask[top : top + height, left : left + width] = True
    return mask


def _stroke(rng: np.random.Generator) -> Mask:
    corners = rng.uniform(0, scenes.SIZE, size=(rng.integers(_BENDS[0], _BENDS[1]), 2))
    width = rng.uniform(*_WIDTHS)
    y, x = np.mgrid[0 : scenes.SIZE, 0 : scenes.SIZE] + 0.5
    distances = [_distance(x, y, start, end) for start, end in pairwise(corners)]
    mask: Mask = np.min(distances, axis=0) < width / 2
    return mask


def _distance(
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    start: npt.NDArray[np.float64],
    end: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return how far pixels are from the line between two points."""
    along = end - start
    share = ((x - start[0]) * along[0] + (y - start[1]) * along[1]) / max(along @ along, 1e-9)
    share = np.clip(share, 0, 1)
    away: npt.NDArray[np.float64] = np.hypot(
        x - start[0] - share * along[0], y - start[1] - share * along[1]
    )
    return away


def mask_image(mask: Mask) -> npt.NDArray[np.uint8]:
    """Return a mask as an image: white where the image is missing."""
    return np.where(mask, np.uint8(255), np.uint8(0))


def visible_share(thing: scenes.Thing, mask: Mask) -> float:
    """Return how much of a thing lies outside a mask, 0 to 1."""
    covered = scenes.coverage(thing)
    return float(covered[~mask].sum() / covered.sum())


def mean_color_fill(image: npt.NDArray[np.uint8], mask: Mask) -> npt.NDArray[np.uint8]:
    """Return an RGB image whose masked region is filled with the mean colour of the rest."""
    filled = image.copy()
    filled[mask] = np.rint(image[~mask].mean(axis=0)).astype(np.uint8)
    return filled
