"""The hyperparameters of a CompVis `UNetModel`, read from its parameters' names and shapes."""

from ldm_export.errors import WeightsError
from ldm_export.hyperparameters.shapes import Shapes, multipliers, same, shape_of
from ldm_export.hyperparameters.unet_attention import (
    attention_kind,
    check_heads,
    context_dim,
    linear_projection,
    middle_depth,
)
from ldm_export.hyperparameters.unet_levels import (
    cross_attention_only,
    depths_of,
    num_res_blocks_of,
    read_levels,
    resampling_of,
)
from ldm_runtime.specs.networks import UNetSpec

_NORM_GROUPS = 32


def read_unet(
    shapes: Shapes,
    *,
    num_heads: int | None,
    num_head_channels: int | None,
    blocks_removed: bool = False,
) -> UNetSpec:
    """Return the record of a UNet from its parameter names (as under `model.diffusion_model.`).

    Args:
        shapes: Shape of every parameter.
        num_heads: Attention heads everywhere, which no shape tells.
        num_head_channels: Channels per head, where that is what is fixed.
        blocks_removed: Whether the UNet may lack its middle, or a part of that, and its two halves
            may differ. Where they may not, it is a fault of the file.

    Raises:
        WeightsError: A decisive tensor is missing, the shapes contradict each other, or the heads
            do not divide the channels.
    """
    model_channels, in_channels, *_ = shape_of(shapes, "input_blocks.0.0.weight", 4)
    _check_entry(shapes, model_channels)
    resampling = resampling_of(shapes)
    levels = read_levels(shapes, resampling, blocks_removed=blocks_removed)
    transformer_depth, output_depth = depths_of(levels)
    kind = attention_kind(shapes)
    check_heads(shapes, num_heads, num_head_channels)
    return UNetSpec(
        in_channels=in_channels,
        out_channels=shape_of(shapes, "out.2.weight", 4)[0],
        model_channels=model_channels,
        channel_mult=multipliers([level.channels for level in levels], model_channels, "UNet"),
        num_res_blocks=num_res_blocks_of(levels),
        attention=kind,
        transformer_depth=transformer_depth,
        output_depth=output_depth,
        middle_depth=middle_depth(shapes, blocks_removed=blocks_removed),
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        context_dim=context_dim(shapes) if kind == "transformer" else None,
        linear_projection=kind == "transformer" and linear_projection(shapes),
        cross_attention_only=cross_attention_only(shapes, levels),
        vector_dim=_columns(shapes, "label_emb.0.0.weight"),
        num_classes=_num_classes(shapes),
        guidance_dim=_columns(shapes, "time_embedding.cond_proj.weight"),
        scale_shift_norm=_scale_shift_norm(shapes),
        resblock_updown=resampling == "residual blocks",
        shallow_blocks=None,
    )


def _columns(shapes: Shapes, name: str) -> int | None:
    return shape_of(shapes, name, 2)[1] if name in shapes else None


def _num_classes(shapes: Shapes) -> int | None:
    name = "label_emb.weight"
    return shape_of(shapes, name, 2)[0] if name in shapes else None


def _check_entry(shapes: Shapes, model_channels: int) -> None:
    if model_channels % _NORM_GROUPS:
        raise WeightsError(
            f"the UNet has {model_channels} channels (input_blocks.0.0.weight); group "
            f"normalisation needs a multiple of {_NORM_GROUPS}"
        )
    embedding = shape_of(shapes, "time_embed.0.weight", 2)
    if embedding != (4 * model_channels, model_channels):
        raise WeightsError(
            f"time_embed.0.weight has shape {embedding}, but input_blocks.0.0.weight has "
            f"{model_channels} channels, which makes it {(4 * model_channels, model_channels)}"
        )


def _scale_shift_norm(shapes: Shapes) -> bool:
    """Return whether the time embedding has two rows per channel, or one."""
    rows = {}
    for name in shapes:
        if name.endswith(".emb_layers.1.weight"):
            block = name.removesuffix(".emb_layers.1.weight")
            out = shape_of(shapes, f"{block}.out_layers.3.weight", 4)[0]
            rows[f"(rows / channels) of {name}"] = shape_of(shapes, name, 2)[0] / out
    if not rows:
        raise WeightsError("the UNet has no time embedding (input_blocks.1.0.emb_layers.1.weight)")
    ratio = same(rows)
    if ratio not in (1, 2):
        raise WeightsError(
            f"{next(iter(rows))} is {ratio:g}; it is 1 where the time embedding is added and 2 "
            "where it scales and shifts (use_scale_shift_norm)"
        )
    return ratio == 2
