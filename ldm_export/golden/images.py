"""Procedural images, for uses that need images but no data set."""

import numpy as np
import numpy.typing as npt

from ldm_runtime.latents.codec import to_uint8

Pixels = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]

_NUM_IMAGES = 6
_SHADES = (-1.0, 1.0)  # of a saturated colour's channels


def make_images(side: int) -> Pixels:
    """Return the images, RGB (N, side, side, 3): the same ones every time."""
    images = [_image(np.random.default_rng(seed), side) for seed in range(_NUM_IMAGES)]
    return to_uint8(np.stack(images).astype(np.float32))


def _image(rng: np.random.Generator, side: int) -> Array:
    """Return an image (3, side, side) from -1 to 1."""
    image = _smooth(rng, side)
    for make in (_gradient, _stripes):
        image = np.where(_rectangle(rng, side, 0.5), make(rng, side), image)
    for shape in (_rectangle, _ellipse) * 5:
        image = np.where(shape(rng, side, 0.25), _saturated(rng), image)
    return image


def _smooth(rng: np.random.Generator, side: int) -> Array:
    """Return a field (3, side, side) between random colours on a coarse grid."""
    grid = rng.uniform(-1, 1, (3, 5, 5))
    weights = np.maximum(0, 1 - np.abs(np.linspace(0, 4, side)[:, None] - np.arange(5)))
    field: Array = np.einsum("yi,cij,xj->cyx", weights, grid, weights)
    return field


def _gradient(rng: np.random.Generator, side: int) -> Array:
    """Return two colours (3, side, side) that turn into each other."""
    start, end = rng.uniform(-1, 1, (2, 3, 1, 1))
    slope = _slope(rng, side)
    share = (slope - slope.min()) / np.ptp(slope)
    colours: Array = start + share * (end - start)
    return colours


def _stripes(rng: np.random.Generator, side: int) -> Array:
    """Return two colours (3, side, side) that take turns, with sharp edges."""
    wave = np.sin(2 * np.pi * rng.uniform(2, 12) * _slope(rng, side))
    return np.where(wave > 0, _saturated(rng), rng.uniform(-1, 1, (3, 1, 1)))


def _slope(rng: np.random.Generator, side: int) -> Array:
    """Return the position of each pixel (side, side) along a random direction; a side is 1 long."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:side, :side] / side
    slope: Array = np.cos(angle) * x + np.sin(angle) * y
    return slope


def _saturated(rng: np.random.Generator) -> Array:
    """Return red, yellow, white or another corner of the cube of colours, (3, 1, 1)."""
    return rng.choice(_SHADES, (3, 1, 1))


def _rectangle(rng: np.random.Generator, side: int, size: float) -> npt.NDArray[np.bool_]:
    """Return the mask (side, side) of a random rectangle of at most that share of each side."""
    y, x = _offsets(rng, side, size)
    inside: npt.NDArray[np.bool_] = np.maximum(y, x) <= 1
    return inside


def _ellipse(rng: np.random.Generator, side: int, size: float) -> npt.NDArray[np.bool_]:
    """Return the mask (side, side) of a random ellipse, likewise."""
    y, x = _offsets(rng, side, size)
    inside: npt.NDArray[np.bool_] = np.hypot(y, x) <= 1
    return inside


def _offsets(rng: np.random.Generator, side: int, size: float) -> Array:
    """Return the offsets of pixels from a random centre, in random half-axes: (2, side, side)."""
    centre, half = rng.uniform(0, 1, (2, 1, 1)), rng.uniform(size / 4, size / 2, (2, 1, 1))
    offsets: Array = np.abs(np.mgrid[:side, :side] / side - centre) / half
    return offsets
