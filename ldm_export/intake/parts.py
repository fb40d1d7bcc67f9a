"""Components from files of their own, under the names that they have in a single file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ldm_export.checkpoint.checkpoint import Checkpoint
from ldm_export.checkpoint.file_fields import LatentScale
from ldm_export.checkpoint.stored_tensors import StoredTensor
from ldm_export.errors import CheckpointError
from ldm_export.families.records import NOISE_AUGMENTOR_PREFIX, TINY_AUTOENCODER_PREFIX
from ldm_export.hyperparameters.shapes import listed
from ldm_export.intake.autoencoder_names import AUTOENCODER_PREFIX
from ldm_export.intake.component import StoredComponent
from ldm_export.intake.folder import autoencoder_of
from ldm_export.intake.image_encoders import image_normalizer_of
from ldm_export.intake.renaming import renamed
from ldm_export.intake.tiny_decoder_names import tiny_decoder_names

_IN_TRAINING_ONLY = ("loss.", f"{AUTOENCODER_PREFIX}loss.", "logvar")

Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True, kw_only=True)
class Part:
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


def autoencoder_part(component: StoredComponent) -> Part:
    """Read an autoencoder; of a whole checkpoint, its autoencoder.

    Raises:
        CheckpointError: It is not one that is exported.
    """
    tensors = component.tensors
    inside = {name: each for name, each in tensors.items() if name.startswith(AUTOENCODER_PREFIX)}
    kept = {
        name: tensor
        for name, tensor in (inside or tensors).items()
        if not name.startswith(_IN_TRAINING_ONLY)
    }
    placed, fields = autoencoder_of(replace(component, tensors=kept))
    return Part(
        name="autoencoder",
        place=AUTOENCODER_PREFIX,
        component=component,
        tensors=placed,
        fields={
            "vae_scale": _scale_of(fields),
            "vae_fits_fp16": fields.get("vae_fits_fp16", False),
        },
    )


def tiny_decoder_part(component: StoredComponent) -> Part:
    """Read the decoder of a TAESD.

    Raises:
        CheckpointError: It is not one.
    """
    names = tiny_decoder_names(component.tensors)
    if not names:
        raise CheckpointError(
            component.path,
            f"is no decoder of TAESD ({listed(list(component.tensors))}); give --tiny-decoder "
            "taesd_decoder, or the folder of an AutoencoderTiny of diffusers",
        )
    kept = replace(component, tensors={name: component.tensors[name] for name in names})
    return Part(
        name="tiny decoder",
        place=TINY_AUTOENCODER_PREFIX,
        component=component,
        tensors=renamed(kept, "tiny decoder", names),
        fields={},
    )


def image_normalizer_part(component: StoredComponent, checkpoint: Checkpoint) -> Part:
    """Read the statistics of embeddings of images; the noise schedule next to them stays.

    Raises:
        CheckpointError: It holds something else, or the checkpoint has no use for them.
    """
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
    return Part(
        name="image normalizer",
        place=NOISE_AUGMENTOR_PREFIX,
        component=component,
        tensors=own | image_normalizer_of(component),
        fields={},
    )


def _scale_of(fields: Mapping[str, Any]) -> LatentScale:
    return LatentScale(
        factor=fields.get("latent_scale_factor"),
        mean=fields.get("latents_mean"),
        std=fields.get("latents_std"),
    )
