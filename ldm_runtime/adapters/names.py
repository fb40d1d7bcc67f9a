"""The modules of a model under every name that adapter files have for them.

Files name layers of the UNet as diffusers or as CompVis and sgm do, and those of both kinds of text
encoder as transformers does. A model's own parameters have the names of CompVis, of transformers
for CLIP and of open_clip for OpenCLIP. Numbers of blocks are counted in these names, not taken from
a table: distilled models have fewer.

Sources: `UNet2DConditionModel` of diffusers 0.42.1, `UNetModel` of
ldm/modules/diffusionmodules/openaimodel.py in CompVis/stable-diffusion (21f890f9), `CLIPTextModel`
of transformers 4, and src/open_clip/transformer.py in mlfoundations/open_clip (89fb801).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ldm_runtime.adapters.spellings import LayerName

_WEIGHT = ".weight"
#: Modules outside the blocks; embeddings of classes and of sizes have one place in CompVis.
_OUTSIDE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "input_blocks.0.0": ("conv_in",),
        "time_embed.0": ("time_embedding.linear_1",),
        "time_embed.2": ("time_embedding.linear_2",),
        "label_emb.0.0": ("add_embedding.linear_1", "class_embedding.linear_1"),
        "label_emb.0.2": ("add_embedding.linear_2", "class_embedding.linear_2"),
        "label_emb": ("class_embedding",),
        "out.0": ("conv_norm_out",),
        "out.2": ("conv_out",),
    }
)
_RESNET: Mapping[str, str] = MappingProxyType(
    {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
)
_MIDDLE: Mapping[str, str] = MappingProxyType(
    {
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }
)
_INSIDE = re.compile(r"((?:input_blocks\.\d+|middle_block|output_blocks\.\d+)\.\d+)\.(.+)")
_OPENCLIP_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_OPENCLIP: Mapping[str, str] = MappingProxyType(
    {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
)
_OPENCLIP_OUTSIDE: Mapping[str, str] = MappingProxyType(
    {
        "token_embedding": "text_model.embeddings.token_embedding",
        "ln_final": "text_model.final_layer_norm",
    }
)
_JOINED = "attn.in_proj_weight"
#: The projection of the pooled prompt: a linear layer in transformers, in open_clip a parameter.
_PROJECTION = "text_projection"
_PARTS = 3  # queries, keys and values


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer of a model that an adapter may change.

    Attributes:
        component: "unet", "text_encoder" or "text_encoder_2".
        parameter: The module's name in the component; of a joined projection, and of that of the
            pooled prompt, the name of the parameter itself.
        part: 0, 1 or 2 for the rows of query, key or value of a joined projection; None for a
            module of its own.
    """

    component: str
    parameter: str
    part: int | None

    def parameter_of(self, kind: Literal["weight", "bias"]) -> str:
        """Return the name of its weight or of its bias."""
        if self.parameter == _PROJECTION and kind == "weight":
            return self.parameter
        if self.part is not None:
            return self.parameter.removesuffix("weight") + kind
        return f"{self.parameter}.{kind}"

    def rows(self, outputs: int) -> slice:
        """Return which rows it has of a parameter of so many."""
        if self.part is None:
            return slice(outputs)
        each = outputs // _PARTS
        return slice(self.part * each, (self.part + 1) * each)


def adapter_targets(parameters: Mapping[str, Iterable[str]]) -> dict[LayerName, Target]:
    """Return the layers of a model under every name that adapter files have for them.

    Args:
        parameters: The names of the parameters of the components "unet", "text_encoder" and
            "text_encoder_2", as far as the model has them. What is not the weight of a layer is
            left out.
    """
    return {
        (component, name.replace(".", "_")): Target(
            component=component, parameter=parameter, part=part
        )
        for component, names in parameters.items()
        for name, parameter, part in _names_of(component, list(names))
    }


def _names_of(component: str, names: list[str]) -> Iterator[tuple[str, str, int | None]]:
    """Yield each name of a layer, the layer, and its part."""
    modules = [name.removesuffix(_WEIGHT) for name in names if name.endswith(_WEIGHT)]
    if component == "unet":
        yield from ((name, module, None) for name, module in _unet_names(modules))
        return
    yield from ((name, name, None) for name in modules if name.startswith("text_model."))
    yield from _openclip_names(modules)
    if _PROJECTION in names:
        yield _PROJECTION, _PROJECTION, None
    for name in names:
        match = _OPENCLIP_LAYER.fullmatch(name)
        if match and match[2] == _JOINED:
            for part, letter in enumerate("qkv"):
                yield f"{_hf_layer(match[1])}.self_attn.{letter}_proj", name, part


def _openclip_names(modules: Iterable[str]) -> Iterator[tuple[str, str, None]]:
    for module in modules:
        match = _OPENCLIP_LAYER.fullmatch(module)
        if match and match[2] in _OPENCLIP:
            yield f"{_hf_layer(match[1])}.{_OPENCLIP[match[2]]}", module, None
        elif module in _OPENCLIP_OUTSIDE:
            yield _OPENCLIP_OUTSIDE[module], module, None


def _hf_layer(number: str) -> str:
    return f"text_model.encoder.layers.{number}"


def _unet_names(modules: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the names of each module of a UNet, in CompVis and in diffusers, and the module."""
    places = {**_MIDDLE, **_down_blocks(modules), **_up_blocks(modules)}
    for module in modules:
        yield module, module
        yield from ((name, module) for name in _OUTSIDE.get(module, ()))
        match = _INSIDE.fullmatch(module)
        if match and match[1] in places:
            yield f"{places[match[1]]}.{_inside(match[2])}", module


def _inside(rest: str) -> str:
    """Return the name of a module within its place; only those of ResNet blocks differ."""
    return "conv" if rest == "op" else _RESNET.get(rest, rest)


def _down_blocks(modules: Iterable[str]) -> dict[str, str]:
    """Return the places of the first half in diffusers; a change of resolution ends a block."""
    places: dict[str, str] = {}
    block = resnet = 0
    for number, layers in _blocks(modules, "input_blocks"):
        if "op" in layers.get(0, ()):
            places[f"input_blocks.{number}.0"] = f"down_blocks.{block}.downsamplers.0"
            block, resnet = block + 1, 0
        elif number:
            places |= _numbered("input_blocks", number, f"down_blocks.{block}", resnet)
            resnet += 1
    return places


def _up_blocks(modules: Iterable[str]) -> dict[str, str]:
    """Return the places of the second half likewise; there it is in a block's last place."""
    places: dict[str, str] = {}
    block = resnet = 0
    for number, layers in _blocks(modules, "output_blocks"):
        places |= _numbered("output_blocks", number, f"up_blocks.{block}", resnet)
        resnet += 1
        for index in (index for index, inside in layers.items() if "conv" in inside):
            places[f"output_blocks.{number}.{index}"] = f"up_blocks.{block}.upsamplers.0"
            block, resnet = block + 1, 0
    return places


def _numbered(half: str, number: int, block: str, resnet: int) -> dict[str, str]:
    """Return the places of a ResNet block and of the attention after it."""
    return {
        f"{half}.{number}.0": f"{block}.resnets.{resnet}",
        f"{half}.{number}.1": f"{block}.attentions.{resnet}",
    }


def _blocks(modules: Iterable[str], half: str) -> list[tuple[int, dict[int, set[str]]]]:
    """Return the blocks of a half in order, with the modules in each of their layers."""
    found: dict[int, dict[int, set[str]]] = {}
    for module in modules:
        match = _INSIDE.fullmatch(module)
        if match and match[1].startswith(half):
            _, number, layer = match[1].split(".")
            found.setdefault(int(number), {}).setdefault(int(layer), set()).add(match[2])
    return sorted(found.items())
