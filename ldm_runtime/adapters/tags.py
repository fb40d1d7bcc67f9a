"""Adapters in a prompt, as AUTOMATIC1111's web UI writes them: `<lora:style:0.7>`.

Source: `modules/extra_networks.py` and `extensions-builtin/Lora/extra_networks_lora.py` of
AUTOMATIC1111/stable-diffusion-webui 1.10. Its factors of single networks are not read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TAG = re.compile(r"<(?:lora|lyco):([^>]+)>", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class AdapterTag:
    """An adapter that a prompt names.

    Attributes:
        name: Its name.
        scale: Factor of its updates.
    """

    name: str
    scale: float = 1.0

    def __str__(self) -> str:
        return f"<lora:{self.name}:{self.scale:g}>"


def without_tags(prompt: str) -> str:
    """Return a prompt without the names of adapters."""
    return _TAG.sub("", prompt)


def tags_of(prompt: str) -> Iterator[AdapterTag]:
    """Yield the adapters that a prompt names.

    Raises:
        ValueError: A tag is not a name with a scale, or without; the message is the tag.
    """
    for tag in _TAG.finditer(prompt):
        name, colon, scale = tag[1].partition(":")
        try:
            yield AdapterTag(name=name, scale=float(scale) if colon else 1.0)
        except ValueError:
            raise ValueError(tag[0][:80]) from None
