"""Presets: the settings that distilled models were released with, which no weights tell."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ldm_runtime.specs.model import PredictionType

_LIGHTNING = "https://huggingface.co/ByteDance/SDXL-Lightning"
_HYPER = "https://huggingface.co/ByteDance/Hyper-SD"
_DMD2 = "https://huggingface.co/tianweiy/DMD2"
_DIFFUSERS = "https://huggingface.co/docs/diffusers/using-diffusers"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings of a distilled model.

    Attributes:
        name: Its name in a request and on the command line.
        models: The released models that it is for, and their base.
        sampler: Name in `ldm_runtime.samplers.SAMPLERS`.
        schedule: Name in `ldm_runtime.schedules.SCHEDULES`.
        num_inference_steps: Steps of the sampler.
        eta: Share of fresh noise per step; that of the sampler where it has no choice.
        guidance_scale: Classifier-free guidance; 1, the unguided model, is 0 in diffusers.
        prediction_type: What the released UNet predicts, where that is not what its base predicts.
        source: Where the settings are published.
    """

    name: str
    models: str
    sampler: str
    schedule: str
    num_inference_steps: int
    eta: float
    guidance_scale: float = 1.0
    prediction_type: PredictionType | None = None
    source: str


def _lightning(steps: int, prediction_type: PredictionType | None = None) -> Preset:
    kind = f"{steps}-step" + (" UNet of x0" if prediction_type == "sample" else "")
    return Preset(
        name=f"lightning-{steps}",
        models=f"SDXL-Lightning, {kind} (SDXL)",
        sampler="euler",
        schedule="trailing",
        num_inference_steps=steps,
        eta=0.0,
        prediction_type=prediction_type,
        source=_LIGHTNING,
    )


def _hyper(steps: int) -> Preset:
    return Preset(
        name=f"hyper-{steps}",
        models=f"Hyper-SD, {steps}-step LoRA merged into its base (SD 1.5, SDXL)",
        sampler="ddim",
        schedule="trailing",
        num_inference_steps=steps,
        eta=0.0,
        source=_HYPER,
    )


_ROWS = (
    Preset(
        name="turbo",
        models="SDXL-Turbo (SDXL), SD-Turbo (SD 2.1): 1 step, up to 4",
        sampler="euler_ancestral",
        schedule="trailing",
        num_inference_steps=1,
        eta=1.0,
        source=f"{_DIFFUSERS}/sdxl_turbo",
    ),
    _lightning(1, "sample"),
    _lightning(2),
    _lightning(4),
    _lightning(8),
    Preset(
        name="hyper-1",
        models="Hyper-SD, 1-step UNet (SDXL)",
        sampler="lcm",
        schedule="from_800",
        num_inference_steps=1,
        eta=1.0,
        source=_HYPER,
    ),
    _hyper(2),
    _hyper(4),
    _hyper(8),
    Preset(
        name="lcm",
        models="LCM-LoRA merged into its base (SD 1.5, SDXL): 4 steps, 2 to 8",
        sampler="lcm",
        schedule="consistency",
        num_inference_steps=4,
        eta=1.0,
        source=f"{_DIFFUSERS}/inference_with_lcm",
    ),
    Preset(
        name="tcd",
        models="TCD-LoRA merged into its base (SD 1.5, SD 2.1, SDXL): 4 steps and more",
        sampler="tcd",
        schedule="consistency",
        num_inference_steps=4,
        eta=0.3,
        source=f"{_DIFFUSERS}/inference_with_tcd_lora",
    ),
    Preset(
        name="dmd2",
        models="DMD2, 4-step UNet or LoRA (SDXL)",
        sampler="lcm",
        schedule="trailing",
        num_inference_steps=4,
        eta=1.0,
        source=_DMD2,
    ),
    Preset(
        name="dmd2-1",
        models="DMD2, 1-step UNet (SDXL)",
        sampler="lcm",
        schedule="from_399",
        num_inference_steps=1,
        eta=1.0,
        source=_DMD2,
    ),
)

#: The presets by name.
PRESETS: Mapping[str, Preset] = MappingProxyType({row.name: row for row in _ROWS})
#: The fields of a request that a preset fills in.
PRESET_FIELDS = ("sampler", "schedule", "num_inference_steps", "guidance_scale", "eta")
