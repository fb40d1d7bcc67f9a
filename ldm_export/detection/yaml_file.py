"""A reader of YAML that lies next to a checkpoint: plain data, at a bounded cost.

YAML is small to write and large to read: aliases let a file of a few hundred bytes stand for
gigabytes, merge keys copy, tags name classes, and numbers may have any length. Configurations of
models use none of it, so that here all of it is an error. What is left costs time and memory in
proportion to the size of the file, which is bounded.
"""

from pathlib import Path
from typing import Any

from ldm_export.errors import ExportError
from ldm_runtime.inputs.reading import shown

#: Sixteen times the longest configuration in CompVis' and Stability's repositories.
_MAX_BYTES = 1 << 16
_MAX_DEPTH = 32
_MAX_NUMBER_LENGTH = 40
_NUMBERS = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})


class UnplainYamlError(ExportError):
    """A YAML file uses a part of YAML that no configuration of a model needs.

    Attributes:
        fault: That part.
        has_wanted: Whether the file has the mapping that it is read for.
    """

    def __init__(self, path: Path, fault: str, *, has_wanted: bool) -> None:
        self.fault = fault
        self.has_wanted = has_wanted
        super().__init__(_invalid(path, fault))


def read_yaml(path: Path, wanted: tuple[str, ...] = ()) -> object:
    """Return the mappings, lists and plain values in a YAML file.

    Args:
        path: The file.
        wanted: Keys that lead to the mapping that the file is read for.

    Raises:
        ExportError: The file cannot be read or is too large, or is not YAML.
        UnplainYamlError: It uses a part of YAML that no configuration needs.
    """
    import yaml  # deferred: only a configuration needs it

    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ExportError(
                f"{path} has more than {_MAX_BYTES} bytes, and the configuration of a model is "
                "smaller; give another with --config FILE, or --config none"
            )
        text = data.decode("utf-8")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        if fault := _unplain_fault(yaml, loader, text):
            is_there = _has_mapping(yaml, yaml.compose(text, loader), wanted)
            raise UnplainYamlError(path, fault, has_wanted=is_there)
        return yaml.load(text, loader)
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: not UTF-8, no date
        raise ExportError(_invalid(path, " ".join(str(error).split()))) from error


def _invalid(path: Path, fault: str) -> str:
    return f"{path} is not a valid YAML file: {fault}; mend it, or leave it out with --config none"


def _unplain_fault(yaml: Any, loader: Any, text: str) -> str:  # noqa: ANN401  (an untyped module)
    """Return what in a text is neither mapping, list nor scalar, before anything is made of it.

    Raises:
        ValueError: It nests so deeply that nothing should be made of it.
    """
    depth, fault, resolver = 0, "", yaml.resolver.Resolver()
    for event in yaml.parse(text, loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError(f"it nests more than {_MAX_DEPTH} deep")
        fault = fault or _fault_of(yaml, resolver, event)
    return fault


def _fault_of(yaml: Any, resolver: Any, event: Any) -> str:  # noqa: ANN401  (an untyped module)
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
        return "anchors and aliases (& and *) are not read; write the values out"
    if getattr(event, "tag", None) is not None:
        return f"the tag {shown(event.tag)} is not read; remove it"
    if not isinstance(event, yaml.ScalarEvent) or not event.implicit[0]:
        return ""
    tag = resolver.resolve(yaml.ScalarNode, event.value, (True, False))
    if tag == "tag:yaml.org,2002:merge":
        return "merge keys (<<) are not read; write the entries out"
    if tag in _NUMBERS and len(event.value) > _MAX_NUMBER_LENGTH:
        return f"it has a number of {len(event.value)} characters: {shown(event.value)}"
    return ""


def _has_mapping(yaml: Any, node: Any, path: tuple[str, ...]) -> bool:  # noqa: ANN401  (likewise)
    """Return whether keys lead to a mapping, without making anything of the nodes of a text."""
    for key in path:
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((value for name, value in entries if name.value == key), None)
    return isinstance(node, yaml.MappingNode)
