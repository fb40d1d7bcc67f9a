"""The linear map from latents to colours that a bundle previews with, fitted at export.

It is fitted to procedural images, which need no data set: smooth fields of colour, gradients,
saturated patches and edges, some of each in every image. The checkpoint's own encoder turns them
into latents; a bundle keeps these pairs, so that the fit can be repeated.
"""

import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ldm_export.golden.images import Pixels, make_images
from ldm_runtime.backends.contract import Runner
from ldm_runtime.bundle.manifest import PreviewRecord
from ldm_runtime.diagnostics.verify import Array
from ldm_runtime.latents.codec import encode_image
from ldm_runtime.latents.previews import explained_variance, preview_pixels
from ldm_runtime.specs.model import ModelSpec

_LOGGER = logging.getLogger(__name__)

#: Pairs of latents and colours, next to the encoder's graphs.
PAIRS_FILE = "preview.npz"
_HELD_OUT = 2  # images that the fit does not see
_LATENT_SIDE, _MAX_SIDE = 32, 256  # of one image, in latent pixels and in pixels

Float32Array = npt.NDArray[np.float32]


def write_pairs(path: Path, encoder: Runner, spec: ModelSpec) -> None:
    """Encode the images and store "latents", in the UNet's scale, and "colours" at their size.

    Latents are the posterior's mean. Colours are averaged over the pixels of a latent pixel.

    Args:
        path: The file.
        encoder: The autoencoder's encoder, with the checkpoint's own weights.
        spec: The model.
    """
    factor = spec.autoencoder.factor
    images = make_images(min(_LATENT_SIDE * factor, _MAX_SIDE))
    latents = [encode_image(encoder, each[None], spec) for each in images]
    np.savez(
        path,
        allow_pickle=False,
        latents=np.concatenate(latents),
        colours=_averaged(images, factor),
    )


def fit_preview(path: Path) -> PreviewRecord | None:
    """Fit the map to the pairs of `write_pairs` by least squares, the last images held out.

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


def _averaged(images: Pixels, factor: int) -> Float32Array:
    """Average (N, H, W, 3) over squares of `factor` pixels per side: (N, 3, h, w) from -1 to 1."""
    count, height, width, channels = images.shape
    shape = (count, height // factor, factor, width // factor, factor, channels)
    averages: Array = images.reshape(shape).mean(axis=(2, 4)) / 127.5 - 1
    return averages.transpose(0, 3, 1, 2).astype(np.float32)


def _least_squares(latents: Float32Array, colours: Float32Array) -> PreviewRecord:
    """Return the map that best turns latents (N, C, h, w) into colours, its R² not yet known."""
    rows = np.moveaxis(latents, 1, -1).reshape(-1, latents.shape[1]).astype(np.float64)
    rows = np.column_stack([rows, np.ones(len(rows))])
    wanted = np.moveaxis(colours, 1, -1).reshape(-1, 3).astype(np.float64)
    *matrix, bias = np.linalg.lstsq(rows, wanted, rcond=None)[0].tolist()
    red, green, blue = zip(*matrix, strict=True)
    return PreviewRecord(matrix=(red, green, blue), bias=tuple(bias), r2=math.nan)
