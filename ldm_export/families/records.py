"""The records of the table of checkpoint families, and the weight assignments its rows share."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from ldm_runtime.specs.model import EdmSpec, NullPrompt, PredictionType, Task

#: A value of `detection.fingerprint.fingerprint`, or the values of which one must be found.
Expected = int | str | tuple[int | str, ...]
#: The moving averages of the weights, or the weights as the last step of training left them.
WeightsChoice = Literal["ema", "model"]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The tensors of a checkpoint that belong to a component, and their names in the network.

    Attributes:
        component: Name in `specs.components.COMPONENTS`.
        checkpoint_prefix: Beginning of the names in the checkpoint …
        parameter_prefix: … and what takes its place in the network's parameter names.
        spellings: Other spellings of the rest of the names, and the network's: expressions and
            what takes the place of each.
    """

    component: str
    checkpoint_prefix: str
    parameter_prefix: str
    spellings: tuple[tuple[str, str], ...] = ()

    def parameter_of(self, name: str) -> str | None:
        """Return the network's parameter that a checkpoint's tensor is; None if it is not one."""
        if not name.startswith(self.checkpoint_prefix):
            return None
        rest = name.removeprefix(self.checkpoint_prefix)
        for pattern, replacement in self.spellings:
            rest = re.sub(pattern, replacement, rest)
        return self.parameter_prefix + rest


@dataclass(frozen=True, kw_only=True)
class FamilyDefaults:
    """The features of a family that no shape tells, from its released configurations and scripts.

    Attributes:
        task: Task of the model.
        weights: Set of weights that its scripts sample with, where a checkpoint holds both: those
            of the paper's models use `ema_scope`, that of Stable Diffusion 1 has `use_ema: False`.
        is_merged: Whether people merge its models, with tools that leave the averages of one of
            them in the file, so that averages are measured before they are taken.
        num_heads: Attention heads of the UNet, or None if the head size is fixed.
        num_head_channels: Channels per head of the UNet, or None if the number is fixed. Without a
            UNet both are None.
        prediction_type: Prediction target of the UNet.
        latent_scale_factor: Multiplies the autoencoder's latents into the UNet's.
        linear_start: First beta of the schedule that is linear in sqrt(beta) …
        linear_end: … and the last, after …
        num_train_timesteps: … this number of steps.
        clip_activation: Feed-forward activation of a CLIP text encoder.
        image_head_channels: Channels per head of CLIP's image encoder, …
        image_activation: … and its feed-forward activation.
        normalises_embeddings: Whether noise is added to embeddings of images that are normalised by
            the statistics of many, which no checkpoint of the family holds.
        text_layers_left_out: Last layers of a CLIP text encoder that context does not pass …
        text_final_norm: … and whether it passes the final LayerNorm.
        null_class: The null class, or None if there is none.
        latent_size: Native height and width in latent pixels, or None for 256 image pixels.
        sampler: Default sampler.
        schedule: Default schedule, or None for the sampler's own.
        num_inference_steps: Default number of steps.
        guidance_scale: Default guidance scale, where there is a null condition.
        eta: Default share of fresh noise in a step of `sampler`.
        other_latent_sizes: Native sizes of released models that have the same shapes.
        null_prompt: Whether guidance steers away from the encoded empty prompt, or from zeros.
        siblings: Released models of the same shapes that predict something else, by what that is,
            with their native size in latent pixels. Where nothing else says what a UNet predicts,
            a measurement decides between them.
        released_steps: What those of them predict that were released after this many steps of
            training, which files of CompVis record and fine-tunes keep.
        blocks_removed: Whether the UNet was distilled into one with fewer blocks, so that it may
            lack its middle and its two halves may differ. In others, that is a fault of the file.
        scales_image: Whether the UNet takes the latents of an image to edit in its own scale.
        fp32_halves: Halves of the autoencoder whose released weights overflow half precision on
            some images, so that they get no graph in it.
        edm: Noise levels of a family of EDM; None of one with a training schedule, whose numbers
            are the betas above.
    """

    task: Task
    weights: WeightsChoice
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
    is_merged: bool = False
    schedule: str | None = None
    other_latent_sizes: tuple[int, ...] = ()
    image_head_channels: int = 64
    image_activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    normalises_embeddings: bool = False
    text_layers_left_out: int = 0
    text_final_norm: bool = True
    null_prompt: NullPrompt = "encoded"
    siblings: Mapping[PredictionType, int] = field(default_factory=dict)
    released_steps: Mapping[int, PredictionType] = field(default_factory=dict)
    blocks_removed: bool = False
    scales_image: bool = False
    fp32_halves: tuple[str, ...] = ()
    edm: EdmSpec | None = None

    def latent_size_of(self, prediction_type: PredictionType) -> int | None:
        """Return the native size of a model of these shapes that predicts this."""
        return self.siblings.get(prediction_type, self.latent_size)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: a checkpoint belongs to this family if it has all of its features.

    Attributes:
        name: Recorded in the bundle.
        features: Values of `detection.fingerprint.fingerprint` that it must have. Of several rows
            that match, the one with the most features is chosen.
        family_defaults: Features that no shape tells, or None if this version does not export the
            family.
        assignments: Weight assignments of its components …
        optional: … and of those that a checkpoint may lack.
        averaged: Components of which training may have kept a moving average.
        copies: Beginnings of names whose tensors may repeat others, and of those others.
        is_whole: Whether a checkpoint with these features has all that the model needs.
        remedy: What to do about a checkpoint that has not.
        unused: Tensors of its released files that no component needs: regular expressions over
            whole names, and reasons.
        usual: Further features of its released model. A checkpoint need not have them; they decide
            between rows where parts are missing that would tell them apart.
    """

    name: str
    features: Mapping[str, Expected]
    family_defaults: FamilyDefaults | None = None
    assignments: tuple[Assignment, ...] = ()
    optional: tuple[Assignment, ...] = ()
    averaged: tuple[str, ...] = ("unet",)
    copies: tuple[tuple[str, str], ...] = ()
    is_whole: bool = True
    remedy: str = "give the whole checkpoint"
    unused: tuple[tuple[str, str], ...] = ()
    usual: Mapping[str, Expected] = field(default_factory=dict)


#: Attention of an autoencoder as diffusers spells it, before version 0.17 and since; converters
#: of fine-tuned models leave these names behind (huggingface/diffusers issue 4790).
VAE_ATTENTION = tuple(
    (rf"(\.attn(?:_1|\.\d+)\.){theirs}\.", rf"\1{ours}.")
    for theirs, ours in (
        (r"(?:to_q|query)", "q"),
        (r"(?:to_k|key)", "k"),
        (r"(?:to_v|value)", "v"),
        (r"(?:to_out\.0|proj_attn)", "proj_out"),
        (r"group_norm", "norm"),
    )
)


def assignment(component: str, checkpoint_prefix: str, parameter_prefix: str = "") -> Assignment:
    """Return an assignment; most networks' names are the checkpoint's without its prefix."""
    return Assignment(
        component=component,
        checkpoint_prefix=checkpoint_prefix,
        parameter_prefix=parameter_prefix,
    )


def recognised(name: str, **features: Expected) -> Family:
    """Return a row of a family that is recognised by name, but not exported."""
    return Family(name=name, features=MappingProxyType(features))


def autoencoder_assignments(prefix: str) -> tuple[Assignment, ...]:
    """Return the assignments of the two halves of an autoencoder with names after `prefix`."""
    parts = {
        "decoder": "vae_decoder",
        "post_quant_conv": "vae_decoder",
        "quantize": "vae_decoder",
        "encoder": "vae_encoder",
        "quant_conv": "vae_encoder",
    }
    return tuple(
        replace(assignment(parts[part], f"{prefix}{part}.", f"{part}."), spellings=VAE_ATTENTION)
        for part in parts
    )


AUTOENCODER = autoencoder_assignments("first_stage_model.")
UNET = (assignment("unet", "model.diffusion_model."),)
CLIP = (
    assignment("text_encoder", "cond_stage_model.transformer.text_model.", "text_model."),
    # Written by transformers before 4.31, or by tools that copied its names of then.
    *(
        assignment("text_encoder", f"cond_stage_model.transformer.{part}.", f"text_model.{part}.")
        for part in ("embeddings", "encoder", "final_layer_norm")
    ),
)


def openclip(prefix: str, component: str = "text_encoder") -> tuple[Assignment, ...]:
    """Return the assignments of an OpenCLIP text tower with names after `prefix`."""
    parts = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.")
    return tuple(
        assignment(component, f"{prefix}{part}", part) for part in (*parts, "text_projection")
    )


#: Beginning of the names of what adds noise to the embedding of an image.
NOISE_AUGMENTOR_PREFIX = "noise_augmentor."
#: Beginning of the names of CLIP's image encoder.
IMAGE_ENCODER_PREFIX = "embedder.model.visual."
IMAGE_ENCODER = (assignment("image_encoder", IMAGE_ENCODER_PREFIX),)
#: Beginning of the names of a tiny autoencoder, which any model may have in addition.
TINY_AUTOENCODER_PREFIX = "tiny_autoencoder."
TINY_DECODER = assignment("tiny_decoder", f"{TINY_AUTOENCODER_PREFIX}decoder.", "decoder.")
BERT = (assignment("text_encoder", "cond_stage_model.transformer.", "transformer."),)
CLASS_EMBEDDER = (assignment("class_embedder", "cond_stage_model.embedding.", "embedding."),)
#: Beginning of the names of a depth estimator.
DEPTH_ESTIMATOR_PREFIX = "depth_model.model."
DEPTH_ESTIMATOR = tuple(
    assignment("depth_estimator", f"{DEPTH_ESTIMATOR_PREFIX}{theirs}", ours)
    for theirs, ours in (
        ("pretrained.model.patch_embed.backbone.stages.", "backbone.levels."),  # codespell:ignore
        ("pretrained.model.patch_embed.backbone.", "backbone."),
        ("pretrained.model.", "model."),
        ("pretrained.", ""),
        ("scratch.", "scratch."),
    )
)
SEGMENTATION_ENCODER = (
    assignment("segmentation_encoder", "cond_stage_model.channel_mapper.", "channel_mapper."),
)
