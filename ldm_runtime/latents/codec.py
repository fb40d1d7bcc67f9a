"""Autoencoder calls: images to latents, latents to images, and pixels to floats and back."""

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.backends.contract import Runner
from ldm_runtime.specs.model import Decoder, ModelSpec
from ldm_runtime.specs.networks import AutoencoderSpec
from ldm_runtime.specs.tasks import runs_in_patches
from ldm_runtime.tiling.patches import over_patches
from ldm_runtime.tiling.tiles import decode_tiled

Float32Array = npt.NDArray[np.float32]


def encode_image(engine: Runner, pixels: npt.NDArray[np.uint8], spec: ModelSpec) -> Float32Array:
    """Return the latents (B, C, h, w) of images, in the UNet's scale; see `encode_pixels`.

    Args:
        engine: The autoencoder's encoder.
        pixels: RGB, (B, H, W, 3).
        spec: The model.

    Raises:
        ValueError: A side is not a multiple of the autoencoder's factor.
    """
    return to_unet_scale(encode_pixels(engine, to_float(pixels), spec), spec.autoencoder)


def to_unet_scale(latents: Float32Array, autoencoder: AutoencoderSpec) -> Float32Array:
    """Turn latents (B, C, h, w) as the autoencoder has them into the UNet's.

    They are scaled, in some models after each channel is normalised. Source: diffusers'
    `StableDiffusionXLImg2ImgPipeline.prepare_latents`.
    """
    scale = float(autoencoder.latent_scale_factor)
    if not autoencoder.latents_mean:
        return latents * scale
    mean, std = _statistics(autoencoder)
    return (latents - mean) * scale / std


def from_unet_scale(latents: Float32Array, autoencoder: AutoencoderSpec) -> Float32Array:
    """Turn latents (B, C, h, w) of the UNet into the autoencoder's: `to_unet_scale` backwards."""
    scale = float(autoencoder.latent_scale_factor)
    if not autoencoder.latents_mean:
        return latents / scale
    mean, std = _statistics(autoencoder)
    return latents * std / scale + mean


def _statistics(autoencoder: AutoencoderSpec) -> tuple[Float32Array, Float32Array]:
    """Return mean and standard deviation of every channel, (C, 1, 1) each."""
    mean = np.array(autoencoder.latents_mean, dtype=np.float32)
    std = np.array(autoencoder.latents_std, dtype=np.float32)
    return mean[:, None, None], std[:, None, None]


def encode_pixels(engine: Runner, image: Float32Array, spec: ModelSpec) -> Float32Array:
    """Return the latents (B, C, h, w) of images (B, 3, H, W) from -1 to 1, unscaled.

    For a KL autoencoder these are the means of its posterior. CompVis and diffusers sample from it
    instead; its deviation is small next to the noise that sampling adds, and a mean is the same
    every time. For a VQ autoencoder they are the latents before quantization, as in CompVis.

    Args:
        engine: The autoencoder's encoder.
        image: The images.
        spec: The model.

    Raises:
        ValueError: A side is not a multiple of the autoencoder's factor.
    """
    factor = spec.autoencoder.factor
    height, width = image.shape[2:]
    if height % factor or width % factor:
        raise ValueError(
            f"the image has {width}x{height} pixels; make both sides multiples of {factor}"
        )
    moments: Float32Array = engine.run({"image": image})["moments"]
    mean: Float32Array = moments[:, : spec.autoencoder.embed_dim]
    return mean


def to_float(pixels: npt.NDArray[np.uint8]) -> Float32Array:
    """Turn bytes (B, H, W, 3) into (B, 3, H, W) from -1 to 1."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / 127.5 - 1


def decode_latents(
    engine: Runner,
    latents: Float32Array,
    spec: ModelSpec,
    tile_size: int = 0,
    decoder: Decoder = "full",
) -> list[Image.Image]:
    """Return the images decoded from the UNet's latents (B, C, h, w).

    Args:
        engine: The decoder.
        latents: Latents in the UNet's scale, as `pipeline.sampling.sample_latents` ends with.
        spec: The model.
        tile_size: Side in pixels of the tiles to decode in, one image at a time; 0 decodes the
            whole batch at once. Super-resolution models decode in the patches of `patches` instead.
        decoder: Which of the model's it is: the tiny one takes latents in the UNet's scale.

    Raises:
        ValueError: The tile size is not a multiple of the autoencoder's factor, or too small.
    """
    if decoder == "full":
        latents = from_unet_scale(latents, spec.autoencoder)
    factor = spec.autoencoder.factor
    if tile_size % factor:
        raise ValueError(f"tile_size {tile_size} is not a multiple of {factor}; make it one")

    def decode(part: Float32Array) -> Float32Array:
        return engine.run({"latents": part})["image"]

    if runs_in_patches(spec):
        image = over_patches(decode, latents, factor)
    elif tile_size:
        image = decode_tiled(decode, latents, factor, tile_size // factor)
    else:
        image = decode(latents)
    return [Image.fromarray(each) for each in to_uint8(image)]


def to_uint8(image: Float32Array) -> npt.NDArray[np.uint8]:
    """Turn (B, 3, H, W) from -1 to 1 into (B, H, W, 3) bytes, clipping and then rounding.

    diffusers rounds too; CompVis truncates.
    """
    unit = np.clip(image / 2 + 0.5, 0.0, 1.0)
    return np.ascontiguousarray(np.rint(unit * 255).astype(np.uint8).transpose(0, 2, 3, 1))
