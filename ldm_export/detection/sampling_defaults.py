"""The sampling defaults of a model, each from the first source that states it."""

import logging
from typing import Any

from ldm_export.detection.overrides import Sources, assumed, by_hint, first_stated
from ldm_export.detection.own_sections import SamplingFields
from ldm_export.errors import ExportError
from ldm_runtime.requests.presets import PRESET_FIELDS, PRESETS
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.specs.model import (
    Assumption,
    PredictionType,
    SamplingDefaults,
    latent_step_of,
)
from ldm_runtime.specs.networks import UNetSpec

_LOGGER = logging.getLogger(__name__)

_AUTOENCODER_SIZE = 256  # pixels per side of the released autoencoders' training images


def read_defaults(
    sources: Sources,
    unet: UNetSpec | None,
    factor: int,
    prediction_type: PredictionType,
    *,
    has_null: bool,
) -> tuple[SamplingDefaults, list[Assumption]]:
    """Return the defaults of a model, and what they assume.

    Args:
        sources: Flags, configuration, the file's own words and family. A preset comes first.
        unet: The UNet, of whose downsampling sizes are multiples.
        factor: The autoencoder's downsampling factor.
        prediction_type: What the UNet predicts, on which its native size may depend.
        has_null: Whether the model has a null condition, which guidance needs.

    Raises:
        ExportError: The configuration states an eta for a sampler that has none.
    """
    sizes = _native_sizes(sources, factor, sources.family.latent_size_of(prediction_type))
    _warn_of_other_sizes(sources, sizes, factor)
    step = factor * latent_step_of(unet)
    height, of_height = _side(sources, "height", sizes, step)
    width, of_width = _side(sources, "width", sizes, step)
    notes = [of_height, of_width]
    sampling, of_sampling = _sampling(sources, has_null=has_null)
    if sources.family.task != "autoencoder":
        notes += of_sampling
    return SamplingDefaults(height=height, width=width, **sampling), notes


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
    for name, family_default in usual.items():
        own = getattr(stated, name)
        values[name] = family_default if own is None else own
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


def _warn_of_other_sizes(sources: Sources, sizes: tuple[int | None, int], factor: int) -> None:
    flags, family, (native, usual) = sources.flags, sources.family, sizes
    stated = {native, sources.file.height, sources.metadata.height, flags.height, flags.width}
    if family.other_latent_sizes and stated == {None}:
        _LOGGER.warning(
            "models of this family have the same weights at %s pixels and at %d, and the file does "
            "not say which; %d is taken, --height and --width state another",
            ", ".join(str(size * factor) for size in family.other_latent_sizes),
            usual,
            usual,
        )


def _side(
    sources: Sources, name: str, sizes: tuple[int | None, int], step: int
) -> tuple[int, Assumption]:
    """Return the default height or width, rounded to a multiple of `step` if metadata says it."""
    hint, (native, usual) = getattr(sources.metadata, name), sizes
    field, flag, stated = f"defaults.{name}", getattr(sources.flags, name), sources.file
    if hint is None:
        return first_stated(field, flag, native, usual, file=getattr(stated, name))
    found = first_stated(field, flag, native, hint, file=getattr(stated, name))
    size, note = by_hint(found, "metadata")
    rounded = max(1, round(size / step)) * step
    if note.source != "metadata" or rounded == size:
        return size, note
    _LOGGER.warning(
        "modelspec.resolution of the file has the %s %d, but this model generates multiples of %d "
        "pixels; %d is taken, --%s states another",
        name,
        size,
        step,
        rounded,
        name,
    )
    return rounded, assumed(field, rounded, "metadata")


def _native_sizes(sources: Sources, factor: int, latent_size: int | None) -> tuple[int | None, int]:
    """Return the side in pixels that the configuration states, or None, and the family's."""
    config = sources.config
    if latent_size is None:
        return config.resolution, _AUTOENCODER_SIZE
    native = None if config.latent_size is None else config.latent_size * factor
    return native, latent_size * factor
