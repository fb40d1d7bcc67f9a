"""Names of a UNet's tensors in diffusers, and in the checkpoints of CompVis and sgm.

Sources: `UNet2DConditionModel` of diffusers 0.42.1, and `UNetModel` of
ldm/modules/diffusionmodules/openaimodel.py in CompVis/stable-diffusion (21f890f9). The second
numbers all blocks of a half in one row, so that a number follows from how many ResNet blocks and
changes of resolution come before it. They are counted in the names, not taken from a table:
distilled models have fewer.
"""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

#: Beginning of the UNet's names in a single file.
UNET_PREFIX = "model.diffusion_model."

_OUTSIDE: Mapping[str, str] = MappingProxyType(
    {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "time_embedding.cond_proj": "time_embedding.cond_proj",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "class_embedding.linear_1": "label_emb.0.0",
        "class_embedding.linear_2": "label_emb.0.2",
        "class_embedding": "label_emb",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
)
_RESNET: Mapping[str, str] = MappingProxyType(
    {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
)
_TRANSFORMER = re.compile(r"(norm|proj_in|proj_out|transformer_blocks\.\d+\..+)\.(weight|bias)")
_INSIDE = re.compile(
    r"((?:down|up)_blocks\.\d+\.|mid_block\.)(resnets|attentions|downsamplers|upsamplers)\.(\d+)\."
)
_MIDDLE: Mapping[str, str] = MappingProxyType(
    {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
)


def unet_names(names: Iterable[str]) -> dict[str, str | None]:
    """Return the name in a single file of every tensor of a diffusers UNet, None of unknown ones.

    Args:
        names: All of the UNet's, as diffusers has them.
    """
    known = list(names)
    blocks = {**_MIDDLE, **_down_blocks(known), **_up_blocks(known)}
    return {name: _prefixed(_outside(name) or _inside(name, blocks)) for name in known}


def is_diffusers_unet(names: Iterable[str]) -> bool:
    """Return whether these are a UNet's names as diffusers has them, of nothing else."""
    return {"conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"} <= set(names)


def _prefixed(name: str | None) -> str | None:
    return None if name is None else UNET_PREFIX + name


def _outside(name: str) -> str | None:
    """Return the name of a tensor before or after all blocks."""
    layer, _, kind = name.rpartition(".")
    return f"{_OUTSIDE[layer]}.{kind}" if layer in _OUTSIDE else None


def _inside(name: str, blocks: Mapping[str, str]) -> str | None:
    """Return the name of a tensor of a block."""
    match = _INSIDE.match(name)
    if match is None or (block := blocks.get(name[: match.end() - 1])) is None:
        return None
    rest = name[match.end() :]
    layer, _, kind = rest.rpartition(".")
    if match[2] == "resnets":
        return f"{block}.{_RESNET[layer]}.{kind}" if layer in _RESNET else None
    if match[2] == "attentions":
        return f"{block}.{rest}" if _TRANSFORMER.fullmatch(rest) else None
    return f"{block}.{kind}" if layer == "conv" else None


def _down_blocks(names: Iterable[str]) -> dict[str, str]:
    """Return the place of every layer of the first half; place 0 is the first convolution."""
    layers, place = _layers(names, "down_blocks"), 1
    places: dict[str, str] = {}
    for block, resnets in _resnets(layers):
        places |= _numbered(block, resnets, "input_blocks", place)
        place += len(resnets)
        if f"{block}.downsamplers.0" in layers:
            places[f"{block}.downsamplers.0"] = f"input_blocks.{place}.0.op"
            place += 1
    return places


def _up_blocks(names: Iterable[str]) -> dict[str, str]:
    """Return the place of every layer of the second half; upsampling ends a level's last place."""
    layers, place = _layers(names, "up_blocks"), 0
    places: dict[str, str] = {}
    for block, resnets in _resnets(layers):
        places |= _numbered(block, resnets, "output_blocks", place)
        place += len(resnets)
        last = 2 if f"{block}.attentions.{resnets[-1]}" in layers else 1
        places[f"{block}.upsamplers.0"] = f"output_blocks.{place - 1}.{last}.conv"
    return places


def _numbered(block: str, resnets: Iterable[int], half: str, first: int) -> dict[str, str]:
    """Return the places of a block's ResNet blocks, and of the attention after each."""
    places = {}
    for place, index in enumerate(resnets, start=first):
        places[f"{block}.resnets.{index}"] = f"{half}.{place}.0"
        places[f"{block}.attentions.{index}"] = f"{half}.{place}.1"
    return places


def _layers(names: Iterable[str], half: str) -> frozenset[str]:
    """Return the layers of the blocks of a half, such as "down_blocks.0.resnets.1"."""
    matches = (_INSIDE.match(name) for name in names if name.startswith(half))
    return frozenset(match[0][:-1] for match in matches if match)


def _resnets(layers: Iterable[str]) -> list[tuple[str, list[int]]]:
    """Return the blocks that have ResNet blocks, in order, with the numbers of those."""
    found: dict[tuple[str, int], list[int]] = {}
    for layer in layers:
        half, block, kind, index = layer.split(".")
        if kind == "resnets":
            found.setdefault((half, int(block)), []).append(int(index))
    return [(f"{half}.{block}", sorted(found[half, block])) for half, block in sorted(found)]
