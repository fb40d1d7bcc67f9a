"""Adapters in the prompts of AUTOMATIC1111's API.

Names that the web UI does not know and leaves out are errors here, as are its factors of single
networks.
"""

from ldm_runtime.adapters.tags import tags_of
from ldm_serve.adapters import AdapterChoice
from ldm_serve.errors import invalid


def tagged_adapters(prompt: str) -> list[AdapterChoice]:
    """Return the adapters that a prompt names.

    Raises:
        ServeError: A tag is not a name with a scale, or without.
    """
    try:
        return [AdapterChoice(tag.name, tag.scale) for tag in tags_of(prompt)]
    except ValueError as error:
        message = f"prompt: write <lora:NAME> or <lora:NAME:SCALE>, got {str(error)!r}"
        raise invalid("prompt", message) from None
