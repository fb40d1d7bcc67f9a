"""The expansion of a request's preset into the fields that the request leaves open."""

from dataclasses import replace

from ldm_runtime.errors import RequestError
from ldm_runtime.requests.presets import PRESET_FIELDS, PRESETS, Preset
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.specs.model import ModelSpec


def with_preset_fields(request: GenerationRequest, spec: ModelSpec) -> GenerationRequest:
    """Return the request with the settings of its preset written out, and without a preset.

    A field that the request has keeps its value: another sampler than the preset's has its own
    eta, and listed sigmas stand for schedule and steps.

    Raises:
        RequestError: The preset is of UNets that predict something else than this model's.
    """
    if request.preset is None:
        return request
    preset = PRESETS[request.preset]
    _check_prediction(preset, spec)
    fixed = {name for name in PRESET_FIELDS if getattr(request, name) is not None}
    if request.sigmas is not None:
        fixed |= {"schedule", "num_inference_steps"}
    if request.sampler not in (None, preset.sampler):
        fixed.add("eta")
    settings = {name: getattr(preset, name) for name in PRESET_FIELDS if name not in fixed}
    return replace(request, preset=None, **settings)


def _check_prediction(preset: Preset, spec: ModelSpec) -> None:
    if preset.prediction_type in (None, spec.prediction_type):
        return
    raise RequestError(
        "preset",
        f"{preset.name!r} is for a UNet that predicts {preset.prediction_type}, and that of this "
        f"bundle predicts {spec.prediction_type}; choose another, or export the checkpoint again "
        f"with --preset {preset.name}",
    )
