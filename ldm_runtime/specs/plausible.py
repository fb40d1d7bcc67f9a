"""Bounds of a model's specification that types cannot express.

A specification comes from a checkpoint at export, and from a manifest, which anybody may have
written, afterwards. Both are checked by the same function, so that what an export writes can be
opened.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

from ldm_runtime.specs.model import EdmSpec, ModelSpec, NoiseAugmentation
from ldm_runtime.specs.networks import (
    AutoencoderSpec,
    ClassEmbedderSpec,
    DepthEstimatorSpec,
    Depths,
    ImageEncoderSpec,
    NetworkSpec,
    SegmentationEncoderSpec,
    TextEncoderSpec,
    UNetSpec,
)

_MAX_SIDE = 16384  # pixels of an image
_MAX_LEVELS = 10  # a factor of 512 between image and latents
_MAX_LENGTH = 64
_MAX_SIZE = 2**31 - 1
_MAX_STEPS = 100_000
_LEAST_FEATURES = 4  # of the guidance scale: two frequencies
_MAX_TIMESTEPS = 100_000
_LEVELS = 3  # of a depth estimator's residual network
_MAX_GRID = 64  # images of 1024 pixels
_LEAST_TOKENS, _MAX_TOKENS = 3, 65536  # the first, the last and one between
#: Share of the image in the first training timestep, at least, and in the last, at most; models of
#: the papers go from 0.998 or more to 0.005 or less.
_LEAST_FIRST, _MOST_LAST = 0.5, 0.5


def implausible_fields(spec: ModelSpec) -> Iterator[str]:
    """Yield the names of the fields of a specification whose values no model has."""
    for name, network in spec.networks.items():
        for field in (*_sizes(network), *_values(network)):
            yield f"networks.{name}.{field}"
    yield from _noise(spec)
    yield from _of_augmentation(spec.noise_augmentation, spec.find(ImageEncoderSpec))
    defaults = spec.defaults
    for name, value, most in (
        ("height", defaults.height, _MAX_SIDE),
        ("width", defaults.width, _MAX_SIDE),
        ("num_inference_steps", defaults.num_inference_steps, _MAX_STEPS),
    ):
        if not 1 <= value <= most:
            yield f"defaults.{name}"


def _noise(spec: ModelSpec) -> Iterator[str]:
    """Yield the fields about noise: a UNet has a training schedule, or is of EDM."""
    if spec.edm is not None:
        if spec.unet is None or not _is_edm(spec.edm):
            yield "edm"
        if spec.alphas_cumprod:
            yield "alphas_cumprod"
        if spec.prediction_type == "sample":
            yield "prediction_type"
    elif spec.unet is not None and not _is_schedule(spec.alphas_cumprod):
        yield "alphas_cumprod"


def _is_edm(edm: EdmSpec) -> bool:
    return 0 < edm.sigma_min < edm.sigma_max < math.inf and 0 < edm.sigma_data < math.inf


def _sizes(network: NetworkSpec) -> Iterator[str]:
    """Yield the fields of a network that are integers beyond every size, or too many."""
    for field in fields(network):
        value = getattr(network, field.name)
        numbers = tuple(_flat(value))
        integers = [each for each in numbers if isinstance(each, int)]
        if len(numbers) > _MAX_LENGTH or not all(0 <= each <= _MAX_SIZE for each in integers):
            yield field.name


def _flat(value: Any) -> Iterator[Any]:  # noqa: ANN401  (of every field)
    """Yield a value that is not a tuple, or the values in one of one or two dimensions."""
    if not isinstance(value, tuple):
        yield value
        return
    for each in value:
        yield from each if isinstance(each, tuple) else (each,)


def _values(network: NetworkSpec) -> Iterator[str]:
    """Yield the fields of a network that cannot be what they are, given the others."""
    match network:
        case AutoencoderSpec():
            found = _autoencoder(network)
        case UNetSpec():
            found = _unet(network)
        case TextEncoderSpec():
            found = {
                "width": network.width >= 1,
                "max_tokens": _LEAST_TOKENS <= network.max_tokens <= _MAX_TOKENS,
                "pad_token_id": network.pad_token_id < network.vocab_size,
            }
        case ImageEncoderSpec():
            found = _image_encoder(network)
        case ClassEmbedderSpec():
            null_class = network.null_class or 0
            found = {"width": network.width >= 1, "null_class": null_class < network.num_classes}
        case SegmentationEncoderSpec():
            found = {
                "num_classes": network.num_classes >= 1,
                "out_channels": network.out_channels >= 1,
                "num_downsampling_steps": network.num_downsampling_steps < _MAX_LEVELS,
            }
        case DepthEstimatorSpec():
            found = _depth_estimator(network)
    yield from (name for name, holds in found.items() if not holds)


def _image_encoder(network: ImageEncoderSpec) -> dict[str, bool]:
    heads, patch = network.num_heads, network.patch_size
    return {
        "num_heads": 1 <= heads <= network.width and network.width % heads == 0,
        "patch_size": 1 <= patch <= network.image_size and network.image_size % patch == 0,
        "image_size": network.image_size <= _MAX_SIDE,
        "embed_dim": network.embed_dim >= 2 and network.embed_dim % 2 == 0,  # sines and cosines
        "pixel_mean": _are_finite(network.pixel_mean),
        "pixel_std": _are_finite(network.pixel_std) and min(network.pixel_std) > 0,
    }


def _of_augmentation(
    augmentation: NoiseAugmentation | None, encoder: ImageEncoderSpec | None
) -> Iterator[str]:
    """Yield the fields of a noise augmentation that are not of an image encoder's embeddings."""
    if (augmentation is None) != (encoder is None):
        yield "noise_augmentation"
    if augmentation is None or encoder is None:
        return
    mean, std, length = augmentation.mean, augmentation.std, encoder.embed_dim
    found = {
        "alphas_cumprod": _is_schedule(augmentation.alphas_cumprod),
        "mean": len(mean) == length and _are_finite(mean),
        "std": len(std) == length and _are_finite(std) and min(std, default=0) > 0,
    }
    yield from (f"noise_augmentation.{name}" for name, holds in found.items() if not holds)


def _are_finite(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) for value in values)


def _depth_estimator(network: DepthEstimatorSpec) -> dict[str, bool]:
    per_level = ("level_channels", "bottleneck_channels", "level_blocks")
    counts = {name: getattr(network, name) for name in per_level}
    return {
        **{name: len(each) == _LEVELS and min(each) >= 1 for name, each in counts.items()},
        "num_heads": network.num_heads >= 1 and network.width % network.num_heads == 0,
        "grid": 1 <= network.grid <= _MAX_GRID,
    }


def _autoencoder(network: AutoencoderSpec) -> dict[str, bool]:
    mean, std, lengths = network.latents_mean, network.latents_std, (0, network.embed_dim)
    return {
        "image_channels": network.image_channels >= 1,
        "embed_dim": network.embed_dim >= 1,
        "channel_mult": _are_levels(network.channel_mult),
        "latent_scale_factor": 0 < network.latent_scale_factor < math.inf,
        "latents_mean": len(mean) in lengths and all(map(math.isfinite, mean)),
        "latents_std": len(std) == len(mean) and all(0 < each < math.inf for each in std),
    }


def _unet(network: UNetSpec) -> dict[str, bool]:
    heads = (network.num_heads, network.num_head_channels)
    blocks, shallow = _unet_blocks(network), network.shallow_blocks
    return {
        "in_channels": network.in_channels >= network.out_channels,
        "out_channels": network.out_channels >= 1,
        "channel_mult": _are_levels(network.channel_mult),
        "num_heads": any(heads),
        "cross_attention_only": max(network.cross_attention_only, default=0)
        < len(network.channel_mult),
        "num_classes": network.num_classes != 0,
        "guidance_dim": network.guidance_dim is None or network.guidance_dim >= _LEAST_FEATURES,
        **blocks,
        "shallow_blocks": shallow is None
        or (all(blocks.values()) and 1 <= shallow <= network.most_shallow_blocks),
    }


def _unet_blocks(network: UNetSpec) -> dict[str, bool]:
    """Return whether there is a number of blocks for every level, and a depth for every block."""
    levels, number = len(network.channel_mult), network.num_res_blocks
    numbers = number if isinstance(number, tuple) else (number,) * levels
    up = network.transformer_depth if network.output_depth is None else network.output_depth
    return {
        "num_res_blocks": len(numbers) == levels and all(each >= 1 for each in numbers),
        "transformer_depth": _are_depths(network.transformer_depth, numbers),
        "output_depth": _are_depths(up, [each + 1 for each in numbers]),
    }


def _are_depths(depths: Depths, numbers: Sequence[int]) -> bool:
    return len(depths) == len(numbers) and all(
        isinstance(depth, int) or len(depth) == number
        for depth, number in zip(depths, numbers, strict=True)
    )


def _are_levels(channel_mult: tuple[int, ...]) -> bool:
    return 1 <= len(channel_mult) <= _MAX_LEVELS and min(channel_mult) >= 1


def _is_schedule(alphas: tuple[float, ...]) -> bool:
    """Return whether the share of the image falls all the way, from most of it to little."""
    return (
        2 <= len(alphas) <= _MAX_TIMESTEPS
        and _LEAST_FIRST <= alphas[0] < 1
        and 0 < alphas[-1] <= _MOST_LAST
        and all(later < earlier for earlier, later in pairwise(alphas))
    )
