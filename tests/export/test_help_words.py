"""The help of both commands and the page about them: the field's words, and flags that exist."""

import re
import shlex
from pathlib import Path

import pytest

from ldm_export.cli import build_parser as export_parser
from ldm_runtime.cli.commands import build_parser

ROOT = Path(__file__).parents[2]
WORDS = ROOT / "scripts/words.txt"
PAGES = sorted((ROOT / "docs").glob("*.md"))
#: Lines of shell of every page that begin with a command, or pipe into one.
LINES = [
    line
    for page in PAGES
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for line in re.findall(r"^(?:.*\| )?(ldm(?:-export)? [^|<>\n]*)", block, re.MULTILINE)
]
PARSERS = {"ldm": build_parser(), "ldm-export": export_parser()} | {
    f"ldm {name}": parser for name, parser in build_parser().subcommands().items()
}


@pytest.mark.parametrize("command", PARSERS)
def test_help_has_none_of_the_words_that_are_not_used(command):
    avoided = {line.partition("->")[0] for line in WORDS.read_text().splitlines() if line}

    words = set(re.findall(r"[a-z][a-z-]+", PARSERS[command].format_help().lower()))

    assert len(words) > 10
    assert words & avoided == set()


@pytest.mark.parametrize("command", PARSERS)
def test_help_says_something_about_every_flag(command):
    assert [flag.dest for flag in PARSERS[command].flags() if not flag.help] == []


@pytest.mark.parametrize("line", LINES)
def test_every_line_of_the_pages_is_understood(line):
    program, *arguments = shlex.split(line, comments=True)

    args = PARSERS[program].parse_args(arguments)

    assert args.parser.prog.startswith(program)


def test_the_pages_have_lines_of_every_command():
    used = {line.split()[1] for line in LINES}

    assert len(LINES) > 20
    assert {"generate", "completion"} <= used
