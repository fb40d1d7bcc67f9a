"""The prediction target of a UNet, from the first source that states it, else from hints.

A hint is what usually goes with a model and need not be of this one. A measurement outweighs it.
"""

from ldm_export.detection.overrides import Sources, assumed, by_hint, first_stated
from ldm_runtime.requests.presets import PRESETS
from ldm_runtime.specs.model import Assumption, PredictionType

_METADATA, _DEFAULT, _STEP = "metadata", "config default", "training step"
#: The hints, as sources of an assumption: metadata, an entry that a configuration of CompVis leaves
#: out, and the steps of training in a file.
HINTS = (_METADATA, _DEFAULT, _STEP)


def read_prediction_type(sources: Sources) -> tuple[PredictionType, Assumption]:
    """Return what the UNet predicts, and the record of who says so."""
    preset = None if sources.flags.preset is None else PRESETS[sources.flags.preset]
    if sources.flags.prediction_type is None and preset and preset.prediction_type:
        own = preset.prediction_type
        return own, assumed("prediction_type", own, f"preset {preset.name}")
    usual, source = _usual(sources)
    stated = first_stated(
        "prediction_type",
        sources.flags.prediction_type,
        sources.config.prediction_type,
        usual,
        file=sources.file.prediction_type,
        measured=sources.measured,
    )
    return by_hint(stated, source)


def _usual(sources: Sources) -> tuple[PredictionType, str]:
    """Return what a model predicts of which nothing says it, by the hints or else its family."""
    family, step = sources.family, sources.file.global_step
    if sources.metadata.prediction_type is not None:
        return sources.metadata.prediction_type, _METADATA
    if sources.config.usual_prediction_type is not None:
        return sources.config.usual_prediction_type, _DEFAULT
    if step is not None and family.siblings and step in family.released_steps:
        return family.released_steps[step], _STEP
    return family.prediction_type, "family"
