"""The field's words in the help of both commands, as people read it."""

import re
from pathlib import Path

import pytest

from ldm_export.cli import build_parser as export_parser
from ldm_runtime.cli.commands import build_parser

WORDS = Path(__file__).parents[2] / "scripts/words.txt"
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
