"""Previews of latents without the decoder: one pixel per latent pixel, by a linear map.

The map is fitted when a bundle is exported and stored in its manifest. It costs so little that
every step of a request can be shown.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.bundle.manifest import PreviewRecord
from ldm_runtime.latents.codec import to_uint8

Float32Array = npt.NDArray[np.float32]


def preview_image(
    latents: Float32Array, record: PreviewRecord, scale: int = 1
) -> list[Image.Image]:
    """Return a small image of every sample of latents, with its noise.

    Args:
        latents: (B, C, h, w) in the UNet's scale, such as `Step.latents`.
        record: The bundle's map, from its manifest.
        scale: Pixels per latent pixel in each direction, all of the same colour.

    Raises:
        ValueError: The latents are not those of this bundle's model, or `scale` is below 1.
    """
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    pixels = to_uint8(preview_pixels(latents, record))
    enlarged = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    return [Image.fromarray(each) for each in enlarged]


def preview_pixels(latents: Float32Array, record: PreviewRecord) -> Float32Array:
    """Map latents (B, C, h, w) in the UNet's scale to red, green and blue (B, 3, h, w).

    Where the map is inaccurate, colours can lie outside -1 to 1.

    Raises:
        ValueError: The latents have another shape.
    """
    channels = len(record.matrix[0])
    if latents.ndim != 4 or latents.shape[1] != channels:
        wanted = f"(batch, {channels}, height, width)"
        raise ValueError(f"latents have shape {latents.shape}; this bundle previews {wanted}")
    matrix = np.array(record.matrix, dtype=np.float32)
    bias = np.array(record.bias, dtype=np.float32)
    colours: Float32Array = np.einsum("rc,bchw->brhw", matrix, latents) + bias[:, None, None]
    return colours


def explained_variance(predicted: Float32Array, actual: Float32Array) -> float:
    """Return R², the share of the variance of every channel of (B, C, h, w) that is predicted.

    Variances are summed over the channels. A prediction of each channel's mean has 0.
    """
    wanted = actual.astype(np.float64)
    variance = np.square(wanted - wanted.mean(axis=(0, 2, 3), keepdims=True)).sum()
    return float(1 - np.square(wanted - predicted).sum() / variance)
