"""The parts of a model that a checkpoint lacks, and the flags that give them from other files.

Tools save a UNet alone, or a model without the autoencoder that users keep in a file of its own.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from ldm_export.detection.features import NONE, Feature
from ldm_export.families.records import Expected, Family

Fingerprint = Mapping[str, Feature]

_TEXT_ENCODER = ("text encoder", "--text-encoder")
#: The name of a component in a sentence, and the flag of a file that has it.
_GIVEN_BY: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "vae_decoder": ("autoencoder", "--vae"),
        "vae_encoder": ("autoencoder", "--vae"),
        "text_encoder": _TEXT_ENCODER,
        "text_encoder_2": ("second text encoder", "--text-encoder-2"),
    }
)
#: Text encoders that a file may give; encoders of the paper's models come with their UNets.
_CLIP = frozenset({"clip", "openclip", "openclip (sgm)", "clip + openclip"})
#: Features that the autoencoder, or what conditions the UNet, shows.
_OF_PARTS = frozenset(
    {
        *("autoencoder", "autoencoder_channels", "factor", "latent_channels", "codebook_size"),
        *("middle_attention", "conditioner", "classes", "tokens"),
    }
)


def flag_of(component: str, family: Family) -> str:
    """Return the flag that gives a component of a family from another file, or ""."""
    part = _GIVEN_BY.get(component)
    if part is None or (part == _TEXT_ENCODER and family.features.get("conditioner") not in _CLIP):
        return ""
    return part[1]


def without_parts(names: Collection[str], found: Fingerprint, families: Sequence[Family]) -> str:
    """Return which exported model a checkpoint is without some of its parts, and how to give them.

    Of several families that have all that is there, the one with the most of it is meant; of those
    the one whose released model has more of it, and of those the first.

    Args:
        names: Those of the checkpoint's tensors.
        found: Its fingerprint.
        families: The table.

    Returns:
        A sentence without its full stop; "" if it differs from every family in something else, or
        if no flag gives a part, without which a UNet does not show what it is.
    """
    if found["model_channels"].value == NONE:
        return ""
    incomplete = [row for row in families if row.family_defaults and _lacks_parts(found, row)]
    if not incomplete:
        return ""
    family = max(incomplete, key=lambda row: _likeness(found, row))
    missing = _missing(names, family)
    flags = dict.fromkeys(flag_of(component, family) for component in missing)
    if not missing or "" in flags:
        return ""
    parts = dict.fromkeys(f"its {_GIVEN_BY[component][0]}" for component in missing)
    them = "it" if len(flags) == 1 else "them"
    return f"this is {family.name} without {_and(parts)}; give {them} by {_and(flags)}"


def _and(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def differing(found: Fingerprint, family: Family) -> list[str]:
    """Return the names of the features in which a checkpoint differs from a family."""
    return [
        name
        for name, expected in family.features.items()
        if found[name].value not in alternatives(expected)
    ]


def alternatives(expected: Expected) -> tuple[int | str, ...]:
    """Return the values of a feature that a family may have."""
    return expected if isinstance(expected, tuple) else (expected,)


def _lacks_parts(found: Fingerprint, family: Family) -> bool:
    """Return whether a checkpoint would be of a family if it had parts that it lacks."""
    return not [*_there(found, differing(found, family))]


def _likeness(found: Fingerprint, family: Family) -> tuple[int, int]:
    """Return how many features a checkpoint shares with a family, and with its released model."""
    usual = [found[name].value in alternatives(each) for name, each in family.usual.items()]
    return len([*_there(found, family.features)]), sum(usual)


def _there(found: Fingerprint, features: Iterable[str]) -> Iterator[str]:
    """Yield the features that are not of parts that a checkpoint lacks."""
    yield from (name for name in features if name not in _OF_PARTS or found[name].value != NONE)


def _missing(names: Collection[str], family: Family) -> list[str]:
    """Return the components of a family of which a checkpoint has no tensor."""
    prefixes: dict[str, list[str]] = {}
    for assignment in family.assignments:
        prefixes.setdefault(assignment.component, []).append(assignment.checkpoint_prefix)
    return [
        component
        for component, known in prefixes.items()
        if not any(name.startswith(tuple(known)) for name in names)
    ]
