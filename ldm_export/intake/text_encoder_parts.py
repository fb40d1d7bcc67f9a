"""Text encoders from files of their own: what they take the place of, and under which names."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ldm_export.checkpoint.checkpoint import Checkpoint
from ldm_export.checkpoint.stored_tensors import StoredTensor
from ldm_export.errors import CheckpointError
from ldm_export.hyperparameters.shapes import listed
from ldm_export.intake.component import StoredComponent
from ldm_export.intake.folder import (
    FIRST_ENCODER,
    ONLY_ENCODER,
    SECOND_ENCODER,
    text_encoder_of,
)
from ldm_export.intake.parts import Part, Tensors
from ldm_export.intake.text_encoder_names import with_open_clip_projections
from ldm_export.intake.text_encoders import Kind, has_released_width
from ldm_export.intake.unet_names import UNET_PREFIX

#: Beginnings of a text encoder's names in files that also hold other components.
_TEXT_PREFIXES = (f"{FIRST_ENCODER}transformer.", f"{ONLY_ENCODER}transformer.", "text_model.")
#: Likewise of OpenCLIP's, under its own names.
_OPENCLIP = "model."
_OPENCLIP_PREFIXES = (f"{FIRST_ENCODER}{_OPENCLIP}", f"{ONLY_ENCODER}{_OPENCLIP}")
#: What files of CLIP hold next to the text encoder, for comparing texts with images.
_IMAGES = ("vision_model.", "visual_projection.", "logit_scale")
_PROJECTION = "text_projection.weight"
#: Beginnings of the names of the text encoder of a model that has one alone.
_ONE_TEXT_ENCODER = (ONLY_ENCODER, f"{FIRST_ENCODER}{_OPENCLIP}")
_CLIP_TOKENS = "embeddings.token_embedding.weight"
#: The vector of SDXL's UNets, and its length in the base model and in the refiner: a pooled prompt,
#: and 256 numbers for each of six or five sizes and scores.
_VECTOR = f"{UNET_PREFIX}label_emb.0.0.weight"
_SDXL_VECTORS = (1280 + 6 * 256, 1280 + 5 * 256)


def first_place(checkpoint: Checkpoint, *, has_second: bool) -> str:
    """Return the place of the text encoder, or of the first of two.

    Models of Stability's generative-models, such as SDXL and its refiner, number their encoders;
    where a file has none, the vector of its UNet shows that it is one.
    """
    tensors = checkpoint.tensors
    if has_second or _first_beginning(tensors, (FIRST_ENCODER, SECOND_ENCODER)):
        return FIRST_ENCODER
    is_sdxl = _VECTOR in tensors and tensors[_VECTOR].shape[-1] in _SDXL_VECTORS
    return FIRST_ENCODER if is_sdxl else ONLY_ENCODER


def _first_beginning(names: Iterable[str], beginnings: Iterable[str]) -> str:
    """Return the first of `beginnings` that one of `names` has, or ""."""
    known = list(names)
    return next((each for each in beginnings if any(name.startswith(each) for name in known)), "")


def text_encoder_part(component: StoredComponent, checkpoint: Checkpoint, place: str) -> Part:
    """Read a text encoder; of a whole checkpoint or a whole CLIP, its text encoder.

    Args:
        component: Its files.
        checkpoint: The checkpoint that it is given for.
        place: The result of `first_place`.

    Raises:
        CheckpointError: It is not a text encoder that is exported, or something else conditions the
            checkpoint.
    """
    _check_replaceable(checkpoint, place)
    stored, fields = with_open_clip_projections(component.tensors), dict[str, Any]()
    openclip = f"{place}{_OPENCLIP}"
    if prefix := _first_beginning(stored, _OPENCLIP_PREFIXES):
        inside = _tensors_after(prefix, stored)
        placed = {f"{openclip}{name}": tensor for name, tensor in inside.items()}
    else:
        kind: Kind | None = "openclip" if _first_beginning(checkpoint.tensors, [openclip]) else None
        placed, fields = _transformers_encoder(component, place, kind)
    return Part(
        name="text encoder", place=place, component=component, tensors=placed, fields=fields
    )


def _tensors_after(prefix: str, tensors: Tensors) -> dict[str, StoredTensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _transformers_encoder(
    component: StoredComponent, place: str, kind: Kind | None
) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Return a text encoder that has transformers' names, and what is known of it.

    One of a released width is read to a layer by the number of layers that it has: CLIP's own
    repositories have all of them, folders of Stable Diffusion 2 those that are run.
    """
    tensors = component.tensors
    prefix = _first_beginning(tensors, _TEXT_PREFIXES)
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if (name.startswith(prefix) and not name.removeprefix(prefix).startswith(_IMAGES))
        or name == _PROJECTION
    }
    placed, fields = text_encoder_of(replace(component, tensors=kept), place, kind=kind)
    if has_released_width(placed):
        fields["text_layers_trimmed"] = False
    # No model is conditioned by the projection of OpenAI's CLIP.
    return {name: each for name, each in placed.items() if not name.endswith(_PROJECTION)}, fields


def second_text_encoder_part(component: StoredComponent, checkpoint: Checkpoint) -> Part:
    """Read a second text encoder, with its projection; of a whole checkpoint, its second one.

    Raises:
        CheckpointError: It is not a text encoder that is exported, or the checkpoint has only one.
    """
    only = [name for name in checkpoint.tensors if name.startswith(_ONE_TEXT_ENCODER)]
    if only:
        raise CheckpointError(
            checkpoint.path,
            f"has one text encoder ({listed(only)}), so that --text-encoder-2 has nothing to take "
            "the place of; give --text-encoder",
        )
    tensors = with_open_clip_projections(component.tensors)
    placed = {name: each for name, each in tensors.items() if name.startswith(SECOND_ENCODER)}
    if not placed:
        kept = {name: each for name, each in tensors.items() if not name.startswith(_IMAGES)}
        alone = replace(component, tensors=kept)
        placed = dict(text_encoder_of(alone, SECOND_ENCODER, kind="openclip")[0])
    return Part(
        name="second text encoder",
        place=SECOND_ENCODER,
        component=component,
        tensors=placed,
        fields={},
    )


def _check_replaceable(checkpoint: Checkpoint, place: str) -> None:
    """Check that what a text encoder takes the place of is one, and nothing else."""
    there = [name for name in checkpoint.tensors if name.startswith(place)]
    is_text = any(name.endswith((_CLIP_TOKENS, ".model.ln_final.weight")) for name in there)
    if there and not is_text:
        raise CheckpointError(
            checkpoint.path,
            f"is not conditioned by a CLIP text encoder ({listed(there)}), so that --text-encoder "
            "has nothing to take the place of; leave it out",
        )
