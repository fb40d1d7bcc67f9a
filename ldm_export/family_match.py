"""Which row of the family table a checkpoint is, or an error that says how near it comes to one."""

import re
from collections.abc import Mapping, Sequence

from ldm_export.errors import UnknownModelError
from ldm_export.family_table import FAMILIES, FOREIGN, Family, Knowledge
from ldm_export.fingerprint import NONE, Fact, Tensors, expected_tensor, fingerprint, prefixes

Fingerprint = Mapping[str, Fact]

_MAX_PREFIXES = 6


def match_family(
    tensors: Tensors, families: Sequence[Family] = FAMILIES
) -> tuple[Family, Knowledge]:
    """Return the row that a checkpoint belongs to, and what it adds to the shapes.

    Raises:
        UnknownModelError: No row matches, or this version does not export the one that does.
    """
    found = fingerprint(tensors)
    family = recognise(found, families)
    if family is None:
        raise UnknownModelError(_unknown(tensors, found, families))
    if family.knowledge is None:
        exported = ", ".join(row.name for row in families if row.knowledge)
        raise UnknownModelError(
            f"recognised but not supported yet by this version: {family.name} "
            f"({describe(found)}). Exported today: {exported}"
        )
    return family, family.knowledge


def recognise(found: Fingerprint, families: Sequence[Family] = FAMILIES) -> Family | None:
    """Return the matching row with the most facts, or None."""
    matching = [family for family in families if not _differing(found, family)]
    return max(matching, key=lambda family: len(family.facts), default=None)


def describe(found: Fingerprint) -> str:
    """Return a fingerprint as text, without what is absent."""
    facts = [f"{name} {fact.value}" for name, fact in found.items() if fact.value != NONE]
    return ", ".join(facts) or "no UNet, no first stage and no text encoder"


def _differing(found: Fingerprint, family: Family) -> list[str]:
    return [name for name, value in family.facts.items() if found[name].value != value]


def _unknown(tensors: Tensors, found: Fingerprint, families: Sequence[Family]) -> str:
    counts = list(prefixes(tensors).items())
    names = ", ".join(f"{prefix} ({count})" for prefix, count in counts[:_MAX_PREFIXES])
    if len(counts) > _MAX_PREFIXES:
        names += f" and {len(counts) - _MAX_PREFIXES} more"
    advice = _advice(tensors)
    message = (
        f"this is no checkpoint of a known family{f': {advice}' if advice else ''}. "
        f"Found: {describe(found)}; tensors: {names or 'none'}"
    )
    if all(fact.value == NONE for fact in found.values()):
        return message
    nearest = min(
        families, key=lambda family: len(_differing(found, family)) / (len(family.facts) or 1)
    )
    differences = "; ".join(
        _difference(name, found[name], nearest.facts[name]) for name in _differing(found, nearest)
    )
    return f"{message}. Nearest family: {nearest.name}, which differs in {differences}"


def _difference(name: str, fact: Fact, expected: int | str) -> str:
    seen = f" ({fact.tensor})" if fact.tensor else ""
    tensor = expected_tensor(name, expected)
    wanted = f" ({tensor})" if tensor else ""
    return f"{name}: found {fact.value}{seen}, expected {expected}{wanted}"


def _advice(tensors: Tensors) -> str:
    return next(
        (
            foreign.advice
            for foreign in FOREIGN
            if any(re.search(foreign.pattern, name) for name in tensors)
        ),
        "",
    )
