"""Adapters in prompts, as AUTOMATIC1111's web UI has them: `<lora:style:0.7>`.

Source: `modules/extra_networks.py` and `extensions-builtin/Lora/extra_networks_lora.py` of
AUTOMATIC1111/stable-diffusion-webui 1.10. Its factors of single networks, and names that it does
not know and leaves out, are errors here.
"""

import re

from ldm_serve.adapters import AdapterChoice
from ldm_serve.errors import invalid

_TAG = re.compile(r"<(?:lora|lyco):([^>]+)>", re.IGNORECASE)


def without_tags(prompt: str) -> str:
    """Return a prompt without the names of adapters."""
    return _TAG.sub("", prompt)


def tagged_adapters(prompt: str) -> list[AdapterChoice]:
    """Return the adapters that a prompt names.

    Raises:
        ServeError: A tag is not a name with a scale, or without.
    """
    choices = []
    for tag in _TAG.finditer(prompt):
        name, colon, scale = tag[1].partition(":")
        try:
            choices.append(AdapterChoice(name, float(scale) if colon else 1.0))
        except ValueError:
            message = f"prompt: write <lora:NAME> or <lora:NAME:SCALE>, got {tag[0][:80]!r}"
            raise invalid("prompt", message) from None
    return choices
