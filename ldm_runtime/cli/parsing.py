"""The parser of both commands: errors of one line with a suggestion, and no abbreviations."""

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

from ldm_runtime.escaping import printable
from ldm_runtime.suggestions import did_you_mean

#: Exit status of a command that is wrong as it was typed.
USAGE = 2


class Parser(argparse.ArgumentParser):
    """A parser of a command or of one of its subcommands.

    The namespace of its arguments has the parser itself as `parser`, whose `error` ends the command
    with one line on stderr and status 2.
    """

    def __init__(self, **options: Any) -> None:  # noqa: ANN401  (those of ArgumentParser)
        super().__init__(allow_abbrev=False, **options)
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        """End the command with the message and where to read on."""
        self.exit(USAGE, f"error: {printable(message)}; see `{self.prog} --help`\n")

    def parse_args(  # type: ignore[override]  # the namespace is always a new one
        self, args: Sequence[str] | None = None
    ) -> argparse.Namespace:
        """Parse a command line, in which flags and other arguments may come in any order."""
        if self._subparsers is None:
            known, unknown = self.parse_known_intermixed_args(args)
        else:
            known, unknown = self.parse_known_args(args)
        if unknown:
            known.parser.error(known.parser.complaint(known, unknown))
        return known

    def complaint(self, known: argparse.Namespace, unknown: Sequence[str]) -> str:
        """Return what is wrong with arguments that no flag or positional has taken."""
        flag = next((each for each in unknown if each.startswith("-") and each != "-"), None)
        if flag is not None:
            name = flag.partition("=")[0]
            return f"unknown option {name}{did_you_mean(name, self._option_string_actions)}"
        words = " ".join(unknown)
        before = [getattr(known, action.dest, None) for action in self._get_positional_actions()]
        if before and isinstance(before[-1], str):
            return f'unexpected "{words}"; put quotes around the words: "{before[-1]} {words}"'
        return f'unexpected "{words}"'

    def subcommands(self) -> Mapping[str, "Parser"]:
        """Return the parsers of the subcommands, by name."""
        (action,) = (each for each in self._actions if each.nargs == argparse.PARSER)
        return cast("Mapping[str, Parser]", action.choices)

    def flags(self) -> list[argparse.Action]:
        """Return the arguments that have a name, that of the help included."""
        return [action for action in self._actions if action.option_strings]

    def _check_value(self, action: argparse.Action, value: Any) -> None:  # noqa: ANN401
        """Refuse a value that is not a choice, with those that are close to it."""
        if action.choices is None or value in action.choices:
            return
        names = [str(each) for each in action.choices]
        is_command = action.nargs == argparse.PARSER
        raise argparse.ArgumentError(
            None if is_command else action,
            f"unknown {'command' if is_command else 'value'} {value!r}"
            f"{did_you_mean(str(value), names)}; choose {', '.join(names)}",
        )


def add_json_flag(parser: argparse.ArgumentParser, text: str = "print JSON") -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help=text)


def positive(text: str) -> int:
    """Read a whole number from 1 on, as the type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def image_size(text: str) -> tuple[int, int]:
    """Read "512x768" as width and height, and "512" as a square, as the type of an argument.

    The width comes first in every flag and message of both commands.
    """
    found = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT pixels, got {text!r}")
    return int(found[1]), int(found[2] or found[1])
