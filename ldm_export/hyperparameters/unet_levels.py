"""The levels of a UNet: its residual blocks and the attention after each, on both ways."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ldm_export.errors import WeightsError
from ldm_export.hyperparameters.shapes import Shapes, indices, members, same, shape_of
from ldm_export.hyperparameters.unet_attention import attention_depth
from ldm_runtime.specs.networks import Depths

Resampling = Literal["convolutions", "residual blocks"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A residual block, its channels, and the depth of the attention after it."""

    name: str
    channels: int
    depth: int


@dataclass(frozen=True, kw_only=True)
class Level:
    """The residual blocks of a level on the way down and on the way up, in running order."""

    inputs: Sequence[Block]
    outputs: Sequence[Block]

    @property
    def channels(self) -> int:
        """Channels of all its blocks."""
        return self.inputs[0].channels

    @property
    def is_regular(self) -> bool:
        """Whether the attention of all its blocks has one depth."""
        return len({block.depth for block in (*self.inputs, *self.outputs)}) == 1


def read_levels(shapes: Shapes, resampling: Resampling, *, blocks_removed: bool) -> list[Level]:
    """Return the levels of a UNet, from full latent resolution down.

    Args:
        shapes: Shape of every parameter.
        resampling: The kind of layer that changes the resolution between levels.
        blocks_removed: Whether blocks may differ in the depth of their attention. Where they may
            not, one that does is a fault of the file.

    Raises:
        WeightsError: The blocks contradict each other, or are too few or too many.
    """
    inputs = _input_levels(shapes, resampling)
    levels = [
        Level(inputs=down, outputs=up)
        for down, up in zip(inputs, _output_levels(shapes, inputs), strict=True)
    ]
    for level in levels:
        _check_equal((*level.inputs, *level.outputs), blocks_removed=blocks_removed)
    return levels


def resampling_of(shapes: Shapes) -> Resampling:
    """Return the kind of layer that changes the resolution between levels."""
    ends = [name for name in shapes if name.startswith("input_blocks.")]
    if any(name.endswith(".0.op.weight") for name in ends):
        return "convolutions"
    return "residual blocks" if _second_blocks(shapes) else "convolutions"


def num_res_blocks_of(levels: Iterable[Level]) -> int | tuple[int, ...]:
    """Return the residual blocks of every level on the way down, or of each."""
    return _condensed([len(level.inputs) for level in levels])


def depths_of(levels: Sequence[Level]) -> tuple[Depths, Depths | None]:
    """Return attention depths per level on the way down, and on the way up if those differ."""
    down, up = (
        tuple(_condensed([block.depth for block in blocks]) for blocks in half)
        for half in ([level.inputs for level in levels], [level.outputs for level in levels])
    )
    return down, None if all(level.is_regular for level in levels) else up


def cross_attention_only(shapes: Shapes, levels: Sequence[Level]) -> tuple[int, ...]:
    """Return the levels whose transformers attend to the context in place of their own pixels.

    Where pixels and context have equally many channels, no shape tells, and they attend to pixels.

    Raises:
        WeightsError: Only some transformers of a level do, or those in the middle.
    """
    if _attends_to_context(shapes, "middle_block", levels[-1].channels):
        raise WeightsError(
            "the middle of the UNet has no self-attention (middle_block.1.transformer_blocks.0."
            "attn1.to_k.weight), which this version does not export"
        )
    found = []
    for index, level in enumerate(levels):
        blocks = [block for block in (*level.inputs, *level.outputs) if block.depth]
        answers = {
            f"whether {block.name} attends to the context alone": _attends_to_context(
                shapes, block.name, block.channels
            )
            for block in blocks
        }
        if answers and bool(same(answers)):
            found.append(index)
    return tuple(found)


def _attends_to_context(shapes: Shapes, block: str, channels: int) -> bool:
    keys = f"{block}.1.transformer_blocks.0.attn1.to_k.weight"
    return keys in shapes and shape_of(shapes, keys, 2)[1] != channels


def _condensed(numbers: Sequence[int]) -> int | tuple[int, ...]:
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)


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


def _input_levels(shapes: Shapes, resampling: Resampling) -> list[list[Block]]:
    """Group the input blocks after the first into levels."""
    names = members(shapes, "input_blocks")
    ends = _level_ends(shapes, names, resampling)
    levels: list[list[Block]] = [[]]
    for index in range(1, len(names)):
        if index in ends:
            levels.append([])
        else:
            levels[-1].append(_block(shapes, names[index], f"input_blocks.{index}"))
    if not all(levels):
        raise WeightsError(f"the UNet has a level without residual blocks ({len(levels)} levels)")
    if resampling == "residual blocks":
        for index, level in zip(ends, levels, strict=False):
            first, end = level[0], _block(shapes, names[index], f"input_blocks.{index}")
            expected = {"those of its level, which has no attention there": (first.channels, 0)}
            same(_channels_and_depths([end]) | expected)
    return levels


def _output_levels(shapes: Shapes, inputs: Sequence[Sequence[Block]]) -> list[list[Block]]:
    """Group the output blocks into levels, of which each has one more than on the way down."""
    found = members(shapes, "output_blocks")
    numbers = [len(level) + 1 for level in inputs]
    if len(found) != sum(numbers):
        raise WeightsError(
            f"the UNet has {len(found)} output blocks; its {len(numbers)} levels of "
            f"{', '.join(str(number - 1) for number in numbers)} residual blocks on the way down "
            f"need {sum(numbers)}"
        )
    blocks = [_block(shapes, names, f"output_blocks.{index}") for index, names in found.items()]
    levels = []
    for number in reversed(numbers):
        levels.append(blocks[:number])
        del blocks[:number]
    return levels[::-1]


def _block(shapes: Shapes, names: Iterable[str], block: str) -> Block:
    channels = shape_of(shapes, f"{block}.0.out_layers.3.weight", 4)[0]
    return Block(name=block, channels=channels, depth=attention_depth(names, block))


def _check_equal(blocks: Sequence[Block], *, blocks_removed: bool) -> None:
    if blocks_removed:
        same({f"the number of channels of {block.name}": block.channels for block in blocks})
    else:
        same(_channels_and_depths(blocks))


def _channels_and_depths(blocks: Iterable[Block]) -> dict[str, tuple[int, int]]:
    return {
        f"(channels, attention depth) of {block.name}": (block.channels, block.depth)
        for block in blocks
    }
