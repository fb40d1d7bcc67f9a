"""A model as one checkpoint, whether it lies in one file, in a folder, or in parts."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ldm_export.checkpoint.checkpoint import Checkpoint, ComponentFiles, open_checkpoint
from ldm_export.checkpoint.file_fields import LatentScale
from ldm_export.checkpoint.stored_tensors import StoredTensor
from ldm_export.errors import CheckpointError
from ldm_export.families.records import NOISE_AUGMENTOR_PREFIX, TINY_AUTOENCODER_PREFIX
from ldm_export.hyperparameters.shapes import listed
from ldm_export.intake.autoencoder_names import AUTOENCODER_PREFIX
from ldm_export.intake.component import StoredComponent, open_component
from ldm_export.intake.folder import (
    FIRST_ENCODER,
    ONLY_ENCODER,
    SECOND_ENCODER,
    autoencoder_of,
    is_diffusers_folder,
    open_folder,
    text_encoder_of,
    unet_of,
)
from ldm_export.intake.image_encoders import image_normalizer_of
from ldm_export.intake.renaming import renamed
from ldm_export.intake.tiny_decoder_names import tiny_decoder_names
from ldm_export.intake.unet_names import UNET_PREFIX, is_diffusers_unet

_BARE_UNET = ("diffusion_model.", "")
_FIRST_TENSOR = "input_blocks.0.0.weight"
_IN_TRAINING_ONLY = ("loss.", f"{AUTOENCODER_PREFIX}loss.", "logvar")
#: Beginnings of a text encoder's names in files that also hold other components.
_TEXT_PREFIXES = (f"{FIRST_ENCODER}transformer.", f"{ONLY_ENCODER}transformer.", "text_model.")
#: What files of CLIP hold next to the text encoder, for comparing texts with images.
_IMAGES = ("vision_model.", "visual_projection.", "logit_scale")
_OF_IMAGES = (*_IMAGES, "text_projection")
#: Beginnings of the names of the text encoder of a model that has one alone.
_ONE_TEXT_ENCODER = (ONLY_ENCODER, f"{FIRST_ENCODER}model.")
_CLIP_TOKENS = "embeddings.token_embedding.weight"

Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A component from files of its own.

    Attributes:
        name: "autoencoder", "text encoder", "second text encoder", "tiny decoder" or "image
            normalizer".
        place: Beginning of the names in a single file of the tensors whose place it takes.
        component: Its files.
        tensors: Its tensors, by their names in a single file.
        fields: What is known of it beyond them.
    """

    name: str
    place: str
    component: StoredComponent
    tensors: Tensors
    fields: Mapping[str, Any]


def open_model(
    path: Path,
    *,
    vae: Path | None = None,
    text_encoder: Path | None = None,
    text_encoder_2: Path | None = None,
    tiny_decoder: Path | None = None,
    image_normalizer: Path | None = None,
) -> Checkpoint:
    """Open a checkpoint, a diffusers folder, or either with components from files of their own.

    Args:
        path: The checkpoint's file, or the folder with `model_index.json`.
        vae: File or folder of an autoencoder, in the names of CompVis or of diffusers, which takes
            the place of the checkpoint's, or is added to one without. Its latents are scaled as
            the UNet was trained, whatever its configuration states.
        text_encoder: File or folder of a CLIP text encoder in the names of transformers, likewise;
            of a model with two, the first.
        text_encoder_2: File or folder of the second text encoder, likewise.
        tiny_decoder: File or folder of a TAESD in its own names or those of diffusers, of which the
            decoder is added.
        image_normalizer: File or folder of diffusers with mean and standard deviation of embeddings
            of images, for a checkpoint that is normalised by them and does not hold them.

    Raises:
        CheckpointError: A file cannot be read, or is not what it is given as.
        UnknownModelError: The folder holds a pipeline that is not exported.
    """
    with ExitStack() as stack:
        checkpoint = stack.enter_context(_open_rest(path, vae, text_encoder, text_encoder_2))
        parts = []
        if vae is not None:
            parts.append(_autoencoder(_opened(vae, "vae", stack)))
        if text_encoder is not None:
            component = _opened(text_encoder, "text_encoder", stack)
            place = _first_place(checkpoint, has_second=text_encoder_2 is not None)
            parts.append(_text_encoder(component, checkpoint, place))
        if text_encoder_2 is not None:
            component = _opened(text_encoder_2, "text_encoder_2", stack)
            parts.append(_second_text_encoder(component, checkpoint))
        if tiny_decoder is not None:
            parts.append(_tiny_decoder(_opened(tiny_decoder, "vae", stack)))
        if image_normalizer is not None:
            component = _opened(image_normalizer, "image_normalizer", stack)
            parts.append(_image_normalizer(component, checkpoint))
        stack.pop_all()
    return _with_parts(checkpoint, parts) if parts else checkpoint


def _open_rest(
    path: Path, vae: Path | None, text_encoder: Path | None, text_encoder_2: Path | None
) -> Checkpoint:
    """Open a model without the components that come from files of their own."""
    if not is_diffusers_folder(path):
        return open_checkpoint(path)
    given = {"vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    return open_folder(path, without=frozenset(name for name in given if given[name]))


def _opened(path: Path, name: str, stack: ExitStack) -> StoredComponent:
    """Open a component; of a diffusers folder, the component of that name."""
    component = open_component(path / name if is_diffusers_folder(path) else path)
    for each in component.opened:
        stack.enter_context(each)
    return component


def _autoencoder(component: StoredComponent) -> _Part:
    """Read an autoencoder; of a whole checkpoint, its autoencoder."""
    tensors = component.tensors
    inside = {name: each for name, each in tensors.items() if name.startswith(AUTOENCODER_PREFIX)}
    kept = {
        name: tensor
        for name, tensor in (inside or tensors).items()
        if not name.startswith(_IN_TRAINING_ONLY)
    }
    renamed, fields = autoencoder_of(replace(component, tensors=kept))
    return _Part(
        name="autoencoder",
        place=AUTOENCODER_PREFIX,
        component=component,
        tensors=renamed,
        fields={
            "vae_scale": _scale_of(fields),
            "vae_fits_fp16": fields.get("vae_fits_fp16", False),
        },
    )


def _scale_of(fields: Mapping[str, Any]) -> LatentScale:
    return LatentScale(
        factor=fields.get("latent_scale_factor"),
        mean=fields.get("latents_mean"),
        std=fields.get("latents_std"),
    )


def _first_place(checkpoint: Checkpoint, *, has_second: bool) -> str:
    """Return the place of the text encoder, or of the first of two."""
    has_two = has_second or any(name.startswith(SECOND_ENCODER) for name in checkpoint.tensors)
    return FIRST_ENCODER if has_two else ONLY_ENCODER


def _text_encoder(component: StoredComponent, checkpoint: Checkpoint, place: str) -> _Part:
    """Read a text encoder; of a whole checkpoint or a whole CLIP, its text encoder."""
    _check_replaceable(checkpoint, place)
    tensors = component.tensors
    found = (each for each in _TEXT_PREFIXES if any(name.startswith(each) for name in tensors))
    prefix = next(found, "")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(_OF_IMAGES)
    }
    placed, fields = text_encoder_of(replace(component, tensors=kept), place)
    return _Part(
        name="text encoder", place=place, component=component, tensors=placed, fields=fields
    )


def _second_text_encoder(component: StoredComponent, checkpoint: Checkpoint) -> _Part:
    """Read a second text encoder, with its projection; of a whole checkpoint, its second one."""
    only = [name for name in checkpoint.tensors if name.startswith(_ONE_TEXT_ENCODER)]
    if only:
        raise CheckpointError(
            checkpoint.path,
            f"has one text encoder ({listed(only)}), so that --text-encoder-2 has nothing to take "
            "the place of; give --text-encoder",
        )
    tensors = component.tensors
    placed = {name: each for name, each in tensors.items() if name.startswith(SECOND_ENCODER)}
    if not placed:
        kept = {name: each for name, each in tensors.items() if not name.startswith(_IMAGES)}
        alone = replace(component, tensors=kept)
        placed = dict(text_encoder_of(alone, SECOND_ENCODER, kind="openclip")[0])
    return _Part(
        name="second text encoder",
        place=SECOND_ENCODER,
        component=component,
        tensors=placed,
        fields={},
    )


def _tiny_decoder(component: StoredComponent) -> _Part:
    """Read the decoder of a TAESD."""
    names = tiny_decoder_names(component.tensors)
    if not names:
        raise CheckpointError(
            component.path,
            f"is no decoder of TAESD ({listed(list(component.tensors))}); give --tiny-decoder "
            "taesd_decoder, or the folder of an AutoencoderTiny of diffusers",
        )
    kept = replace(component, tensors={name: component.tensors[name] for name in names})
    return _Part(
        name="tiny decoder",
        place=TINY_AUTOENCODER_PREFIX,
        component=component,
        tensors=renamed(kept, "tiny decoder", names),
        fields={},
    )


def _image_normalizer(component: StoredComponent, checkpoint: Checkpoint) -> _Part:
    """Read the statistics of embeddings of images; the noise schedule next to them stays."""
    own = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(NOISE_AUGMENTOR_PREFIX)
    }
    if not own:
        raise CheckpointError(
            checkpoint.path,
            f"adds no noise to embeddings of images ({NOISE_AUGMENTOR_PREFIX}*), so that "
            "--image-normalizer means nothing to it; leave it out",
        )
    return _Part(
        name="image normalizer",
        place=NOISE_AUGMENTOR_PREFIX,
        component=component,
        tensors=own | image_normalizer_of(component),
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


def _with_parts(checkpoint: Checkpoint, parts: list[_Part]) -> Checkpoint:
    """Return a checkpoint with components from files of their own."""
    places = tuple(part.place for part in parts)
    tensors = _with_whole_names(checkpoint)
    tensors = {name: each for name, each in tensors.items() if not name.startswith(places)}
    stated, opened, unusual = checkpoint.stated, [*checkpoint.opened], checkpoint.unusual_globals
    for part in parts:
        tensors |= part.tensors
        stated = replace(stated, **part.fields)
        opened += part.component.opened
        unusual += part.component.unusual_globals
    return replace(
        checkpoint,
        tensors=MappingProxyType(tensors),
        unusual_globals=tuple(dict.fromkeys(unusual)),
        components=tuple(
            ComponentFiles(
                component=part.name, path=part.component.path, files=part.component.files
            )
            for part in parts
        ),
        stated=stated,
        opened=tuple(opened),
    )


def _with_whole_names(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors; a UNet that comes alone as a whole checkpoint names it."""
    tensors = checkpoint.tensors
    if is_diffusers_unet(tensors):
        alone = StoredComponent(
            path=checkpoint.path, tensors=tensors, files=checkpoint.files, opened=()
        )
        return unet_of(alone)
    prefix = next((each for each in _BARE_UNET if f"{each}{_FIRST_TENSOR}" in tensors), None)
    if prefix is None:
        return dict(tensors)
    return {UNET_PREFIX + name.removeprefix(prefix): each for name, each in tensors.items()}
