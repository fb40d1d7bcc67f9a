"""The outermost blocks of a UNet as a component of their own, for feature reuse."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from ldm_export.errors import ExportError
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.networks import UNetSpec

#: Blocks of either half unless a flag says otherwise: on the shapes model the smallest number is as
#: good as the next at the same speed, and can be faster (`models/shapes/evaluate_reuse.py`).
DEFAULT_BLOCKS = 1
#: Parts of a UNet that its outermost blocks need as well, by the beginnings of their names.
_AROUND = ("time_embed.", "time_embedding.", "label_emb.", "out.")


def with_shallow_graph(unet: UNetSpec, wanted: int | Literal["default"] | None) -> UNetSpec:
    """Return the record of a UNet with the outermost blocks that a flag asks for.

    Raises:
        ExportError: Its first level has not that many.
    """
    if wanted is None:
        return unet
    number = DEFAULT_BLOCKS if wanted == "default" else wanted
    most = unet.most_shallow_blocks
    if not 1 <= number <= most:
        raise ExportError(
            f"--reuse-blocks is {number}; the first level of this UNet has {most} blocks on the "
            f"way up: give 1 to {most}"
        )
    return replace(unet, shallow_blocks=number)


def shallow_weights(
    weights: Mapping[str, Mapping[str, str]], spec: ModelSpec
) -> dict[str, Mapping[str, str]]:
    """Return the weights of the shallow graph, which are some of the UNet's; none without it.

    Args:
        weights: Per component, checkpoint tensor name by network parameter name.
        spec: The model.
    """
    unet = spec.unet
    if unet is None or unet.shallow_blocks is None:
        return {}
    levels = range(len(unet.channel_mult))
    total = sum(len(unet.output_depths(level)) for level in levels)
    beginnings = (
        *_AROUND,
        *(f"input_blocks.{index}." for index in range(unet.shallow_blocks)),
        *(f"output_blocks.{index}." for index in range(total - unet.shallow_blocks, total)),
    )
    names = weights["unet"].items()
    return {"unet_shallow": {name: each for name, each in names if name.startswith(beginnings)}}
