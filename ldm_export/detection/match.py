"""The family of a checkpoint, or an error that names the nearest one and the differences."""

import re
from collections.abc import Sequence

from ldm_export.detection.features import NONE, Feature, Tensors
from ldm_export.detection.fingerprint import expected_tensor, fingerprint, prefixes
from ldm_export.detection.missing_parts import (
    Fingerprint,
    alternatives,
    differing,
    without_parts,
)
from ldm_export.errors import UnknownModelError
from ldm_export.families.records import Expected, Family, FamilyDefaults
from ldm_export.families.table import FAMILIES
from ldm_export.families.unused_tensors import UNSUPPORTED_FORMATS
from ldm_runtime.specs.model import PredictionType

_MAX_PREFIXES = 6


def match_family(
    tensors: Tensors,
    families: Sequence[Family] = FAMILIES,
    *,
    takes_embeddings: bool = False,
    edm_prediction: PredictionType | None = None,
) -> tuple[Family, FamilyDefaults]:
    """Return the row that a checkpoint belongs to, and its family defaults.

    Args:
        tensors: The checkpoint's.
        families: The table.
        takes_embeddings: Whether the configuration says so.
        edm_prediction: Prediction type of a model of EDM whose scheduler says so.

    Raises:
        UnknownModelError: No row matches, or this version does not export the one that does.
    """
    found = fingerprint(tensors, takes_embeddings=takes_embeddings, edm_prediction=edm_prediction)
    family = recognise(found, families)
    if family is None or family.family_defaults is None:
        raise UnknownModelError(_refusal(tensors, family, found, families))
    return family, family.family_defaults


def recognise(found: Fingerprint, families: Sequence[Family] = FAMILIES) -> Family | None:
    """Return the matching row with the most features, or None."""
    matching = [family for family in families if not differing(found, family)]
    return max(matching, key=lambda family: len(family.features), default=None)


def describe(found: Fingerprint) -> str:
    """Return a fingerprint as text, without what is absent."""
    features = [
        f"{name} {feature.value}" for name, feature in found.items() if feature.value != NONE
    ]
    return ", ".join(features) or "no UNet, no autoencoder and no text encoder"


def _refusal(
    tensors: Tensors, family: Family | None, found: Fingerprint, families: Sequence[Family]
) -> str:
    """Return why a checkpoint is not exported, given the row that it belongs to, if any."""
    if (family is None or family.is_whole) and (lacking := without_parts(tensors, found, families)):
        return f"{lacking}. Found: {describe(found)}"
    if family is None:
        return _unknown(tensors, found, families)
    if not family.is_whole:
        return f"this is {family.name}; {family.remedy}. Found: {describe(found)}"
    tasks = sorted({row.family_defaults.task for row in families if row.family_defaults})
    return (
        f"recognised but not supported yet by this version: {family.name} ({describe(found)}); "
        f"latent diffusion models for {', '.join(tasks)} and Stable Diffusion 1, 2 and XL are "
        f"exported. {_differences(found, [row for row in families if row.family_defaults])}"
    )


def _unknown(tensors: Tensors, found: Fingerprint, families: Sequence[Family]) -> str:
    counts = list(prefixes(tensors).items())
    names = ", ".join(f"{prefix} ({count})" for prefix, count in counts[:_MAX_PREFIXES])
    if len(counts) > _MAX_PREFIXES:
        names += f" and {len(counts) - _MAX_PREFIXES} more"
    advice = _advice(tensors)
    message = (
        f"this is not a checkpoint of a known family{f': {advice}' if advice else ''}. "
        f"Found: {describe(found)}; tensors: {names or 'none'}"
    )
    if all(feature.value == NONE for feature in found.values()):
        return message
    return f"{message}. {_differences(found, families)}"


def _differences(found: Fingerprint, families: Sequence[Family]) -> str:
    """Return the nearest of families and how a checkpoint differs from it, in a sentence."""
    nearest = _nearest(found, families)
    differences = "; ".join(
        _difference(name, found[name], nearest.features[name]) for name in differing(found, nearest)
    )
    return f"Nearest family: {nearest.name}, which differs in {differences}"


def _nearest(found: Fingerprint, families: Sequence[Family]) -> Family:
    """Return the family with the largest share of features found; a UNet is never overlooked."""
    has_unet = found["model_channels"].value != NONE
    comparable = [
        family
        for family in families
        if family.is_whole and (family.features.get("model_channels") != NONE) == has_unet
    ]
    return min(
        comparable or families,
        key=lambda family: len(differing(found, family)) / (len(family.features) or 1),
    )


def _difference(name: str, feature: Feature, expected: Expected) -> str:
    seen = f" ({feature.tensor})" if feature.tensor else ""
    wanted = []
    for value in alternatives(expected):
        tensor = expected_tensor(name, value)
        wanted.append(f"{value} ({tensor})" if tensor else f"{value}")
    return f"{name}: found {feature.value}{seen}, expected {' or '.join(wanted)}"


def _advice(tensors: Tensors) -> str:
    return next(
        (
            unsupported.advice
            for unsupported in UNSUPPORTED_FORMATS
            if any(re.search(unsupported.pattern, name) for name in tensors)
        ),
        "",
    )
