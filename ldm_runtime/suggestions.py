"""Suggestions for a misspelt name: the known names that are close to it."""

from collections.abc import Iterable
from difflib import get_close_matches

_MOST = 3
_LEAST_LIKENESS = 0.6


def close_names(name: str, names: Iterable[str]) -> list[str]:
    """Return the names that begin with `name` or resemble it, at most three, the closest first."""
    known = list(dict.fromkeys(names))
    longer = [each for each in known if name.strip("-") and each.startswith(name)]
    alike = get_close_matches(name, known, _MOST, _LEAST_LIKENESS)
    return list(dict.fromkeys(longer + alike))[:_MOST]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return " (did you mean euler?)" to follow a misspelt name, or "" if nothing is close."""
    found = close_names(name, names)
    return f" (did you mean {' or '.join(found)}?)" if found else ""
