"""The sampling defaults of a model, each from the first source that states it."""

import logging
from dataclasses import asdict
from typing import Any

from ldm_export.detection.overrides import Sources, assumed, first_stated
from ldm_export.detection.own_sections import SamplingFields
from ldm_export.errors import ExportError
from ldm_runtime.requests.presets import PRESET_FIELDS, PRESETS
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.specs.model import Assumption, PredictionType, SamplingDefaults

_LOGGER = logging.getLogger(__name__)

_AUTOENCODER_SIZE = 256  # pixels per side of the released autoencoders' training images


def read_defaults(
    sources: Sources, factor: int, prediction_type: PredictionType, *, has_null: bool
) -> tuple[SamplingDefaults, list[Assumption]]:
    """Return the defaults of a model, and what they assume.

    Args:
        sources: Flags, configuration, the file's own words and family. A preset comes first.
        factor: The autoencoder's downsampling factor.
        prediction_type: What the UNet predicts, on which its native size may depend.
        has_null: Whether the model has a null condition, which guidance needs.

    Raises:
        ExportError: The configuration states an eta for a sampler that has none.
    """
    size, notes = _size(sources, factor, sources.family.latent_size_of(prediction_type))
    sampling, of_sampling = _sampling(sources, has_null=has_null)
    if sources.family.task != "autoencoder":
        notes += of_sampling
    return SamplingDefaults(height=size[0], width=size[1], **sampling), notes


def _sampling(sources: Sources, *, has_null: bool) -> tuple[dict[str, Any], list[Assumption]]:
    (stated, source), family = _stated_sampling(sources), sources.family
    sampler = stated.sampler or family.sampler
    is_family_sampler = sampler == family.sampler
    eta = family.eta if is_family_sampler else SAMPLERS[sampler].default_eta
    usual = {
        "sampler": family.sampler,
        "schedule": family.schedule if is_family_sampler else None,
        "num_inference_steps": family.num_inference_steps,
        "guidance_scale": family.guidance_scale if has_null else 1.0,
        "eta": eta,
    }
    values, notes = {}, []
    for name, own in asdict(stated).items():
        values[name] = usual[name] if own is None else own
        if values[name] is not None:
            who = "family" if own is None else source
            notes.append(assumed(f"defaults.{name}", values[name], who))
    return values, notes


def _stated_sampling(sources: Sources) -> tuple[SamplingFields, str]:
    """Return the sampling that the flag --preset or the configuration states, and which of them."""
    if sources.flags.preset is not None:
        preset = PRESETS[sources.flags.preset]
        fields = {name: getattr(preset, name) for name in PRESET_FIELDS}
        return SamplingFields(**fields), f"preset {preset.name}"
    config = sources.config.sampling
    sampler = config.sampler or sources.family.sampler
    if config.eta is not None and not SAMPLERS[sampler].uses_eta:
        raise ExportError(f"config: sampling.eta is {config.eta:g}, but {sampler} has none")
    return config, "config"


def _size(
    sources: Sources, factor: int, latent_size: int | None
) -> tuple[tuple[int, int], list[Assumption]]:
    flags, file, family = sources.flags, sources.file, sources.family
    native, usual = _native_sizes(sources, factor, latent_size)
    if family.other_latent_sizes and {native, file.height, flags.height, flags.width} == {None}:
        _LOGGER.warning(
            "models of this family have the same weights at %s pixels and at %d, and the file does "
            "not say which; %d is taken, --height and --width state another",
            ", ".join(str(size * factor) for size in family.other_latent_sizes),
            usual,
            usual,
        )
    height, of_height = first_stated(
        "defaults.height", flags.height, native, usual, file=file.height
    )
    width, of_width = first_stated("defaults.width", flags.width, native, usual, file=file.width)
    return (height, width), [of_height, of_width]


def _native_sizes(sources: Sources, factor: int, latent_size: int | None) -> tuple[int | None, int]:
    """Return the side in pixels that the configuration states, or None, and the family's."""
    config = sources.config
    if latent_size is None:
        return config.resolution, _AUTOENCODER_SIZE
    native = None if config.latent_size is None else config.latent_size * factor
    return native, latent_size * factor
