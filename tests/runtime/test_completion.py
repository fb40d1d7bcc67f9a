"""Completion, tried in bash itself; the scripts for other shells by what is in them."""

import shlex
import shutil
import subprocess

import pytest

from ldm_runtime.backends import BACKENDS
from ldm_runtime.cli.commands import build_parser, main
from ldm_runtime.cli.completion import completion_script
from ldm_runtime.requests.request import FIELDS
from ldm_runtime.samplers import SAMPLERS


@pytest.fixture(scope="module")
def complete():
    """Returns what bash offers for the last of some words; completes several lines at once."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")

    def run(*lines):
        script = '{ source /dev/stdin; } <<< "$1"; shift\n'
        script += 'for line in "$@"; do IFS="|" read -ra COMP_WORDS <<< "$line"\n'
        script += 'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _ldm; echo "${COMPREPLY[@]}"; done'
        command = ["bash", "-uc", script, "bash", printed("bash"), *lines]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return [line.split() for line in done.stdout.splitlines()]

    return run


def printed(shell):
    return completion_script(build_parser(), shell)


def test_bash_completes_commands_flags_and_values(complete):
    commands, prefix, flags, samplers, backend, equals, empty, file, builder = complete(
        "ldm|g",
        "ldm|b",
        "ldm|generate|a red circle|--see",
        "ldm|generate|--sampler|euler",
        "ldm|verify|engines/|-b|t",
        "ldm|generate|--schedule|=|kar",
        "ldm|generate|--schedule|=",
        "ldm|generate|--image|ph",
        "ldm|build-engines|engines|--builder|tensorrt-",
    )

    assert commands == ["generate"]
    assert sorted(prefix) == ["batch", "bench", "build-engines"]
    assert flags == ["--seed"]
    assert samplers == [name for name in SAMPLERS if name.startswith("euler")]
    assert backend == [name for name in BACKENDS if name.startswith("t")]
    assert equals == ["karras"]
    assert empty == list(FIELDS["schedule"].choices)
    assert file == []  # where bash falls back to the names of files
    assert builder == ["tensorrt-rtx"]


def test_bash_knows_every_flag(complete):
    parsers = build_parser().subcommands()

    offered = complete(*(f"ldm|{name}|-" for name in parsers))

    for parser, words in zip(parsers.values(), offered, strict=True):
        assert set(words) == {name for flag in parser.flags() for name in flag.option_strings}


def test_fish_gets_a_line_per_flag_with_its_help_quoted():
    lines = [shlex.split(line, comments=True) for line in printed("fish").splitlines()]

    parsers = build_parser().subcommands()
    assert sum(line[-2:-1] == ["-d"] for line in lines) == sum(
        len(parser.flags()) for parser in parsers.values()
    )
    (sampler,) = (line for line in lines if "sampler" in line)
    assert sampler[sampler.index("-a") + 1].split() == list(SAMPLERS)


def test_zsh_gets_every_flag():
    script = printed("zsh")

    for parser in build_parser().subcommands().values():
        names = " ".join(name for flag in parser.flags() for name in flag.option_strings)
        assert f"compadd -- {names} ;;" in script
    assert script.endswith("compdef _ldm ldm")


def test_the_command_prints_the_script(capsys):
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == printed("bash") + "\n"
