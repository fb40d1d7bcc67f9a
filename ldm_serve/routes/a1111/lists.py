"""What AUTOMATIC1111's API lists: samplers, schedules, upscalers, and what there is none of."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ldm_runtime.requests.sampler_names import WEB_UI_SCHEDULES, web_ui_sampler
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES
from ldm_serve.routes.a1111.forms import UPSCALER


def _sampler(name: str) -> dict[str, Any]:
    record = SAMPLERS[name]
    return {
        "name": web_ui_sampler(name),
        "aliases": [name],
        "options": {"scheduler": record.schedule, "brownian_noise": record.noise == "brownian"},
    }


def _schedule(name: str) -> dict[str, Any]:
    label = WEB_UI_SCHEDULES.get(name, name)
    return {
        "name": label.lower().replace(" ", "_"),
        "label": label,
        "aliases": [name],
        "default_rho": -1,
        "need_inner_model": False,
    }


def _automatic() -> dict[str, Any]:
    return _schedule("automatic") | {"label": "Automatic", "aliases": None}


def _upscaler(name: str) -> dict[str, Any]:
    return {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4}


#: Answers that never change, by the last part of their path.
LISTS: Mapping[str, object] = MappingProxyType(
    {
        "samplers": [_sampler(name) for name in SAMPLERS],
        "schedulers": [_automatic(), *(_schedule(name) for name in SCHEDULES)],
        "upscalers": [_upscaler(UPSCALER)],
        "latent-upscale-modes": [],
        "loras": [],
        "embeddings": {"loaded": {}, "skipped": {}},
        "hypernetworks": [],
        "face-restorers": [],
        "prompt-styles": [],
        "scripts": {"txt2img": [], "img2img": []},
        "sd-vae": [],
    }
)
