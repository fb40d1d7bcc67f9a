"""Names of samplers and schedules in other programs: A1111, ComfyUI, k-diffusion and diffusers.

Upper and lower case, spaces, `_` and `-` make no difference, "++" is "pp", and the prefixes of
k-diffusion's functions and of A1111's short names are left out. A name of A1111 may end in that of
a schedule: "DPM++ 2M Karras".

Names whose sampler differs from every one here are not in the table: "DPM fast", "DPM adaptive",
"DPM++ 2M SDE Heun", and `DPMSolverSinglestepScheduler`, which several samplers come from.

Sources: AUTOMATIC1111/stable-diffusion-webui 02b0092, `sd_samplers_kdiffusion.py` and
`sd_schedulers.py`; the table in diffusers' documentation of schedulers.
"""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES

#: Other names of samplers that do not read like their names here.
_SAMPLER_ALIASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ddpm": ("DDPMScheduler",),
        "ddim": ("DDIMScheduler",),
        "euler": ("EulerDiscreteScheduler", "EDMEulerScheduler"),
        "euler_ancestral": ("Euler a", "EulerAncestralDiscreteScheduler"),
        "lcm": ("LCMScheduler",),
        "tcd": ("TCDScheduler",),
        "heun": ("HeunDiscreteScheduler",),
        "dpm2": ("KDPM2DiscreteScheduler",),
        "dpm2_ancestral": ("DPM2 a", "KDPM2AncestralDiscreteScheduler"),
        "dpmpp_2s_ancestral": ("DPM++ 2S a",),
        "plms": ("PNDM", "PNDMScheduler"),
        "lms": ("LMSDiscreteScheduler",),
        "ipndm": ("IPNDMScheduler",),
        "deis": ("DEISMultistepScheduler",),
        "dpmpp_2m": ("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"),
        "dpmpp_sde": ("DPMSolverSDEScheduler",),
        "unipc": ("UniPCMultistepScheduler",),
    }
)
_SCHEDULE_ALIASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"linspace": ("Uniform", "Normal")}
)

#: Names in A1111's web UI; those of samplers and schedules that it lacks stay as they are here. Its
#: "Beta" is not `beta`: it spreads the sigmas, and that the timesteps.
WEB_UI_SAMPLERS: Mapping[str, str] = MappingProxyType(
    {
        "ddim": "DDIM",
        "plms": "PLMS",
        "euler": "Euler",
        "euler_ancestral": "Euler a",
        "lms": "LMS",
        "heun": "Heun",
        "lcm": "LCM",
        "unipc": "UniPC",
        "dpm2": "DPM2",
        "dpm2_ancestral": "DPM2 a",
        "dpmpp_2s_ancestral": "DPM++ 2S a",
        "dpmpp_2m": "DPM++ 2M",
        "dpmpp_sde": "DPM++ SDE",
        "dpmpp_2m_sde": "DPM++ 2M SDE",
        "dpmpp_3m_sde": "DPM++ 3M SDE",
    }
)
WEB_UI_SCHEDULES: Mapping[str, str] = MappingProxyType(
    {
        "linspace": "Uniform",
        "karras": "Karras",
        "exponential": "Exponential",
        "polyexponential": "Polyexponential",
        "sgm_uniform": "SGM Uniform",
    }
)
#: What the web UI means by the schedule "Automatic", by sampler here. Its LCM and UniPC have noise
#: levels of their own. Source: `samplers_k_diffusion` and `get_sigmas` in its module
#: `sd_samplers_kdiffusion.py`, `get_timesteps` in `sd_samplers_timesteps.py`.
_AUTOMATIC_SCHEDULES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("ddim", "plms"), "leading"),
        **dict.fromkeys(("euler", "euler_ancestral", "lms", "heun"), "linspace"),
        **dict.fromkeys(("dpm2", "dpm2_ancestral", "dpmpp_2s_ancestral"), "karras"),
        **dict.fromkeys(("dpmpp_2m", "dpmpp_sde"), "karras"),
        **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_3m_sde"), "exponential"),
    }
)


def automatic_schedule(sampler: str) -> str | None:
    """Return what A1111's schedule "Automatic" is with a sampler, or None if it is none of ours."""
    return _AUTOMATIC_SCHEDULES.get(sampler)


def web_ui_sampler(sampler: str) -> str:
    """Return the name of a sampler in A1111's web UI, or its name here if that lacks it."""
    return WEB_UI_SAMPLERS.get(sampler, sampler)


def known_sampler(name: str) -> tuple[str, str | None]:
    """Return the sampler that a name of any program means, and the schedule that the name carries.

    An unknown name is returned as it is.
    """
    folded = _folded(name)
    if folded in _SAMPLERS:
        return _SAMPLERS[folded], None
    for ending, schedule in _SCHEDULES.items():
        if folded.endswith(ending) and (stem := folded.removesuffix(ending)) in _SAMPLERS:
            return _SAMPLERS[stem], schedule
    return name, None


def known_schedule(name: str) -> str:
    """Return the schedule that a name of any program means; an unknown name as it is."""
    return _SCHEDULES.get(_folded(name), name)


def with_known_names(fields: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of a request with "DPM++ 2M Karras" replaced by the names used here.

    Its schedule counts unless the fields have one, or list their sigmas.
    """
    changed = dict(fields)
    if isinstance(schedule := fields.get("schedule"), str):
        changed["schedule"] = known_schedule(schedule)
    if isinstance(sampler := fields.get("sampler"), str):
        changed["sampler"], carried = known_sampler(sampler)
        if carried and fields.get("schedule") is None and fields.get("sigmas") is None:
            changed["schedule"] = carried
    return changed


def _folded(name: str) -> str:
    plain = re.sub(r"[\s_-]", "", re.sub(r"^(sample|k)_", "", name.casefold()))
    return plain.replace("++", "pp")


def _by_folded_name(
    names: Iterable[str], aliases: Mapping[str, tuple[str, ...]]
) -> Mapping[str, str]:
    return MappingProxyType(
        {_folded(each): name for name in names for each in (name, *aliases.get(name, ()))}
    )


_SAMPLERS = _by_folded_name(SAMPLERS, _SAMPLER_ALIASES)
_SCHEDULES = _by_folded_name(SCHEDULES, _SCHEDULE_ALIASES)
