"""The features that a checkpoint's own files state about the model, next to its weights."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ldm_runtime.specs.model import EdmSpec, NullPrompt, PredictionType


@dataclass(frozen=True, kw_only=True)
class StatedSchedule:
    """The noise schedule of training, as the scheduler of a diffusers folder states it.

    Attributes:
        linear_start: First beta …
        linear_end: … and the last, of a schedule linear in the square roots of beta.
        num_train_timesteps: Number of betas.
        betas: The betas one by one where they are of another kind, and None of that kind.
    """

    linear_start: float
    linear_end: float
    num_train_timesteps: int
    betas: tuple[float, ...] | None = None


def cosine_betas(number: int) -> tuple[float, ...]:
    """Return the betas of Nichol and Dhariwal 2021 (arXiv:2102.09672), equation 17, up to 0.999.

    Configurations call that schedule "squaredcos_cap_v2".
    """
    times = np.arange(number + 1, dtype=np.float64) / number
    alphas = np.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    return tuple(np.minimum(1 - alphas[1:] / alphas[:-1], 0.999).tolist())


@dataclass(frozen=True, kw_only=True)
class LatentScale:
    """The scale of an autoencoder's latents, as its own files state it; None where they do not.

    Attributes:
        factor: Multiplies them into a UNet's.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
    """

    factor: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class FileFields:
    """The features that a checkpoint's files state; None where they say nothing.

    Attributes:
        prediction_type: Prediction target of the UNet.
        zero_terminal_snr: Whether the last training timestep was nothing but noise.
        height: Height in pixels that the model is meant for.
        width: Width in pixels that the model is meant for.
        schedule: Noise schedule of training.
        latent_scale_factor: Multiplies the autoencoder's latents into the UNet's.
        num_heads: Attention heads of the UNet.
        num_head_channels: Channels per head of the UNet, instead of `num_heads`.
        text_num_heads: Attention heads of the text encoder.
        text_activation: Feed-forward activation of the text encoder.
        text_layers_trimmed: Whether the layers that the model does not run are left out of the
            text encoder. Stable Diffusion 2 reads OpenCLIP one layer before its end: released files
            hold all 24 layers, a diffusers folder the 23 that are run, after the last of which the
            final LayerNorm follows. Not said of encoders that are counted.
        image_num_heads: Attention heads of the image encoder.
        image_activation: Feed-forward activation of the image encoder.
        image_size: Pixels per side that images are resized to for the image encoder.
        pixel_mean: Mean of red, green and blue for the image encoder …
        pixel_std: … and their standard deviation.
        augmentation_schedule: Noise schedule of the embeddings of images.
        null_prompt: Whether guidance steers away from the encoded empty prompt, or from zeros.
        scales_image: Whether the UNet takes the latents of an image to edit in its own scale.
        edm: Noise levels, if the model is of EDM.
        latents_mean: Mean of each channel of the autoencoder's latents.
        latents_std: Standard deviation of each channel.
        vae_fits_fp16: Whether the autoencoder's files state that half precision can hold it.
        vae_scale: Scale of an autoencoder that takes the place of the model's: not what the UNet
            was trained with.
        global_step: Steps of training.
        weights: Set of trained weights, where their values tell which of two is the model.
    """

    prediction_type: PredictionType | None = None
    zero_terminal_snr: bool = False
    height: int | None = None
    width: int | None = None
    schedule: StatedSchedule | None = None
    latent_scale_factor: float | None = None
    num_heads: int | None = None
    num_head_channels: int | None = None
    text_num_heads: int | None = None
    text_activation: Literal["quick_gelu", "gelu"] | None = None
    text_layers_trimmed: bool = False
    image_num_heads: int | None = None
    image_activation: Literal["quick_gelu", "gelu"] | None = None
    image_size: int | None = None
    pixel_mean: tuple[float, float, float] | None = None
    pixel_std: tuple[float, float, float] | None = None
    augmentation_schedule: StatedSchedule | None = None
    null_prompt: NullPrompt | None = None
    scales_image: bool | None = None
    edm: EdmSpec | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    vae_fits_fp16: bool = False
    vae_scale: LatentScale = field(default_factory=LatentScale)
    global_step: int | None = None
    weights: Literal["ema", "model"] | None = None
