"""What AUTOMATIC1111's API lists: samplers, schedules, upscalers, and what there is none of."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ldm_runtime.requests.sampler_names import WEB_UI_SCHEDULES, web_ui_sampler
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES
from ldm_serve.adapters import NamedAdapter
from ldm_serve.routes.a1111.forms import UPSCALER

#: Metadata that tells nothing of the machine and the images of a training, and its length.
_HARMLESS = frozenset(
    {
        "ss_base_model_version",
        "ss_network_alpha",
        "ss_network_dim",
        "ss_network_module",
        "ss_output_name",
        "modelspec.architecture",
        "modelspec.title",
        "modelspec.trigger_phrase",
    }
)
_SHOWN = 200


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


def lora(adapter: NamedAdapter) -> dict[str, Any]:
    """Return an adapter as the list of LoRAs has it, of its metadata what is harmless."""
    metadata = {name: value for name, value in adapter.metadata.items() if name in _HARMLESS}
    return {
        "name": adapter.name,
        "alias": adapter.name,
        "path": adapter.path.name,
        "metadata": {name: value[:_SHOWN] for name, value in metadata.items()},
    }


#: Answers that never change, by the last part of their path.
LISTS: Mapping[str, object] = MappingProxyType(
    {
        "samplers": [_sampler(name) for name in SAMPLERS],
        "schedulers": [_automatic(), *(_schedule(name) for name in SCHEDULES)],
        "upscalers": [_upscaler(UPSCALER)],
        "latent-upscale-modes": [],
        "embeddings": {"loaded": {}, "skipped": {}},
        "hypernetworks": [],
        "face-restorers": [],
        "prompt-styles": [],
        "scripts": {"txt2img": [], "img2img": []},
        "sd-vae": [],
    }
)
