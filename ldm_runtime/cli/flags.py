"""Flags of `ldm generate` that are fields of a request, from the records of those fields."""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from ldm_runtime.cli.parsing import image_size
from ldm_runtime.cli.standard_input import STDIN, decoded, place_of, read_data
from ldm_runtime.errors import RequestError
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
        "--textual-inversion",
        type=_word_and_file,
        action="append",
        default=[],
        metavar="[WORD=]FILE",
        help="a word that prompts may use, and its learned embeddings; without a word the file's "
        "name is it; may be repeated",
    )
    groups["Conditioning"].add_argument(
        "--adapter",
        "--lora",
        type=file_and_scale,
        action="append",
        default=[],
        metavar="FILE[@SCALE]",
        help="a LoRA or a relative of it, merged into the model with a factor of 1 or SCALE; may "
        "be repeated",
    )
    groups["Conditioning"].add_argument(
        "--requests",
        metavar="FILE",
        help="generate a request per line, several at once: JSON objects (.jsonl), or prompts "
        "(.txt) with the other flags for all; - is standard input",
    )
    groups["Conditioning"].add_argument(
        "--like",
        type=Path,
        metavar="IMAGE",
        help="repeat the request that an image records; other flags change it",
    )
    groups["Output"].add_argument(
        "--size", type=image_size, metavar="WIDTHxHEIGHT", help="--width and --height in one"
    )
    return groups


def given_fields(args: argparse.Namespace) -> dict[str, object]:
    """Return the fields of a request that the flags set, a prompt of "-" from standard input.

    Raises:
        RequestError: Two flags set the same field, or standard input is not UTF-8 or empty.
    """
    given = {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    if args.text is not None:
        if "prompt" in given:
            raise RequestError("prompt", "is given twice, with --prompt and without; give one")
        given["prompt"] = args.text
    if args.size is not None:
        if given.keys() & {"width", "height"}:
            raise RequestError("size", "sets --width and --height already; leave them out")
        given["width"], given["height"] = args.size
    if given.get("prompt") == STDIN and args.requests is None:
        given["prompt"] = decoded(read_data(STDIN, "prompt"), "prompt", place_of(STDIN)).strip()
        if not given["prompt"]:
            raise RequestError("prompt", "standard input is empty; write the prompt to it")
    return given


def given_inversions(args: argparse.Namespace) -> dict[str, Path]:
    """Return the files of `--textual-inversion` by word.

    Raises:
        RequestError: A word is given twice.
    """
    if (twice := _repeated(args.textual_inversion)) is not None:
        raise RequestError("textual_inversion", f"gives {twice!r} twice; rename one of them")
    return dict(args.textual_inversion)


def given_adapters(args: argparse.Namespace) -> dict[Path, float]:
    """Return the scales of `--adapter` by file.

    Raises:
        RequestError: A file is given twice.
    """
    if (twice := _repeated(args.adapter)) is not None:
        raise RequestError("adapter", f"gives {twice} twice; give it once, with one scale")
    return dict(args.adapter)


def file_and_scale(text: str) -> tuple[Path, float]:
    """Read a file and the scale after its last "@"; without a number there, all is the file."""
    file, _, scale = text.rpartition("@")
    try:
        return (Path(file), float(scale)) if file else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def _repeated(pairs: Iterable[tuple[Hashable, object]]) -> Hashable | None:
    """Return the first key that stands in several pairs, or None."""
    counts = Counter(key for key, _ in pairs)
    return next((key for key, count in counts.items() if count > 1), None)


def _word_and_file(text: str) -> tuple[str, Path]:
    """Read a word and a file; of a file alone, its name without a suffix is the word."""
    word, equals, file = text.partition("=")
    return (word, Path(file)) if equals else (Path(text).stem, Path(text))


def _add(group: argparse._ArgumentGroup, record: FieldRecord) -> None:
    if record.name == "prompt":
        text = f"{record.text}; - reads it from standard input"
        group.add_argument("text", nargs="?", metavar="prompt", help=text)
    options: dict[str, Any] = {"help": _help(record), "default": argparse.SUPPRESS}
    if record.kind is bool:
        options["action"] = "store_true"
    else:
        options["metavar"] = record.metavar
        options["type"] = _READERS.get(record.name) or _TYPES.get(record.kind, str)
    names = (f"--{record.name.replace('_', '-')}", *record.flags)
    group.add_argument(*sorted(names, key=lambda name: name.startswith("--")), **options)


def _help(record: FieldRecord) -> str:
    """Return the help of a field's flag: its text, with its choices before the default."""
    text, semicolon, default = record.text.partition("; default: ")
    if record.choices:
        text = f"{text}: {', '.join(record.choices)}"
    return f"{text}{semicolon}{default}".replace("%", "%%")


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


def _height_and_width(text: str) -> tuple[int, int]:
    width, height = image_size(text)
    return height, width


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
        tuple[int, int]: _whole_numbers,
        tuple[int, int, int, int]: _whole_numbers,
    }
)
_READERS: Mapping[str, Callable[[str], object]] = MappingProxyType(
    {
        "class_label": _label,
        "original_size": _height_and_width,
        "target_size": _height_and_width,
    }
)
