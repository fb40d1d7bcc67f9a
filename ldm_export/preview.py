"""The linear map from latents to colours that a bundle previews with, fitted at export.

What there is to fit are procedural pictures, which need no data set: smooth fields of colour,
gradients, saturated patches and edges, some of each in every picture. The checkpoint's own encoder
turns them into latents; a bundle keeps these pairs, so that anyone can fit them again.
"""

import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends import Runner
from ldm_runtime.images import encode_image, to_uint8
from ldm_runtime.manifest import ModelSpec, PreviewRecord
from ldm_runtime.previews import explained_variance, preview_pixels

_LOGGER = logging.getLogger(__name__)

#: Pairs of latents and colours, beside the encoder's graphs.
PAIRS_FILE = "preview.npz"
_PICTURES, _HELD_OUT = 6, 2
_LATENT_SIDE, _MAX_SIDE = 32, 256  # of one picture, in latent pixels and in pixels
_SHADES = (-1.0, 1.0)  # of a saturated colour's channels

Pixels = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]


def write_pairs(path: Path, encoder: Runner, spec: ModelSpec) -> None:
    """Encode the pictures and store "latents", in the UNet's scale, and "colours" at their size.

    Latents are the posterior's mean. Colours are averaged over the pixels of a latent pixel.

    Args:
        path: The file.
        encoder: The autoencoder's encoder, with the checkpoint's own weights.
        spec: What the checkpoint is.
    """
    factor = spec.autoencoder.factor
    pictures = draw_pictures(min(_LATENT_SIDE * factor, _MAX_SIDE))
    latents = [encode_image(encoder, each[None], spec) for each in pictures]
    np.savez(
        path,
        allow_pickle=False,
        latents=np.concatenate(latents),
        colours=_averaged(pictures, factor),
    )


def fit_preview(path: Path) -> PreviewRecord | None:
    """Fit the map to the pairs of `write_pairs` by least squares, the last pictures held out.

    Returns:
        The map, however good or bad it is, or None if the latents are not all finite.
    """
    with np.load(path, allow_pickle=False) as file:
        latents, colours = file["latents"], file["colours"]
    if not np.isfinite(latents).all():
        _LOGGER.warning("the encoder gives latents that are not finite; there will be no previews")
        return None
    record = _least_squares(latents[:-_HELD_OUT], colours[:-_HELD_OUT])
    predicted = preview_pixels(latents[-_HELD_OUT:], record)
    return replace(record, r2=explained_variance(predicted, colours[-_HELD_OUT:]))


def draw_pictures(side: int) -> Pixels:
    """Return the pictures, RGB (N, side, side, 3): the same ones every time."""
    pictures = [_draw(np.random.default_rng(seed), side) for seed in range(_PICTURES)]
    return to_uint8(np.stack(pictures).astype(np.float32))


def _draw(rng: np.random.Generator, side: int) -> Array:
    """Return a picture (3, side, side) from -1 to 1."""
    picture = _smooth(rng, side)
    for make in (_gradient, _stripes):
        picture = np.where(_rectangle(rng, side, 0.5), make(rng, side), picture)
    for shape in (_rectangle, _ellipse) * 5:
        picture = np.where(shape(rng, side, 0.25), _saturated(rng), picture)
    return picture


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
    """Return how far each pixel (side, side) lies in a random direction; a side is 1 long."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:side, :side] / side
    slope: Array = np.cos(angle) * x + np.sin(angle) * y
    return slope


def _saturated(rng: np.random.Generator) -> Array:
    """Return red, yellow, white or another corner of the cube of colours, (3, 1, 1)."""
    return rng.choice(_SHADES, (3, 1, 1))


def _rectangle(rng: np.random.Generator, side: int, size: float) -> npt.NDArray[np.bool_]:
    """Return where (side, side) a random rectangle lies, of at most that share of each side."""
    y, x = _offsets(rng, side, size)
    inside: npt.NDArray[np.bool_] = np.maximum(y, x) <= 1
    return inside


def _ellipse(rng: np.random.Generator, side: int, size: float) -> npt.NDArray[np.bool_]:
    """Return where (side, side) a random ellipse lies, likewise."""
    y, x = _offsets(rng, side, size)
    inside: npt.NDArray[np.bool_] = np.hypot(y, x) <= 1
    return inside


def _offsets(rng: np.random.Generator, side: int, size: float) -> Array:
    """Return how far each pixel lies from a random centre, in random half-axes: (2, side, side)."""
    centre, half = rng.uniform(0, 1, (2, 1, 1)), rng.uniform(size / 4, size / 2, (2, 1, 1))
    offsets: Array = np.abs(np.mgrid[:side, :side] / side - centre) / half
    return offsets


def _averaged(pictures: Pixels, factor: int) -> Float32Array:
    """Average (N, H, W, 3) over squares of `factor` pixels a side: (N, 3, h, w) from -1 to 1."""
    count, height, width, channels = pictures.shape
    shape = (count, height // factor, factor, width // factor, factor, channels)
    averages: Array = pictures.reshape(shape).mean(axis=(2, 4)) / 127.5 - 1
    return averages.transpose(0, 3, 1, 2).astype(np.float32)


def _least_squares(latents: Float32Array, colours: Float32Array) -> PreviewRecord:
    """Return the map that best turns latents (N, C, h, w) into colours, its R² not yet known."""
    rows = np.moveaxis(latents, 1, -1).reshape(-1, latents.shape[1]).astype(np.float64)
    rows = np.column_stack([rows, np.ones(len(rows))])
    wanted = np.moveaxis(colours, 1, -1).reshape(-1, 3).astype(np.float64)
    *matrix, bias = np.linalg.lstsq(rows, wanted, rcond=None)[0].tolist()
    red, green, blue = zip(*matrix, strict=True)
    return PreviewRecord(matrix=(red, green, blue), bias=tuple(bias), r2=math.nan)
