"""The settings of PEFT, alpha above all: in a file's header as diffusers saves it, or next to it.

Source: `_save_lora_weights` in loaders/lora_base.py of diffusers 0.42, and `get_pattern_key` in
utils/other.py of PEFT 0.21. The rank is not read: the tensors have it.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from ldm_runtime.tensor_files.errors import FormatError

_KEY = "lora_adapter_metadata"
_SAVED_BY_PEFT, _CONFIG, _MAX_BYTES = "adapter_model", "adapter_config.json", 1 << 20
_PREFIXES = ("unet.", "text_encoder.", "text_encoder_2.")
_EXPRESSION = re.compile(r"[*+?()\[\]{}|\\$]")

Settings = Mapping[str, object]


def peft_settings(metadata: Mapping[str, str]) -> Settings:
    """Return PEFT's settings from a file's metadata, empty if it has none.

    Raises:
        FormatError: They are not a JSON object.
    """
    return _settings(metadata.get(_KEY, "{}"), _KEY)


def settings_next_to(file: Path) -> tuple[Settings, bytes]:
    """Return the settings next to a file that PEFT itself saved, and the bytes that they are from.

    Both are empty for any other file.

    Raises:
        FormatError: They are not there, or not a JSON object.
    """
    if file.stem != _SAVED_BY_PEFT:
        return {}, b""
    path = file.with_name(_CONFIG)
    try:
        with path.open("rb") as opened:
            data = opened.read(_MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise FormatError(
            f"is a file of PEFT, whose alpha is in {_CONFIG} next to it; put that there"
        ) from error
    return _settings(data.decode(errors="replace"), _CONFIG), data


def _settings(text: str, place: str) -> Settings:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"has a {place} that is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise FormatError(f"has a {place} that is not a JSON object; save the adapter again")
    return settings


def alpha_of(settings: Settings, component: str, path: str) -> float | None:
    """Return the alpha of a layer, None if the header does not say.

    Args:
        settings: Of `peft_settings`.
        component: The layer's.
        path: The layer's path in the component, with dots.

    Raises:
        FormatError: Alpha is not a finite number, or its pattern is a regular expression.
    """
    patterns = _of(settings, component, "alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise FormatError("has an alpha_pattern that is not a JSON object; save the adapter again")
    alpha = next((value for key, value in patterns.items() if _is_named(path, key)), None)
    if alpha is None:
        alpha = _of(settings, component, "lora_alpha")
    if alpha is None:
        alpha = _of(settings, component, "alpha")  # of LoHa and LoKr
    if alpha is None:
        return None
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not _is_finite(alpha):
        raise FormatError(f"has an alpha of {str(alpha)[:40]!r} for {path}; save the adapter again")
    return float(alpha)


def is_rank_stabilised(settings: Settings, component: str) -> bool:
    """Return whether alpha is divided by the root of the rank."""
    return _of(settings, component, "use_rslora") is True


def _of(settings: Settings, component: str, name: str) -> object:
    """Return a setting of a component; where it is saved alone, its settings have no prefix."""
    if any(key.startswith(_PREFIXES) for key in settings):
        return settings.get(f"{component}.{name}")
    return settings.get(name)


def _is_named(path: str, pattern: str) -> bool:
    """Return whether a key of a pattern is the path of a layer, or the end of one.

    Raises:
        FormatError: The key is a regular expression, which from a stranger could run for ever.
    """
    if _EXPRESSION.search(pattern):
        raise FormatError(
            f"has a regular expression {pattern[:80]!r} in its alpha_pattern; write the names of "
            "layers in full and save it again"
        )
    if pattern.startswith("^"):
        return path == pattern[1:]
    return f".{path}".endswith(f".{pattern}")


def _is_finite(alpha: float) -> bool:
    try:
        return math.isfinite(alpha)
    except OverflowError:  # an integer beyond float64
        return False
