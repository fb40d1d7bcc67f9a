"""Text encoders of transformers: which of two kinds one is, and its place in a single file."""

import re
from collections.abc import Mapping
from typing import Literal

from ldm_export.checkpoint.stored_tensors import StoredTensor
from ldm_export.errors import CheckpointError
from ldm_export.hyperparameters.shapes import listed
from ldm_export.hyperparameters.text_encoders import OPENCLIP_LAYERS
from ldm_export.intake.component import StoredComponent
from ldm_export.intake.renaming import renamed
from ldm_export.intake.text_encoder_names import clip_tensors, openclip_tensors, plain_names

Tensors = Mapping[str, StoredTensor]
Kind = Literal["clip", "openclip"]

_TOKENS = "embeddings.token_embedding.weight"
_CLIP_WIDTH = 768  # of ViT-L/14, the only CLIP text encoder of OpenAI in released models
_PART = re.compile(r"(embeddings|encoder|final_layer_norm|text_projection)\.")
_KIND = "text encoder"
_PLACES: Mapping[Kind, str] = {"clip": "transformer.", "openclip": "model."}


def kind_of(component: StoredComponent, tensors: Tensors) -> Kind:
    """Return whether a text encoder is OpenAI's CLIP or OpenCLIP.

    Both have the same names in transformers. They differ in width, and in the activation, which is
    in the configuration: OpenCLIP has the usual GELU.
    """
    width = tensors[_TOKENS].shape[-1]
    if width == _CLIP_WIDTH:
        return "clip"
    if component.config is None:
        return "openclip" if width in OPENCLIP_LAYERS else "clip"
    return "openclip" if component.config.get("hidden_act") == "gelu" else "clip"


def has_released_width(tensors: Tensors) -> bool:
    """Return whether a text encoder, under any names, is as wide as a released one of OpenCLIP."""
    return any(
        name.endswith("token_embedding.weight") and tensor.shape[-1] in OPENCLIP_LAYERS
        for name, tensor in tensors.items()
    )


def text_tensors(component: StoredComponent) -> Tensors:
    """Return a text encoder's tensors by the names of transformers 5, without a prefix.

    Raises:
        CheckpointError: They are of something else, or two are one tensor.
    """
    names = plain_names(component.tensors)
    tokens = [name for name, plain in names.items() if plain == _TOKENS]
    if not tokens or len(component.tensors[tokens[0]].shape) != 2:
        raise CheckpointError(
            component.path,
            "holds no CLIP text encoder in the names of transformers "
            "(text_model.embeddings.token_embedding.weight); its tensors are "
            f"{listed(component.tensors)}",
        )
    known = {name: plain if _PART.match(plain) else None for name, plain in names.items()}
    return renamed(component, _KIND, known)


def placed(component: StoredComponent, tensors: Tensors, kind: Kind, place: str) -> Tensors:
    """Return a text encoder's tensors under their names in a single file.

    Args:
        component: The text encoder.
        tensors: Its tensors by the names of `text_tensors`.
        kind: Its kind.
        place: Its place, such as "cond_stage_model." or "conditioner.embedders.1.".

    Raises:
        CheckpointError: An OpenCLIP text encoder has tensors that are not known, or projections
            of queries, keys and values that do not go together.
    """
    prefix = place + _PLACES[kind]
    if kind == "clip":
        return clip_tensors(tensors, prefix)
    found, unknown = openclip_tensors(tensors, prefix)
    renamed(component, _KIND, dict.fromkeys(unknown))
    return found
