"""The hyperparameters of a CompVis `UNetModel`, read from its parameters' names and shapes."""

from dataclasses import dataclass

from ldm_export.errors import WeightsError
from ldm_export.weight_shapes import Shapes, indices, multipliers, same, shape_of
from ldm_runtime.manifest import UNetSpec

_NORM_GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class _Level:
    channels: int
    depth: int
    num_res_blocks: int


def read_unet(shapes: Shapes, *, num_heads: int | None, num_head_channels: int | None) -> UNetSpec:
    """Return the record of a UNet from its parameter names (as under `model.diffusion_model.`).

    Args:
        shapes: Shape of every parameter.
        num_heads: Attention heads everywhere, which no shape tells.
        num_head_channels: Channels a head, where that is what is fixed.

    Raises:
        WeightsError: A decisive tensor is missing, the shapes contradict each other, or the heads
            do not divide the channels.
    """
    model_channels, in_channels, *_ = shape_of(shapes, "input_blocks.0.0.weight", 4)
    _check_block_types(shapes, model_channels)
    levels = _levels(shapes, model_channels)
    _check_output_blocks(shapes, levels)
    _check_heads(shapes, num_heads, num_head_channels)
    return UNetSpec(
        in_channels=in_channels,
        out_channels=shape_of(shapes, "out.2.weight", 4)[0],
        model_channels=model_channels,
        channel_mult=multipliers([level.channels for level in levels], model_channels, "UNet"),
        num_res_blocks=same(
            {
                f"the number of residual blocks of level {i}": level.num_res_blocks
                for i, level in enumerate(levels)
            }
        ),
        transformer_depth=tuple(level.depth for level in levels),
        middle_depth=_middle_depth(shapes),
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        context_dim=_context_dim(shapes),
        linear_projection=_linear_projection(shapes),
    )


def _check_block_types(shapes: Shapes, model_channels: int) -> None:
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
    out = shape_of(shapes, "input_blocks.1.0.out_layers.3.weight", 4)[0]
    rows = shape_of(shapes, "input_blocks.1.0.emb_layers.1.weight", 2)[0]
    if rows != out:
        raise WeightsError(
            f"input_blocks.1.0.emb_layers.1.weight has {rows} rows for {out} channels: the time "
            "embedding scales and shifts (use_scale_shift_norm), which this version does not export"
        )


def _levels(shapes: Shapes, model_channels: int) -> list[_Level]:
    """Group the input blocks after the first into levels, each ended by a strided convolution."""
    blocks: list[dict[str, tuple[int, int]]] = [{}]
    for index in indices(shapes, "input_blocks")[1:]:
        name = f"input_blocks.{index}"
        if f"{name}.0.op.weight" in shapes:
            blocks.append({})
            continue
        channels = shape_of(shapes, f"{name}.0.out_layers.3.weight", 4)[0]
        blocks[-1][f"(channels, transformer depth) of {name}"] = channels, _depth(shapes, name)
    if not all(blocks):
        raise WeightsError(f"the UNet has a level without residual blocks ({len(blocks)} levels)")
    levels = []
    for members in blocks:
        channels, depth = same(members)
        levels.append(_Level(channels=channels, depth=depth, num_res_blocks=len(members)))
    return levels


def _depth(shapes: Shapes, block: str) -> int:
    return len(indices(shapes, f"{block}.1.transformer_blocks"))


def _middle_depth(shapes: Shapes) -> int:
    depth = _depth(shapes, "middle_block")
    if not depth:
        raise WeightsError(
            "the UNet has no attention in its middle (middle_block.1.transformer_blocks.0.*)"
        )
    return depth


def _check_output_blocks(shapes: Shapes, levels: list[_Level]) -> None:
    """Check that the way up mirrors the way down, with one more residual block a level."""
    expected = {
        index: level
        for index, level in enumerate(
            level for level in reversed(levels) for _ in range(level.num_res_blocks + 1)
        )
    }
    found = indices(shapes, "output_blocks")
    if found != list(expected):
        raise WeightsError(
            f"the UNet has {len(found)} output blocks; its {len(levels)} levels of "
            f"{levels[0].num_res_blocks} residual blocks need {len(expected)}"
        )
    for index, level in expected.items():
        name = f"output_blocks.{index}"
        channels = shape_of(shapes, f"{name}.0.out_layers.3.weight", 4)[0]
        same(
            {
                f"(channels, transformer depth) of {name}": (channels, _depth(shapes, name)),
                "that of its input level": (level.channels, level.depth),
            }
        )


def _context_dim(shapes: Shapes) -> int:
    widths = {
        name: shape_of(shapes, name, 2)[1] for name in shapes if name.endswith("attn2.to_k.weight")
    }
    if not widths:
        raise WeightsError("the UNet has no attention to a context (no attn2.to_k.weight)")
    return same(widths)


def _linear_projection(shapes: Shapes) -> bool:
    ranks = {
        f"the rank of {name}": len(shape)
        for name, shape in shapes.items()
        if name.endswith(".1.proj_in.weight")
    }
    if not ranks:
        raise WeightsError("the UNet has transformer blocks but no proj_in.weight")
    return same(ranks) == 2


def _check_heads(shapes: Shapes, num_heads: int | None, num_head_channels: int | None) -> None:
    for name in shapes:
        if not name.endswith("attn1.to_q.weight"):
            continue
        channels = shape_of(shapes, name, 2)[0]
        keys = shape_of(shapes, name.replace("to_q", "to_k"), 2)[1]
        if keys != channels:
            raise WeightsError(
                f"{name.replace('to_q', 'to_k')} has {keys} columns for {channels} channels: self-"
                "attention is disabled in this UNet, which this version does not export"
            )
        divisor = num_heads or num_head_channels or 1
        if channels % divisor:
            what = "attention heads" if num_heads else "channels a head"
            raise WeightsError(
                f"{divisor} {what} do not divide the {channels} channels of {name}; give the "
                "right number with --num-heads or --num-head-channels, or a --config that has it"
            )
