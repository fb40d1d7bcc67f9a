"""The record of a model, put together from shapes and from the three sources of what they hide.

A fact that no shape tells is settled by the first of flag, configuration and family table that has
it, and every such fact is noted with its source.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

from ldm_export.claims import Claims, WeightsChoice, component_shapes
from ldm_export.compvis_config import ConfigFacts
from ldm_export.errors import ExportError, WeightsError
from ldm_export.family_table import Knowledge
from ldm_export.fingerprint import Tensors
from ldm_export.first_stage_shapes import read_autoencoder
from ldm_export.noise_schedule import ScheduleFormula, read_schedule
from ldm_export.text_encoder_shapes import read_clip
from ldm_export.unet_shapes import read_unet
from ldm_export.weight_shapes import Shapes
from ldm_runtime.manifest import (
    Assumption,
    AutoencoderSpec,
    ModelSpec,
    PredictionType,
    SamplingDefaults,
    TextEncoderSpec,
    UNetSpec,
)

T = TypeVar("T")

_CLIP_VOCAB_SIZE = 49408


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What the user says about a checkpoint; None leaves a fact to the configuration or family.

    Attributes:
        weights: Which set of UNet weights to use.
        num_heads: Attention heads of the UNet.
        num_head_channels: Channels a head of the UNet, instead of `num_heads`.
        prediction_type: What the UNet was trained to output.
        latent_scale_factor: Multiplies the autoencoder's latents into the UNet's.
        height: Default height in pixels.
        width: Default width in pixels.
    """

    weights: WeightsChoice | None = None
    num_heads: int | None = None
    num_head_channels: int | None = None
    prediction_type: PredictionType | None = None
    latent_scale_factor: float | None = None
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Everything that can settle a fact, and the tensors."""

    tensors: Tensors
    flags: Overrides
    config: ConfigFacts
    family: Knowledge


def read_spec(sources: Sources, family: str, claims: Claims) -> ModelSpec:
    """Return the record of a checkpoint of `family` whose tensors are assigned by `claims`.

    Raises:
        WeightsError: Tensors are missing, or contradict each other or the configuration.
        ExportError: A fact from a flag or the configuration is impossible.
    """
    shapes = {
        component: component_shapes(sources.tensors, names)
        for component, names in claims.weights.items()
    }
    unet, of_unet = _unet(sources, shapes["unet"])
    autoencoder, of_autoencoder = _autoencoder(
        sources, {**shapes["vae_encoder"], **shapes["vae_decoder"]}
    )
    text_encoder, of_text_encoder = _text_encoder(sources, shapes["text_encoder"])
    alphas_cumprod, of_schedule = _schedule(sources)
    prediction_type, of_prediction = _settle(
        "prediction_type",
        sources.flags.prediction_type,
        sources.config.prediction_type,
        sources.family.prediction_type,
    )
    defaults, of_defaults = _defaults(sources, autoencoder.factor)
    return ModelSpec(
        family=family,
        task=sources.family.task,
        weights=claims.chosen,
        unet=unet,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        alphas_cumprod=alphas_cumprod,
        prediction_type=prediction_type,
        defaults=defaults,
        assumptions=(
            *of_unet,
            *of_autoencoder,
            *of_text_encoder,
            *of_schedule,
            of_prediction,
            *of_defaults,
        ),
    )


def _settle(field: str, flag: T | None, config: T | None, family: T) -> tuple[T, Assumption]:
    """Return the value of the first source that has one, and the record of it."""
    for source, value in (("flag", flag), ("config", config)):
        if value is not None:
            return value, Assumption(field=field, value=str(value), source=source)
    return family, Assumption(field=field, value=str(family), source="family")


def _unet(sources: Sources, shapes: Shapes) -> tuple[UNetSpec, list[Assumption]]:
    (num_heads, num_head_channels), source = _heads(sources)
    unet = read_unet(shapes, num_heads=num_heads, num_head_channels=num_head_channels)
    field = "num_heads" if num_heads else "num_head_channels"
    value = str(num_heads or num_head_channels)
    return unet, [Assumption(field=f"unet.{field}", value=value, source=source)]


def _heads(sources: Sources) -> tuple[tuple[int | None, int | None], str]:
    """Return (num_heads, num_head_channels), exactly one of them not None, and the source."""
    candidates: tuple[tuple[str, Overrides | ConfigFacts], ...] = (
        ("flag", sources.flags),
        ("config", sources.config),
    )
    for source, facts in candidates:
        # A CompVis UNet ignores num_heads where both are given.
        if facts.num_head_channels is not None:
            return (None, facts.num_head_channels), source
        if facts.num_heads is not None:
            return (facts.num_heads, None), source
    return (sources.family.num_heads, sources.family.num_head_channels), "family"


def _autoencoder(sources: Sources, shapes: Shapes) -> tuple[AutoencoderSpec, list[Assumption]]:
    field = "autoencoder.latent_scale_factor"
    flag, own = sources.flags.latent_scale_factor, _own_scale_factor(sources)
    if flag is None and own is not None:
        return read_autoencoder(shapes, latent_scale_factor=own), []
    factor, assumption = _settle(
        field, flag, sources.config.latent_scale_factor, sources.family.latent_scale_factor
    )
    return read_autoencoder(shapes, latent_scale_factor=factor), [assumption]


def _own_scale_factor(sources: Sources) -> float | None:
    """Return the buffer that `scale_by_std` leaves in a checkpoint, if there is one."""
    if "scale_factor" not in sources.tensors:
        return None
    values = sources.tensors["scale_factor"].numpy().reshape(-1)
    own = float(values[0]) if values.size == 1 else math.nan
    if not 0 < own < math.inf:
        raise WeightsError(f"scale_factor is {values.tolist()}; one positive number was expected")
    config = sources.config.latent_scale_factor
    if config is not None and not math.isclose(own, config, rel_tol=1e-3):
        raise WeightsError(
            f"scale_factor is {own:g} in the checkpoint but {config:g} in the configuration; "
            "give the right one with --latent-scale-factor"
        )
    return own


def _text_encoder(sources: Sources, shapes: Shapes) -> tuple[TextEncoderSpec, list[Assumption]]:
    clip = read_clip(shapes)
    head_channels = sources.family.text_head_channels
    num_heads, of_heads = _settle(
        "text_encoder.num_heads",
        None,
        sources.config.text_num_heads,
        1 if clip.width % head_channels else clip.width // head_channels,
    )
    if clip.width % num_heads:
        raise ExportError(
            f"config: cond_stage_config.params.num_attention_heads is {num_heads}, which does not "
            f"divide the text encoder's width {clip.width}"
        )
    activation, of_activation = _settle(
        "text_encoder.activation",
        None,
        sources.config.text_activation,
        sources.family.text_activation,
    )
    # Rows beyond CLIP's vocabulary are words that somebody added after the end token.
    end_token = min(clip.vocab_size, _CLIP_VOCAB_SIZE) - 1
    spec = TextEncoderSpec(
        kind="clip",
        width=clip.width,
        num_layers=clip.num_layers,
        num_heads=num_heads,
        feed_forward_dim=clip.feed_forward_dim,
        vocab_size=clip.vocab_size,
        max_tokens=clip.max_tokens,
        activation=activation,
        pad_token_id=end_token,
    )
    of_padding = Assumption(
        field="text_encoder.pad_token_id", value=f"{end_token}", source="family"
    )
    return spec, [of_heads, of_activation, of_padding]


def _schedule(sources: Sources) -> tuple[tuple[float, ...], list[Assumption]]:
    config, family = sources.config, sources.family
    given = (config.linear_start, config.linear_end, config.num_train_timesteps)
    schedule = read_schedule(
        sources.tensors,
        ScheduleFormula(
            linear_start=config.linear_start or family.linear_start,
            linear_end=config.linear_end or family.linear_end,
            num_train_timesteps=config.num_train_timesteps or family.num_train_timesteps,
            source="family" if given == (None, None, None) else "config",
        ),
    )
    if schedule.formula is None:
        return schedule.alphas_cumprod, []
    assumption = Assumption(
        field="alphas_cumprod", value=str(schedule.formula), source=schedule.formula.source
    )
    return schedule.alphas_cumprod, [assumption]


def _defaults(sources: Sources, factor: int) -> tuple[SamplingDefaults, list[Assumption]]:
    flags, family = sources.flags, sources.family
    native = sources.config.latent_size
    config = None if native is None else native * factor
    height, of_height = _settle(
        "defaults.height", flags.height, config, family.latent_size * factor
    )
    width, of_width = _settle("defaults.width", flags.width, config, family.latent_size * factor)
    defaults = SamplingDefaults(
        height=height,
        width=width,
        sampler=family.sampler,
        num_inference_steps=family.num_inference_steps,
        guidance_scale=family.guidance_scale,
    )
    of_sampling = [
        Assumption(field=f"defaults.{name}", value=str(getattr(defaults, name)), source="family")
        for name in ("sampler", "num_inference_steps", "guidance_scale")
    ]
    return defaults, [of_height, of_width, *of_sampling]
