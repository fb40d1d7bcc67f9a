"""The hyperparameters of an autoencoder, read from the names and shapes of its parameters."""

from typing import Literal

from ldm_export.errors import WeightsError
from ldm_export.hyperparameters.shapes import Shapes, indices, members, multipliers, same, shape_of
from ldm_runtime.specs.networks import AutoencoderSpec

_NORM_GROUPS = 32
_IMAGE_CHANNELS = 3
_CODEBOOK = "quantize.embedding.weight"

Kind = Literal["kl", "vq"]


def read_autoencoder(
    shapes: Shapes,
    *,
    latent_scale_factor: float,
    latents_mean: tuple[float, ...] = (),
    latents_std: tuple[float, ...] = (),
) -> AutoencoderSpec:
    """Return the record of an autoencoder from its parameters (as under `first_stage_model.`).

    Args:
        shapes: Shape of every parameter of encoder and decoder.
        latent_scale_factor: Multiplies its latents into the UNet's, which no shape tells.
        latents_mean: Mean of each channel, subtracted before that; empty where it is not.
        latents_std: Standard deviation of each channel, by which the difference is divided.

    Raises:
        WeightsError: A decisive tensor is missing, or encoder and decoder contradict each other.
    """
    channels, image_channels, *_ = shape_of(shapes, "encoder.conv_in.weight", 4)
    if channels % _NORM_GROUPS:
        raise WeightsError(
            f"the autoencoder has {channels} channels (encoder.conv_in.weight); group "
            f"normalisation needs a multiple of {_NORM_GROUPS}"
        )
    encoder = _level_channels(shapes, "encoder.down")
    decoder = _level_channels(shapes, "decoder.up")
    same({"channels of the encoder's levels": encoder, "channels of the decoder's": decoder})
    _check_resampling(shapes, len(encoder))
    if image_channels != _IMAGE_CHANNELS:
        raise WeightsError(
            f"the autoencoder takes images of {image_channels} channels (encoder.conv_in.weight); "
            f"only those of {_IMAGE_CHANNELS}, red, green and blue, are exported"
        )
    kind: Kind = "vq" if _CODEBOOK in shapes else "kl"
    z_channels, embed_dim = _latent_channels(shapes, kind)
    same(
        {
            "the number of channels encoder.conv_in.weight reads": image_channels,
            "the number decoder.conv_out.weight writes": shape_of(
                shapes, "decoder.conv_out.weight", 4
            )[0],
        }
    )
    return AutoencoderSpec(
        kind=kind,
        image_channels=image_channels,
        channels=channels,
        channel_mult=multipliers(encoder, channels, "autoencoder"),
        num_res_blocks=_num_res_blocks(shapes, len(encoder)),
        attention_levels=_attention_levels(shapes),
        middle_attention=_middle_attention(shapes),
        z_channels=z_channels,
        embed_dim=embed_dim,
        codebook_size=_codebook_size(shapes, embed_dim) if kind == "vq" else None,
        latent_scale_factor=latent_scale_factor,
        latents_mean=latents_mean,
        latents_std=latents_std,
    )


def _level_channels(shapes: Shapes, path: str) -> tuple[int, ...]:
    levels = members(shapes, path)
    if not levels:
        raise WeightsError(
            f"the autoencoder has no level under {path}; is the checkpoint complete?"
        )
    return tuple(
        same(
            {
                name: shape_of(shapes, name, 4)[0]
                for block in indices(names, f"{path}.{level}.block") or [0]
                for name in [f"{path}.{level}.block.{block}.conv1.weight"]
            }
        )
        for level, names in levels.items()
    )


def _num_res_blocks(shapes: Shapes, num_levels: int) -> int:
    counts = {}
    all_down, all_up = members(shapes, "encoder.down"), members(shapes, "decoder.up")
    for level in range(num_levels):
        down, up = f"encoder.down.{level}.block", f"decoder.up.{level}.block"
        counts[f"the number of {down}"] = len(indices(all_down[level], down))
        counts[f"the number of {up}, less one,"] = len(indices(all_up[level], up)) - 1
    return same(counts)


def _attention_levels(shapes: Shapes) -> tuple[int, ...]:
    sides = {
        f"levels with attention in {path}": tuple(
            level
            for level, names in members(shapes, path).items()
            if indices(names, f"{path}.{level}.attn")
        )
        for path in ("encoder.down", "decoder.up")
    }
    return same(sides)


def _middle_attention(shapes: Shapes) -> bool:
    return same(
        {
            f"the presence of {place}*": any(name.startswith(place) for name in shapes)
            for place in ("encoder.mid.attn_1.", "decoder.mid.attn_1.")
        }
    )


def _codebook_size(shapes: Shapes, embed_dim: int) -> int:
    size, width = shape_of(shapes, _CODEBOOK, 2)
    same(
        {
            f"columns of {_CODEBOOK}": width,
            "the number of channels post_quant_conv.weight reads": embed_dim,
        }
    )
    return size


def _check_resampling(shapes: Shapes, num_levels: int) -> None:
    for level in range(num_levels):
        down = f"encoder.down.{level}.downsample.conv.weight"
        up = f"decoder.up.{level}.upsample.conv.weight"
        for name, expected in ((down, level < num_levels - 1), (up, level > 0)):
            if (name in shapes) != expected:
                raise WeightsError(
                    f"the tensor {name} {'is missing' if expected else 'is unexpected'}: level "
                    f"{level} of {num_levels} {'has' if expected else 'has no'} resampling"
                )


def _latent_channels(shapes: Shapes, kind: Kind) -> tuple[int, int]:
    """Return (z_channels, embed_dim), checked over the four convolutions that touch latents.

    A KL encoder gives two numbers per channel, mean and log-variance; a VQ encoder one.
    """
    z_channels = shape_of(shapes, "decoder.conv_in.weight", 4)[1]
    embed_dim = shape_of(shapes, "post_quant_conv.weight", 4)[1]
    numbers = 2 if kind == "kl" else 1
    found = {
        "encoder.conv_out.weight": shape_of(shapes, "encoder.conv_out.weight", 4)[:1],
        "quant_conv.weight": shape_of(shapes, "quant_conv.weight", 4)[:2],
        "post_quant_conv.weight": shape_of(shapes, "post_quant_conv.weight", 4)[:2],
    }
    expected = {
        "encoder.conv_out.weight": (numbers * z_channels,),
        "quant_conv.weight": (numbers * embed_dim, numbers * z_channels),
        "post_quant_conv.weight": (z_channels, embed_dim),
    }
    for name, shape in found.items():
        if shape != expected[name]:
            raise WeightsError(
                f"{name} begins with {shape}, but a {kind.upper()} autoencoder of z_channels "
                f"{z_channels} and embed_dim {embed_dim} (decoder.conv_in.weight, "
                f"post_quant_conv.weight) has {expected[name]}"
            )
    return z_channels, embed_dim
