"""The hyperparameters of a CompVis `UNetModel`, read from its parameters' names and shapes."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from ldm_export.errors import WeightsError
from ldm_export.hyperparameters.shapes import Shapes, indices, members, multipliers, same, shape_of
from ldm_export.hyperparameters.unet_attention import (
    attention_depth,
    attention_kind,
    check_heads,
    context_dim,
    linear_projection,
    middle_depth,
)
from ldm_runtime.specs.networks import UNetSpec

_NORM_GROUPS = 32

Resampling = Literal["convolutions", "residual blocks"]


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
        num_head_channels: Channels per head, where that is what is fixed.

    Raises:
        WeightsError: A decisive tensor is missing, the shapes contradict each other, or the heads
            do not divide the channels.
    """
    model_channels, in_channels, *_ = shape_of(shapes, "input_blocks.0.0.weight", 4)
    _check_entry(shapes, model_channels)
    resampling = _resampling(shapes)
    levels = _levels(shapes, resampling)
    _check_output_blocks(shapes, levels)
    kind = attention_kind(shapes)
    check_heads(shapes, num_heads, num_head_channels)
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
        attention=kind,
        transformer_depth=tuple(level.depth for level in levels),
        middle_depth=middle_depth(shapes),
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        context_dim=context_dim(shapes) if kind == "transformer" else None,
        linear_projection=kind == "transformer" and linear_projection(shapes),
        vector_dim=_vector_dim(shapes),
        scale_shift_norm=_scale_shift_norm(shapes),
        resblock_updown=resampling == "residual blocks",
    )


def _vector_dim(shapes: Shapes) -> int | None:
    name = "label_emb.0.0.weight"
    return shape_of(shapes, name, 2)[1] if name in shapes else None


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


def _resampling(shapes: Shapes) -> Resampling:
    """Return the kind of layer that changes the resolution between levels."""
    ends = [name for name in shapes if name.startswith("input_blocks.")]
    if any(name.endswith(".0.op.weight") for name in ends):
        return "convolutions"
    return "residual blocks" if _second_blocks(shapes) else "convolutions"


def _second_blocks(shapes: Shapes) -> int:
    """Return how many output blocks end in a residual block that doubles the resolution."""
    return sum(
        any(f"output_blocks.{index}.{place}.in_layers.2.weight" in shapes for place in (1, 2))
        for index in indices(shapes, "output_blocks")
    )


def _level_ends(shapes: Shapes, blocks: Collection[int], resampling: Resampling) -> list[int]:
    """Return the input blocks that halve the resolution.

    A residual block that halves it has the same parameters as any other. There are as many as
    blocks that double it again, and as levels have equally many blocks, at equal distances.
    """
    if resampling == "convolutions":
        return [index for index in blocks if f"input_blocks.{index}.0.op.weight" in shapes]
    num_levels = _second_blocks(shapes) + 1
    if len(blocks) % num_levels:
        raise WeightsError(
            f"the UNet has {len(blocks)} input blocks, which its {num_levels} levels "
            "(as many as output blocks that double the resolution, and one more) do not share "
            "evenly"
        )
    blocks_per_level = len(blocks) // num_levels
    return list(range(blocks_per_level, len(blocks), blocks_per_level))


def _levels(shapes: Shapes, resampling: Resampling) -> list[_Level]:
    """Group the input blocks after the first into levels."""
    names = members(shapes, "input_blocks")
    ends = _level_ends(shapes, names, resampling)
    blocks: list[dict[str, tuple[int, int]]] = [{}]
    for index in range(1, len(names)):
        if index in ends:
            blocks.append({})
        else:
            blocks[-1] |= _channels_and_depth(shapes, names[index], f"input_blocks.{index}")
    if not all(blocks):
        raise WeightsError(f"the UNet has a level without residual blocks ({len(blocks)} levels)")
    levels = []
    for found in blocks:
        channels, depth = same(found)
        levels.append(_Level(channels=channels, depth=depth, num_res_blocks=len(found)))
    if resampling == "residual blocks":
        for index, level in zip(ends, levels, strict=False):
            expected = {"those of its level, which has no attention there": (level.channels, 0)}
            block = f"input_blocks.{index}"
            same(_channels_and_depth(shapes, names[index], block) | expected)
    return levels


def _channels_and_depth(
    shapes: Shapes, names: Iterable[str], block: str
) -> dict[str, tuple[int, int]]:
    channels = shape_of(shapes, f"{block}.0.out_layers.3.weight", 4)[0]
    return {f"(channels, attention depth) of {block}": (channels, attention_depth(names, block))}


def _check_output_blocks(shapes: Shapes, levels: list[_Level]) -> None:
    """Check that the way up mirrors the way down, with one more residual block per level."""
    expected = {
        index: level
        for index, level in enumerate(
            level for level in reversed(levels) for _ in range(level.num_res_blocks + 1)
        )
    }
    found = members(shapes, "output_blocks")
    if list(found) != list(expected):
        raise WeightsError(
            f"the UNet has {len(found)} output blocks; its {len(levels)} levels of "
            f"{levels[0].num_res_blocks} residual blocks need {len(expected)}"
        )
    for index, level in expected.items():
        mirrored = {"that of its input level": (level.channels, level.depth)}
        block = f"output_blocks.{index}"
        same(_channels_and_depth(shapes, found[index], block) | mirrored)
