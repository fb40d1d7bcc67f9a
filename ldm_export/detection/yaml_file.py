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


def read_yaml(path: Path) -> object:
    """Return the mappings, lists and plain values in a YAML file.

    Raises:
        ExportError: The file cannot be read or is too large, is not YAML, or uses a part of YAML
            that no configuration needs.
    """
    import yaml  # deferred: only a configuration needs it

    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ExportError(
                f"{path} has more than {_MAX_BYTES} bytes; the configuration of a model is smaller"
            )
        text = data.decode("utf-8")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        _check_plain(yaml, loader, text)
        return yaml.load(text, loader)
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: not UTF-8, no date
        raise ExportError(
            f"{path} is not a valid YAML file: {' '.join(str(error).split())}; mend it, or "
            "leave it out with --config none"
        ) from error


def _check_plain(yaml: Any, loader: Any, text: str) -> None:  # noqa: ANN401  (an untyped module)
    """Check that a text is mappings, lists and scalars, before anything is made of it."""
    depth, resolver = 0, yaml.resolver.Resolver()
    for event in yaml.parse(text, loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError("anchors and aliases (& and *) are not read; write the values out")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"the tag {shown(event.tag)} is not read; remove it")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"it nests more than {_MAX_DEPTH} deep")
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
            _check_scalar(
                event.value, resolver.resolve(yaml.ScalarNode, event.value, (True, False))
            )


def _check_scalar(text: str, tag: str) -> None:
    if tag == "tag:yaml.org,2002:merge":
        raise ValueError("merge keys (<<) are not read; write the entries out")
    if tag in _NUMBERS and len(text) > _MAX_NUMBER_LENGTH:
        raise ValueError(f"it has a number of {len(text)} characters: {shown(text)}")
