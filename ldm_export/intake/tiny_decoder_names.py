"""Names of the tensors of a TAESD's decoder, in its own files and in those of diffusers.

Sources: taesd.py of madebyollin/taesd (5cccb12), and `AutoencoderTiny` of diffusers 0.42.1, which
does not count the clamp in front as a layer.
"""

import re
from collections.abc import Iterable

from ldm_export.families.records import TINY_AUTOENCODER_PREFIX

_OF_DIFFUSERS = re.compile(r"(decoder\.layers\.\d+\..+)")
#: "decoder." where one file holds both halves, "taesd_decoder." where it holds more.
_OWN = re.compile(r"(?:(?:taesd_)?decoder\.)?(\d+)\.(.+)")


def tiny_decoder_names(names: Iterable[str]) -> dict[str, str | None]:
    """Return the name in a model of every tensor of a decoder; empty if there is none.

    Tensors of an encoder are left out, and unknown ones next to a decoder are None.
    """
    rest = [name for name in names if not name.startswith(("encoder.", "taesd_encoder."))]
    known = {name: _name(name) for name in rest}
    return known if any(known.values()) else {}


def _name(name: str) -> str | None:
    if match := _OF_DIFFUSERS.fullmatch(name):
        return TINY_AUTOENCODER_PREFIX + match[1]
    if (match := _OWN.fullmatch(name)) and int(match[1]):
        return f"{TINY_AUTOENCODER_PREFIX}decoder.layers.{int(match[1]) - 1}.{match[2]}"
    return None
