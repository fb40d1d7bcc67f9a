"""The tensors that the user says to leave out, by shell patterns over whole names."""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType

from ldm_export.detection.features import Tensors
from ldm_export.detection.overrides import assumed
from ldm_export.errors import WeightsError
from ldm_export.hyperparameters.shapes import listed
from ldm_runtime.specs.model import Assumption

#: Pattern that leaves a tensor out, by the tensor's name.
Ignored = Mapping[str, str]


def ignored_by(patterns: Sequence[str], names: Collection[str]) -> Ignored:
    """Return the tensors that patterns match, and the first pattern that does.

    Args:
        patterns: Shell patterns, compared with whole names, case included.
        names: Those of a checkpoint's tensors.

    Raises:
        WeightsError: A pattern matches nothing.
    """
    ignored: dict[str, str] = {}
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise WeightsError(
                f"--ignore {pattern!a} matches none of the checkpoint's {len(names)} tensors; a "
                "pattern is compared with whole names, as in --ignore 'adapter.*'"
            )
        for name in matching:
            ignored.setdefault(name, pattern)
    return MappingProxyType(ignored)


def ignored_reason(ignored: Ignored, name: str) -> str:
    """Return why the user leaves a tensor out, or "" for one that no pattern matches."""
    return f"left out by --ignore {ignored[name]!a}" if name in ignored else ""


def without_ignored(tensors: Tensors, ignored: Ignored, unused: Mapping[str, str]) -> Tensors:
    """Return the tensors without those that patterns leave out, so that no value of them is read.

    Args:
        tensors: A checkpoint's.
        ignored: The tensors that patterns match.
        unused: Reason why a tensor is in no component, by its name.
    """
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in ignored or unused.get(name) != ignored_reason(ignored, name)
    }


def check_not_needed(
    component: str, weights: Mapping[str, str], parameters: Collection[str], ignored: Ignored
) -> None:
    """Check that none of the parameters of a network would be left out.

    Args:
        component: Its component.
        weights: Checkpoint tensor name by network parameter name.
        parameters: All parameters of the network.
        ignored: The tensors that are left out.

    Raises:
        WeightsError: One would.
    """
    lost = [weights[name] for name in parameters if weights.get(name) in ignored]
    if lost:
        raise WeightsError(
            f"--ignore {ignored[lost[0]]!a} matches tensors that the {component} needs: "
            f"{listed(lost)}; give a pattern that does not match them"
        )


def ignored_notes(ignored: Ignored, unused: Mapping[str, str]) -> tuple[Assumption, ...]:
    """Return the record of every pattern, with the number of tensors that it leaves out.

    Args:
        ignored: The tensors that patterns match.
        unused: Reason why a tensor is in no component, by its name; one with another reason than
            a pattern is not left out by it.
    """
    counts = dict.fromkeys(ignored.values(), 0)
    for name, pattern in ignored.items():
        counts[pattern] += unused.get(name) in (None, ignored_reason(ignored, name))
    return tuple(
        assumed("ignored_tensors", f"{count} by {pattern!a}", "flag")
        for pattern, count in counts.items()
    )
