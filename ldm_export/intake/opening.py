"""A model as one checkpoint, whether it lies in one file, in a folder, or in parts."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from ldm_export.checkpoint.checkpoint import Checkpoint, ComponentFiles, open_checkpoint
from ldm_export.checkpoint.stored_tensors import StoredTensor
from ldm_export.intake.component import StoredComponent, open_component
from ldm_export.intake.folder import is_diffusers_folder, open_folder, unet_of
from ldm_export.intake.parts import (
    Part,
    autoencoder_part,
    image_normalizer_part,
    tiny_decoder_part,
)
from ldm_export.intake.text_encoder_names import with_open_clip_projections
from ldm_export.intake.text_encoder_parts import (
    first_place,
    second_text_encoder_part,
    text_encoder_part,
)
from ldm_export.intake.unet_names import UNET_PREFIX, is_diffusers_unet

_BARE_UNET = ("diffusion_model.", "")
_FIRST_TENSOR = "input_blocks.0.0.weight"


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
            of a model with two, the first; or a checkpoint that has one.
        text_encoder_2: File or folder of the second text encoder, likewise.
        tiny_decoder: File or folder of a TAESD in its own names or those of diffusers, of which the
            decoder is added.
        image_normalizer: File or folder of diffusers with mean and standard deviation of embeddings
            of images, for a checkpoint that is normalised by them and does not hold them.

    Raises:
        CheckpointError: A file cannot be read, or is not what it is given as.
        UnknownModelError: The folder holds a pipeline that is not exported.
    """
    files = (vae, text_encoder, text_encoder_2, tiny_decoder, image_normalizer)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(_open_rest(path, vae, text_encoder, text_encoder_2))
        if any(files):
            checkpoint = replace(
                checkpoint, tensors=MappingProxyType(_with_whole_names(checkpoint))
            )
        parts = []
        if vae is not None:
            parts.append(autoencoder_part(_opened(vae, "vae", stack)))
        if text_encoder is not None:
            component = _opened(text_encoder, "text_encoder", stack)
            place = first_place(checkpoint, has_second=text_encoder_2 is not None)
            parts.append(text_encoder_part(component, checkpoint, place))
        if text_encoder_2 is not None:
            component = _opened(text_encoder_2, "text_encoder_2", stack)
            parts.append(second_text_encoder_part(component, checkpoint))
        if tiny_decoder is not None:
            parts.append(tiny_decoder_part(_opened(tiny_decoder, "vae", stack)))
        if image_normalizer is not None:
            component = _opened(image_normalizer, "image_normalizer", stack)
            parts.append(image_normalizer_part(component, checkpoint))
        stack.pop_all()
    return _with_parts(checkpoint, parts) if parts else checkpoint


def _open_rest(
    path: Path, vae: Path | None, text_encoder: Path | None, text_encoder_2: Path | None
) -> Checkpoint:
    """Open a model without the components that come from files of their own."""
    if not is_diffusers_folder(path):
        checkpoint = open_checkpoint(path)
        return replace(checkpoint, tensors=with_open_clip_projections(checkpoint.tensors))
    given = {"vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    return open_folder(path, without=frozenset(name for name in given if given[name]))


def _opened(path: Path, name: str, stack: ExitStack) -> StoredComponent:
    """Open a component; of a diffusers folder, the component of that name."""
    component = open_component(path / name if is_diffusers_folder(path) else path)
    for each in component.opened:
        stack.enter_context(each)
    return component


def _with_parts(checkpoint: Checkpoint, parts: list[Part]) -> Checkpoint:
    """Return a checkpoint with components from files of their own."""
    places = tuple(part.place for part in parts)
    tensors = {
        name: each for name, each in checkpoint.tensors.items() if not name.startswith(places)
    }
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
