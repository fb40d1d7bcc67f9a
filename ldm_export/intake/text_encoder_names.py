"""Names of a text encoder's tensors in transformers, and in the checkpoints of CompVis and sgm.

CLIP of OpenAI has the same names there after a prefix. OpenCLIP has its own, one matrix for the
projections of queries, keys and values, and the transpose of the text projection.

Sources: `CLIPTextModel` of transformers 4 and 5, whose names begin with `text_model.` only in
version 4, and src/open_clip/transformer.py in mlfoundations/open_clip (89fb801).
"""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from ldm_export.checkpoint.stored_tensors import (
    JoinedTensor,
    StoredTensor,
    TransposedTensor,
    joined,
)

_TEXT_MODEL = "text_model."
_PREFIX = re.compile(
    r"^(cond_stage_model\.transformer\.|conditioner\.embedders\.0\.transformer\.)?(text_model\.)?"
)
_PROJECTION = "text_projection.weight"
#: Projections that open_clip applies from the right.
_TRANSPOSED: Mapping[str, str] = MappingProxyType(
    {_PROJECTION: "text_projection", "visual_projection.weight": "proj"}
)
_POSITIONS = "embeddings.position_ids"
#: A projection that open_clip has as a parameter, spelt as a linear layer's.
_LINEAR_PROJECTION = re.compile(r"(conditioner\.embedders\.\d\.model\.text_projection)(\.weight)+")

#: Tensors outside the layers of a text encoder.
TEXT_TENSORS: Mapping[str, str] = MappingProxyType(
    {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
)
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_OPENCLIP_LAYER: Mapping[str, str] = MappingProxyType(
    {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
)
_JOINED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

Tensors = Mapping[str, StoredTensor]


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return the names of a text model's tensors in transformers 5, without any prefix.

    The numbers of positions, 0, 1, 2 and so on, which old versions store, are left out.
    """
    plain = {name: _PREFIX.sub("", name) for name in names}
    return {name: rest for name, rest in plain.items() if rest != _POSITIONS}


def with_open_clip_projections(tensors: Tensors) -> Tensors:
    """Return the tensors of a single file, projections of OpenCLIP as open_clip has them.

    diffusers' converter to the layout of SDXL kept name and orientation of its linear layer
    (huggingface/diffusers pull request 6934 changed that), and files of Playground 2 have its
    ending twice. ComfyUI tells the orientation by the name, too (`clip_text_transformers_convert`).
    One that is there under both names stays, so that nothing takes the place of another tensor.
    """
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        match = _LINEAR_PROJECTION.fullmatch(name)
        if match is None or match[1] in tensors or match[1] in found:
            found[name] = tensor
        else:
            found[match[1]] = TransposedTensor(tensor=tensor)
    return MappingProxyType(found)


def clip_tensors(tensors: Tensors, prefix: str) -> dict[str, StoredTensor]:
    """Return a CLIP text encoder under its names in a single file.

    Args:
        tensors: By the names of `plain_names`.
        prefix: Beginning of the names, such as "cond_stage_model.transformer.".
    """
    return {
        f"{prefix}{'' if name == _PROJECTION else _TEXT_MODEL}{name}": tensor
        for name, tensor in tensors.items()
    }


def openclip_tensors(
    tensors: Tensors, prefix: str, outside: Mapping[str, str] = TEXT_TENSORS
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return one of OpenCLIP's encoders under its names in a single file, and unknown names.

    Args:
        tensors: By the names of `plain_names`, or those of an image encoder.
        prefix: Beginning of the names, such as "cond_stage_model.model.".
        outside: New names, by old ones, of the tensors outside its layers and its projection.
    """
    renamed: dict[str, StoredTensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        found = _renamed(name, tensor, tensors, outside)
        if found is None:
            unknown.append(name)
        else:
            renamed[prefix + found[0]] = found[1]
    return renamed, unknown


def _renamed(
    name: str, tensor: StoredTensor, tensors: Tensors, outside: Mapping[str, str]
) -> tuple[str, StoredTensor] | None:
    """Return the name and the tensor that a tensor becomes, or None if it is not known."""
    if name in outside:
        return outside[name], tensor
    if name in _TRANSPOSED:
        return _TRANSPOSED[name], TransposedTensor(tensor=tensor)
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    layer, place, kind = match.groups()
    block = f"transformer.resblocks.{layer}."
    if place in _OPENCLIP_LAYER:
        return f"{block}{_OPENCLIP_LAYER[place]}.{kind}", tensor
    if place in _JOINED and (one := _joined(layer, kind, tensors)):
        return f"{block}attn.in_proj_{kind}", one
    return None


def _joined(layer: str, kind: str, tensors: Tensors) -> JoinedTensor | None:
    """Return the projections of queries, keys and values as one, or None if they do not fit."""
    names = [f"encoder.layers.{layer}.{place}.{kind}" for place in _JOINED]
    if not all(name in tensors for name in names):
        return None
    return joined([tensors[name] for name in names])
