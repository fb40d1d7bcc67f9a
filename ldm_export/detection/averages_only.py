"""Checkpoints that hold a UNet's moving averages and not its weights: their names, with dots."""

import re
from collections.abc import Mapping

from ldm_export.detection.features import Tensors
from ldm_export.detection.weight_assignment import EMA_PREFIX, ema_name

_UNET, _AVERAGES = "model.diffusion_model.", f"{EMA_PREFIX}diffusion_model"
#: A block, its number, the position of a layer in it, and the rest.
_IN_BLOCK = re.compile(r"(input_blocks|output_blocks)([0-9]+)([0-9])(.*)")
#: The parts of names of UNets, longer ones before what they begin with.
_PART = re.compile(
    "middle_block|time_embed|in_layers|out_layers|emb_layers|skip_connection|transformer_blocks|"
    "proj_in|proj_out|proj|attn[12]|to_out|to_[qkv]|norm[123]?|ff|net|qkv|conv|op|out|weight|bias|"
    "[0-9]"
)


def lost_names(tensors: Tensors) -> Mapping[str, str]:
    """Return the averages of a UNet whose weights are not there, by the names of the weights.

    `LitEma` takes the dots out of names; see `weight_assignment.ema_name`.

    Returns:
        Name of the average by name of the weight; nothing if there are weights, or if a name is
        not one of a UNet of CompVis.
    """
    if any(name.startswith(_UNET) for name in tensors):
        return {}
    averages = [name for name in tensors if name.startswith(_AVERAGES)]
    names = {_UNET + _with_dots(name.removeprefix(_AVERAGES)): name for name in averages}
    is_known = all(ema_name(weight) == average for weight, average in names.items())
    return names if is_known and len(names) == len(averages) else {}


def _with_dots(name: str) -> str:
    match = _IN_BLOCK.fullmatch(name)
    first, rest = ([], name) if match is None else ([*match.groups()[:3]], match[4])
    return ".".join([*first, *_PART.findall(rest)])
