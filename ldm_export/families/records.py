"""The records that the table of checkpoint families is made of, and the claims its rows share."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ldm_runtime.specs.model import PredictionType, Task

#: A value of `detection.fingerprint.fingerprint`, or the values of which one must be found.
Expected = int | str | tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Which tensors of a checkpoint belong to a component, and what the network calls them.

    Attributes:
        component: Name in `specs.components.COMPONENTS`.
        checkpoint_prefix: Beginning of the names in the checkpoint …
        parameter_prefix: … and what takes its place in the network's parameter names.
    """

    component: str
    checkpoint_prefix: str
    parameter_prefix: str


@dataclass(frozen=True, kw_only=True)
class FamilyDefaults:
    """What no shape tells about a family, from its released configurations and scripts.

    Attributes:
        task: What the model does with a request.
        num_heads: Attention heads of the UNet, or None if the head size is fixed.
        num_head_channels: Channels a head of the UNet, or None if the number is fixed. Without a
            UNet both are None.
        prediction_type: What the UNet was trained to output.
        latent_scale_factor: Multiplies the autoencoder's latents into the UNet's.
        linear_start: First beta of the schedule that is linear in sqrt(beta) …
        linear_end: … and the last, after …
        num_train_timesteps: … so many steps.
        clip_activation: Feed-forward activation of a CLIP text encoder.
        null_class: The class that stands for none, or None if all of them are classes.
        latent_size: Native height and width in latent pixels, or None for 256 image pixels.
        sampler: Default sampler.
        num_inference_steps: Default number of steps.
        guidance_scale: Default guidance scale, where there is a null condition.
        eta: Default share of fresh noise in a step of `sampler`.
    """

    task: Task
    num_heads: int | None
    num_head_channels: int | None
    prediction_type: PredictionType
    latent_scale_factor: float
    linear_start: float
    linear_end: float
    num_train_timesteps: int
    clip_activation: Literal["quick_gelu", "gelu"]
    null_class: int | None
    latent_size: int | None
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    eta: float


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: a checkpoint is of this family if it has all of its facts.

    Attributes:
        name: Recorded in the bundle.
        facts: Values of `detection.fingerprint.fingerprint` that it must have. Of several rows
            that match, the one with the most facts is meant.
        knowledge: What no shape tells, or None if this version does not export the family.
        claims: Where its components' weights are.
        averaged: Components of which training may have kept a moving average.
        copies: Beginnings of names whose tensors may repeat others, and of those others.
        is_whole: Whether a checkpoint with these facts has all that the model needs.
    """

    name: str
    features: Mapping[str, Expected]
    family_defaults: FamilyDefaults | None = None
    assignments: tuple[Assignment, ...] = ()
    averaged: tuple[str, ...] = ("unet",)
    copies: tuple[tuple[str, str], ...] = ()
    is_whole: bool = True


def assign(component: str, checkpoint_prefix: str, parameter_prefix: str = "") -> Assignment:
    """Return a claim; most networks' names are what is left of the checkpoint's."""
    return Assignment(
        component=component,
        checkpoint_prefix=checkpoint_prefix,
        parameter_prefix=parameter_prefix,
    )


def recognised(name: str, **features: Expected) -> Family:
    """Return a row for a family that is known by name, but not exported."""
    return Family(name=name, features=MappingProxyType(features))


def autoencoder_assignments(prefix: str) -> tuple[Assignment, ...]:
    """Return where the two halves of a first stage are whose names begin with `prefix`."""
    parts = {
        "decoder": "vae_decoder",
        "post_quant_conv": "vae_decoder",
        "quantize": "vae_decoder",
        "encoder": "vae_encoder",
        "quant_conv": "vae_encoder",
    }
    return tuple(assign(parts[part], f"{prefix}{part}.", f"{part}.") for part in parts)


FIRST_STAGE = autoencoder_assignments("first_stage_model.")
UNET = (assign("unet", "model.diffusion_model."),)
CLIP = (
    assign("text_encoder", "cond_stage_model.transformer.text_model.", "text_model."),
    # Written by transformers before 4.31, or by tools that copied its names of then.
    *(
        assign("text_encoder", f"cond_stage_model.transformer.{part}.", f"text_model.{part}.")
        for part in ("embeddings", "encoder", "final_layer_norm")
    ),
)
BERT = (assign("text_encoder", "cond_stage_model.transformer.", "transformer."),)
CLASS_EMBEDDER = (assign("class_embedder", "cond_stage_model.embedding.", "embedding."),)
SEGMENTATION_ENCODER = (
    assign("segmentation_encoder", "cond_stage_model.channel_mapper.", "channel_mapper."),
)
