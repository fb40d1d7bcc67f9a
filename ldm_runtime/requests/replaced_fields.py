"""The fields of a recorded request that others replace once these are changed."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

from ldm_runtime.requests.presets import PRESET_FIELDS
from ldm_runtime.requests.request import CUSTOM

_T = TypeVar("_T")
_SIZE = ("height", "width", "tile_size")

#: Recorded fields that say nothing any more once another field is changed.
REPLACED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "preset": (*PRESET_FIELDS, "sigmas"),
        "sampler": ("eta", "schedule"),
        "schedule": ("sigmas",),
        "num_inference_steps": ("sigmas",),
        "sigmas": ("num_inference_steps", "schedule"),
        "image": _SIZE,
        "segmentation": _SIZE,
        "depth_map": _SIZE,
        "mask_image": ("outpaint",),
        "outpaint": ("mask_image", "mask_blur", *_SIZE),
        "height": ("tile_size",),
        "width": ("tile_size",),
        "hires_scale": ("tile_size",),
    }
)
#: Recorded fields that mean nothing once another one is taken away.
_PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "image": ("strength", "mask_image", "mask_blur", "outpaint"),
        "mask_image": ("mask_blur",),
        "hires_scale": ("hires_strength",),
        "latents": ("denoising_start",),
        "variation_strength": ("variation_seed",),
    }
)


def kept_fields(recorded: Mapping[str, _T], changes: Mapping[str, object]) -> dict[str, _T]:
    """Return the recorded fields that still say something next to changed ones.

    Another sampler gets its own eta and schedule, a preset all that it sets, another image or map
    its own size, and another size its own tiles. A change to the recorded value is none.

    Args:
        recorded: The fields of a resolved request; those that are None are left out.
        changes: The fields that are changed, as `recorded` would hold them: samplers and schedules
            have this program's names, and None takes a field away.
    """
    kept = {name: value for name, value in recorded.items() if value is not None}
    for name, value in changes.items():
        if value == recorded.get(name):
            continue
        is_off = value is None or value == 0
        for replaced in (*REPLACED.get(name, ()), *(_PARTS.get(name, ()) if is_off else ())):
            kept.pop(replaced, None)
    if "sigmas" not in kept and kept.get("schedule") == CUSTOM:
        del kept["schedule"]
    return kept
