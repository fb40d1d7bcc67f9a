"""The record of a model, put together from shapes and from the four sources of what they hide.

A feature that no shape tells is taken from the first of flag, configuration, file and family
defaults that has it, and every such feature is recorded with its source.
"""

import math
from functools import partial
from typing import TypeVar

from ldm_export.checkpoint.file_fields import FileFields
from ldm_export.detection.compvis_config import ConfigFields
from ldm_export.detection.conditioners import CONDITIONER_READERS
from ldm_export.detection.edm import check_prediction, read_edm, read_statistics
from ldm_export.detection.few_numbers import read_numbers
from ldm_export.detection.labels import label_names_of
from ldm_export.detection.latent_scale import warn_of_other_scale
from ldm_export.detection.noise_augmentation import read_noise_augmentation
from ldm_export.detection.noise_schedule import (
    ComputedSchedule,
    ListedBetas,
    NoiseSchedule,
    ScheduleFormula,
    computed_schedule,
    read_schedule,
)
from ldm_export.detection.overrides import Overrides, Sources, assumed, first_stated
from ldm_export.detection.prediction_type import read_prediction_type
from ldm_export.detection.sampling_defaults import read_defaults
from ldm_export.detection.shallow_unet import with_shallow_graph
from ldm_export.detection.weight_assignment import WeightAssignment, component_shapes
from ldm_export.detection.zero_terminal_snr import is_zero_snr_stated, source_of_zero_snr
from ldm_export.errors import WeightsError
from ldm_export.hyperparameters.autoencoder import read_autoencoder
from ldm_export.hyperparameters.shapes import Shapes
from ldm_export.hyperparameters.tiny_autoencoder import read_tiny_autoencoder
from ldm_export.hyperparameters.unet import read_unet
from ldm_runtime.schedules import rescale_zero_terminal_snr
from ldm_runtime.specs.model import Assumption, ModelSpec, NullPrompt, PredictionType
from ldm_runtime.specs.networks import (
    AutoencoderSpec,
    ClassEmbedderSpec,
    ImageEncoderSpec,
    Networks,
    UNetSpec,
)

T = TypeVar("T")


class _Notes(list[Assumption]):
    """The assumptions so far."""

    def keep(self, stated: tuple[T, Assumption | list[Assumption]]) -> T:
        """Record the assumptions that come with a value, and return the value."""
        value, notes = stated
        self.extend([notes] if isinstance(notes, Assumption) else notes)
        return value


def read_spec(sources: Sources, family: str, assignment: WeightAssignment) -> ModelSpec:
    """Return the record of a checkpoint of `family` whose tensors are assigned by `assignment`.

    Raises:
        WeightsError: Tensors are missing, or contradict each other or the configuration.
        ExportError: A feature from a flag or the configuration is impossible.
    """
    shapes = {
        component: component_shapes(sources.tensors, names)
        for component, names in assignment.weights.items()
    }
    notes = _Notes([assumed("weights", assignment.chosen, assignment.source)])
    unet = _unet(sources, shapes, notes)
    autoencoder = _autoencoder(sources, {**shapes["vae_encoder"], **shapes["vae_decoder"]}, notes)
    warn_of_other_scale(sources, autoencoder)
    conditioners = {
        name: notes.keep(read(sources, shapes[name], autoencoder))
        for name, read in CONDITIONER_READERS.items()
        if name in shapes
    }
    tiny = shapes.get("tiny_decoder")
    networks = Networks(
        unet=unet,
        autoencoder=autoencoder,
        tiny_autoencoder=None if tiny is None else read_tiny_autoencoder(tiny, autoencoder),
        **conditioners,
    )
    embedder, encoder = networks.find(ClassEmbedderSpec), networks.find(ImageEncoderSpec)
    has_null = embedder is None or embedder.null_class is not None
    edm, edm_notes = read_edm(sources)
    schedule = None if unet is None or edm is not None else _own_schedule(sources)
    prediction_type, stated_by = read_prediction_type(
        sources, from_noise=schedule is not None and schedule.ends_in_noise
    )
    if unet is not None:
        notes.append(stated_by)
    notes.extend(edm_notes)
    check_prediction(edm, prediction_type)
    return ModelSpec(
        family=family,
        task=sources.family.task,
        weights=assignment.chosen,
        networks=networks,
        alphas_cumprod=()
        if schedule is None
        else notes.keep(_alphas_cumprod(sources, schedule, prediction_type)),
        edm=edm,
        prediction_type=prediction_type,
        null_prompt=_null_prompt(sources, notes),
        noise_augmentation=None
        if encoder is None
        else notes.keep(read_noise_augmentation(sources, encoder.embed_dim)),
        scales_image=_scales_image(sources, notes),
        defaults=notes.keep(
            read_defaults(sources, unet, autoencoder.factor, prediction_type, has_null=has_null)
        ),
        label_names=label_names_of(sources, networks),
        assumptions=tuple(notes),
    )


def _null_prompt(sources: Sources, notes: _Notes) -> NullPrompt:
    stated = sources.file.null_prompt
    if stated is None:
        return sources.family.null_prompt
    notes.append(assumed("null_prompt", stated, "file"))
    return stated


def _scales_image(sources: Sources, notes: _Notes) -> bool:
    """Return whether the UNet takes an image to edit in its own scale; no other task has one."""
    if sources.family.task != "image-editing":
        return False
    return notes.keep(
        first_stated(
            "scales_image",
            None,
            None,
            sources.family.scales_image,
            file=sources.file.scales_image,
        )
    )


def _unet(sources: Sources, shapes: dict[str, Shapes], notes: _Notes) -> UNetSpec | None:
    if "unet" not in shapes:
        return None
    (num_heads, num_head_channels), source = _heads(sources)
    unet = read_unet(
        shapes["unet"],
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        blocks_removed=sources.family.blocks_removed,
    )
    field = "num_heads" if num_heads else "num_head_channels"
    notes.append(assumed(f"unet.{field}", num_heads or num_head_channels, source))
    return with_shallow_graph(unet, sources.flags.reuse)


def _heads(sources: Sources) -> tuple[tuple[int | None, int | None], str]:
    """Return (num_heads, num_head_channels), exactly one of them not None, and the source."""
    candidates: tuple[tuple[str, Overrides | ConfigFields | FileFields], ...] = (
        ("flag", sources.flags),
        ("config", sources.config),
        ("file", sources.file),
    )
    for source, stated in candidates:
        # A CompVis UNet ignores num_heads where both are given.
        if stated.num_head_channels is not None:
            return (None, stated.num_head_channels), source
        if stated.num_heads is not None:
            return (stated.num_heads, None), source
    return (sources.family.num_heads, sources.family.num_head_channels), "family"


def _autoencoder(sources: Sources, shapes: Shapes, notes: _Notes) -> AutoencoderSpec:
    mean, std = notes.keep(read_statistics(sources))
    read = partial(read_autoencoder, shapes, latents_mean=mean, latents_std=std)
    flag = sources.flags.latent_scale_factor
    own = None if flag is not None else _own_scale_factor(sources)
    if own is not None:
        return read(latent_scale_factor=own)
    if flag is None and sources.config.scale_by_std:
        raise WeightsError(
            "the configuration says scale_by_std, so that the scale factor was measured in "
            "training, but the checkpoint has no scale_factor; give it with --latent-scale-factor"
        )
    factor = notes.keep(
        first_stated(
            "autoencoder.latent_scale_factor",
            flag,
            sources.config.latent_scale_factor,
            sources.family.latent_scale_factor,
            file=sources.file.latent_scale_factor,
        )
    )
    return read(latent_scale_factor=factor)


def _own_scale_factor(sources: Sources) -> float | None:
    """Return the buffer that `scale_by_std` leaves in a checkpoint, if it counts."""
    config = sources.config.latent_scale_factor
    stated = config or sources.file.latent_scale_factor or sources.family.latent_scale_factor
    values = read_numbers(
        sources.tensors,
        "scale_factor",
        remedy="give it with --latent-scale-factor",
        usual=None if sources.config.scale_by_std else stated,
    )
    if not values:
        return None
    own = values[0] if len(values) == 1 else math.nan
    if not 0 < own < math.inf:
        raise WeightsError(f"scale_factor is {list(values)}; one positive number was expected")
    if config is not None and not math.isclose(own, config, rel_tol=1e-3):
        raise WeightsError(
            f"scale_factor is {own:g} in the checkpoint but {config:g} in the configuration; "
            "give the right one with --latent-scale-factor"
        )
    return own


def _own_schedule(sources: Sources) -> NoiseSchedule:
    return read_schedule(
        sources.tensors, _stated_schedule(sources), may_be_rescaled=is_zero_snr_stated(sources)
    )


def _alphas_cumprod(
    sources: Sources, schedule: NoiseSchedule, prediction_type: PredictionType
) -> tuple[tuple[float, ...], list[Assumption]]:
    notes = []
    if schedule.formula is not None:
        notes.append(assumed("alphas_cumprod", schedule.formula, schedule.formula.source))
    if schedule.ends_in_noise:
        _check_noise(prediction_type)
        notes.append(assumed("alphas_cumprod", "ends at 2**-24 in place of 0", "file"))
        return schedule.alphas_cumprod, notes
    source = source_of_zero_snr(sources, prediction_type)
    if source is None:
        return schedule.alphas_cumprod, notes
    notes.append(assumed("alphas_cumprod", "rescaled to zero terminal SNR", source))
    return rescale_zero_terminal_snr(schedule.alphas_cumprod), notes


def _check_noise(prediction_type: PredictionType) -> None:
    """Check that a model can denoise nothing but noise: from it, epsilon tells nothing of x0."""
    if prediction_type == "epsilon":
        raise WeightsError(
            "alphas_cumprod ends at 0, nothing but noise, from which a UNet cannot predict "
            "epsilon; models that end so predict v: give --prediction-type v_prediction"
        )


def _stated_schedule(sources: Sources) -> ComputedSchedule:
    config, family = sources.config, sources.family
    if config.given_betas is not None:
        return ListedBetas(betas=config.given_betas)
    given = (config.linear_start, config.linear_end, config.num_train_timesteps)
    if given == (None, None, None) and sources.file.schedule is not None:
        return computed_schedule(sources.file.schedule)
    return ScheduleFormula(
        linear_start=config.linear_start or family.linear_start,
        linear_end=config.linear_end or family.linear_end,
        num_train_timesteps=config.num_train_timesteps or family.num_train_timesteps,
        source="family" if given == (None, None, None) else "config",
    )
