"""The attention hyperparameters of a UNet, read from its parameters' names and shapes."""

from collections.abc import Iterable
from typing import Literal

from ldm_export.errors import WeightsError
from ldm_export.hyperparameters.shapes import Shapes, indices, same, shape_of

AttentionKind = Literal["transformer", "qkv"]


def attention_kind(shapes: Shapes) -> AttentionKind:
    """Return whether attention is transformer blocks or blocks with one `qkv` projection.

    Raises:
        WeightsError: There is none, or there are both.
    """
    qkv = next((name for name in shapes if name.endswith(".qkv.weight")), "")
    transformer = next((name for name in shapes if ".transformer_blocks." in name), "")
    if qkv and transformer:
        raise WeightsError(
            f"the UNet has two kinds of attention ({qkv}, {transformer}), which this version does "
            "not export"
        )
    if not qkv and not transformer:
        raise WeightsError("the UNet has no attention (no *.qkv.*, no *.transformer_blocks.*)")
    return "qkv" if qkv else "transformer"


def attention_depth(names: Iterable[str], block: str) -> int:
    """Return the number of attention blocks after the first layer of a block.

    Args:
        names: The parameters of the block.
        block: Its name, such as "input_blocks.4".
    """
    names = frozenset(names)
    if f"{block}.1.qkv.weight" in names:
        return 1
    return len(indices(names, f"{block}.1.transformer_blocks"))


def middle_depth(shapes: Shapes, *, blocks_removed: bool) -> int | None:
    """Return the number of attention blocks in the middle block.

    Args:
        shapes: Shape of every parameter.
        blocks_removed: Whether its attention may be missing together with its second residual
            block, 0, or the whole middle, None.

    Raises:
        WeightsError: It has none.
    """
    if blocks_removed and len(layers := indices(shapes, "middle_block")) < 2:
        return 0 if layers else None
    depth = attention_depth(shapes, "middle_block")
    if not depth:
        raise WeightsError(
            "the UNet has no attention in its middle (middle_block.1.transformer_blocks.0.* or "
            "middle_block.1.qkv.*)"
        )
    return depth


def context_dim(shapes: Shapes) -> int:
    """Return the width of the context that transformer blocks attend to.

    Raises:
        WeightsError: They attend to no context, or to several widths.
    """
    widths = {
        name: shape_of(shapes, name, 2)[1] for name in shapes if name.endswith("attn2.to_k.weight")
    }
    if not widths:
        raise WeightsError("the UNet has no attention to a context (no attn2.to_k.weight)")
    return same(widths)


def linear_projection(shapes: Shapes) -> bool:
    """Return whether the input projections of transformers are linear and not 1x1 convolutions.

    Raises:
        WeightsError: There are none, or there are both.
    """
    ranks = {
        f"the rank of {name}": len(shape)
        for name, shape in shapes.items()
        if name.endswith(".1.proj_in.weight")
    }
    if not ranks:
        raise WeightsError("the UNet has transformer blocks but no proj_in.weight")
    return same(ranks) == 2


def check_heads(shapes: Shapes, num_heads: int | None, num_head_channels: int | None) -> None:
    """Check that heads divide the channels of every attention.

    Raises:
        WeightsError: They do not, or an attention is of a kind that is not exported.
    """
    for name in shapes:
        if name.endswith("attn1.to_q.weight"):
            channels = shape_of(shapes, name, 2)[0]
        elif name.endswith(".qkv.weight"):
            channels = shape_of(shapes, name, 3)[0] // 3
        else:
            continue
        divisor = num_heads or num_head_channels or 1
        if channels % divisor:
            what = "attention heads" if num_heads else "channels per head"
            raise WeightsError(
                f"{divisor} {what} do not divide the {channels} channels of {name}; give the "
                "right number with --num-heads or --num-head-channels, or a --config that has it"
            )
