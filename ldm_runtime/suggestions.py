"""Suggestions for a misspelt name: the known names that are close to it."""

from collections.abc import Iterable

_MOST = 3
_LEAST_LIKENESS = 0.65


def close_names(name: str, names: Iterable[str]) -> list[str]:
    """Return the names that begin with `name`, or else resemble it, at most three."""
    from difflib import get_close_matches  # deferred: only a misspelt name needs it

    known = list(dict.fromkeys(names))
    longer = [each for each in known if name.strip("-") and each.startswith(name)]
    return longer[:_MOST] or get_close_matches(name, known, _MOST, _LEAST_LIKENESS)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return " (did you mean euler?)" to follow a misspelt name, or "" if nothing is close."""
    *most, last = close_names(name, names) or [""]
    return f" (did you mean {', '.join(most)}{' or ' if most else ''}{last}?)" if last else ""
