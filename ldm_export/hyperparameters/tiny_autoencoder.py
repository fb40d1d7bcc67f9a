"""The hyperparameters of a tiny autoencoder, read from the names and shapes of its decoder."""

import re

from ldm_export.errors import WeightsError
from ldm_export.hyperparameters.shapes import Shapes, shape_of
from ldm_runtime.specs.networks import AutoencoderSpec

_FIRST = "decoder.layers.0.weight"
_UPSAMPLED = re.compile(r"decoder\.layers\.(\d+)\.weight")
_BLOCK = re.compile(r"decoder\.layers\.(\d+)\.conv\.0\.weight")


def read_tiny_autoencoder(shapes: Shapes, autoencoder: AutoencoderSpec) -> AutoencoderSpec:
    """Return the record of a tiny autoencoder whose decoder decodes the latents of another.

    Args:
        shapes: Shape of every parameter of its decoder.
        autoencoder: The other, that of the model.

    Raises:
        WeightsError: A decisive tensor is missing, or its latents or images are not the other's.
    """
    if autoencoder.latents_mean:
        raise WeightsError(
            "a tiny decoder takes latents that are scaled alone, and those of this model are "
            "normalised per channel (latents_mean, latents_std); leave --tiny-decoder out"
        )
    channels, latent_channels, *_ = shape_of(shapes, _FIRST, 4)
    convolutions = _numbers(_UPSAMPLED, shapes)
    image_channels = shape_of(shapes, f"decoder.layers.{convolutions[-1]}.weight", 4)[0]
    levels = len(convolutions) - 1  # the first and the last are not behind an upsampling
    blocks = [number for number in _numbers(_BLOCK, shapes) if number < convolutions[1]]
    record = AutoencoderSpec(
        kind="tiny",
        image_channels=image_channels,
        channels=channels,
        channel_mult=(1,) * levels,
        num_res_blocks=len(blocks),
        attention_levels=(),
        middle_attention=False,
        z_channels=latent_channels,
        embed_dim=latent_channels,
        codebook_size=None,
        latent_scale_factor=1.0,
        latents_mean=(),
        latents_std=(),
    )
    for what, mine, theirs in (
        ("channels of latents", latent_channels, autoencoder.embed_dim),
        ("channels of images", image_channels, autoencoder.image_channels),
        ("pixels per latent pixel", record.factor, autoencoder.factor),
    ):
        if mine != theirs:
            raise WeightsError(
                f"the tiny decoder has {mine} {what} and the model's own {theirs}: it is of "
                "another kind of model; leave --tiny-decoder out, or give the one for this kind"
            )
    return record


def _numbers(pattern: re.Pattern[str], shapes: Shapes) -> list[int]:
    found = sorted(int(match[1]) for name in shapes if (match := pattern.fullmatch(name)))
    if len(found) < 2:
        raise WeightsError(
            f"the tiny decoder has {len(found)} tensors like {pattern.pattern!r}; at least two "
            "were expected: is the file complete?"
        )
    return found
