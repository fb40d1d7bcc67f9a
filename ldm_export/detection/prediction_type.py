"""The prediction target of a UNet, from the first source that states it, else from hints.

A hint is what usually goes with a model and need not be of this one. A measurement outweighs it,
and so does training down to nothing but noise, from which no model predicts epsilon.
"""

from ldm_export.detection.overrides import Sources, assumed, by_hint, first_stated
from ldm_export.detection.zero_terminal_snr import is_zero_snr_asked_for
from ldm_runtime.requests.presets import PRESETS
from ldm_runtime.specs.model import Assumption, PredictionType

_METADATA, _DEFAULT, _STEP = "metadata", "config default", "training step"
#: The hints, as sources of an assumption: metadata, an entry that a configuration of CompVis leaves
#: out, and the steps of training in a file.
HINTS = (_METADATA, _DEFAULT, _STEP)


def read_prediction_type(
    sources: Sources, *, from_noise: bool
) -> tuple[PredictionType, Assumption]:
    """Return what the UNet predicts, and the record of who says so.

    Args:
        sources: Flags, what the files say, and the family.
        from_noise: Whether the checkpoint's own noise schedule ends in nothing but noise.
    """
    preset = None if sources.flags.preset is None else PRESETS[sources.flags.preset]
    if sources.flags.prediction_type is None and preset and preset.prediction_type:
        own = preset.prediction_type
        return own, assumed("prediction_type", own, f"preset {preset.name}")
    usual, source = _hint(sources) or (sources.family.prediction_type, "family")
    if usual == "epsilon" and (from_noise or is_zero_snr_asked_for(sources)):
        usual, source = sources.family.prediction_type, "family"
    stated = first_stated(
        "prediction_type",
        sources.flags.prediction_type,
        sources.config.prediction_type,
        usual,
        file=sources.file.prediction_type,
        measured=sources.measured,
    )
    return by_hint(stated, source)


def _hint(sources: Sources) -> tuple[PredictionType, str] | None:
    """Return what a model predicts by the first hint, and which that is; None without one."""
    family, step = sources.family, sources.file.global_step
    if sources.metadata.prediction_type is not None:
        return sources.metadata.prediction_type, _METADATA
    if sources.config.usual_prediction_type is not None:
        return sources.config.usual_prediction_type, _DEFAULT
    if step is not None and family.siblings and step in family.released_steps:
        return family.released_steps[step], _STEP
    return None
