"""Flags of `ldm generate` that are fields of a request, from the records of those fields."""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from ldm_runtime.requests.fields import FieldRecord, Group
from ldm_runtime.requests.request import FIELDS


def add_request_arguments(parser: argparse.ArgumentParser) -> Mapping[str, Any]:
    """Add a flag for every field of a request, and one for a file of them.

    Returns:
        The argument groups by name, to add more flags to.
    """
    groups = {name: parser.add_argument_group(name) for name in get_args(Group)}
    for record in FIELDS.values():
        _add(groups[record.group], record)
    groups["Conditioning"].add_argument(
        "--label-names", type=Path, metavar="FILE", help="names of labels 0, 1, ..., one per line"
    )
    groups["Conditioning"].add_argument(
        "--requests",
        type=Path,
        metavar="FILE",
        help="generate the requests of a file, one JSON object per line, several at once",
    )
    return groups


def _add(group: argparse._ArgumentGroup, record: FieldRecord) -> None:
    if record.name == "prompt":
        group.add_argument("prompt", nargs="?", help=record.text)
        return
    text = f"{record.text}: {', '.join(record.choices)}" if record.choices else record.text
    options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": record.default}
    if record.kind is bool:
        options["action"] = "store_true"
    else:
        options["metavar"] = record.metavar
        options["type"] = _READERS.get(record.name) or _TYPES.get(record.kind, str)
    group.add_argument(f"--{record.name.replace('_', '-')}", *record.flags, **options)


def _label(text: str) -> int | str:
    """Read an integer as a number, anything else as a name; the request checks its range."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be numbers separated by commas, got {text!r}"
        ) from None


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers separated by commas, got {text!r}"
        ) from None


#: Readers of the value of a flag, by the type of its field; all others are names of files.
_TYPES: Mapping[Any, Callable[[str], object]] = MappingProxyType(
    {
        int: int,
        float: float,
        tuple[float, ...]: _numbers,
        tuple[float, float]: _numbers,
        tuple[int, int, int, int]: _whole_numbers,
    }
)
_READERS: Mapping[str, Callable[[str], object]] = MappingProxyType({"class_label": _label})
