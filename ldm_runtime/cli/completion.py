"""`ldm completion`: scripts with which a shell completes commands, flags and their values."""

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ldm_runtime.backends import BACKEND_ALIASES, BACKENDS
from ldm_runtime.cli.parsing import Parser
from ldm_runtime.requests.request import FIELDS

SHELLS = ("bash", "zsh", "fish")

_BACKENDS = ("auto", *BACKENDS, *BACKEND_ALIASES)


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A flag of a command.

    Attributes:
        names: Its names, such as "-s" and "--seed".
        takes_value: Whether a value follows it.
        values: The values there are, if they are names.
        text: Its help.
    """

    names: tuple[str, ...]
    takes_value: bool
    values: tuple[str, ...]
    text: str


#: The flags of every command, by its name.
Commands = Mapping[str, Sequence[Flag]]


def completion_script(parser: Parser, shell: str) -> str:
    """Return the script for a shell of `SHELLS`, from the parser of the command."""
    commands = {name: _flags(each) for name, each in parser.subcommands().items()}
    write = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    return "\n".join([f"# Completion of {parser.prog} for {shell}.", *write(parser.prog, commands)])


def _flags(parser: Parser) -> list[Flag]:
    return [
        Flag(
            names=tuple(action.option_strings),
            takes_value=action.nargs != 0,
            values=_values(action),
            text=(action.help or "").replace("%%", "%"),
        )
        for action in parser.flags()
    ]


def _values(action: argparse.Action) -> tuple[str, ...]:
    if action.choices is not None:
        return tuple(map(str, action.choices))
    if action.dest == "backend":
        return _BACKENDS
    return FIELDS[action.dest].choices if action.dest in FIELDS else ()


def _bash(program: str, commands: Commands) -> Iterator[str]:
    """Names of files are what bash falls back to."""
    yield f"_{program}() {{"
    yield "    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} words="
    yield "    [[ $before == = ]] && before=${COMP_WORDS[COMP_CWORD - 2]}  # as in --seed=7"
    yield "    [[ $word == = ]] && word=  # as in --seed="
    yield "    if ((COMP_CWORD == 1)); then"
    yield f'        words="{" ".join(commands)}"'
    yield "    else"
    yield '        case "${COMP_WORDS[1]} $before" in'
    yield from _value_cases(commands, 'words="{words}"', "words=", "        ")
    yield "        *)"
    yield '            [[ $word == -* ]] && case "${COMP_WORDS[1]}" in'
    yield from _flag_cases(commands, 'words="{words}"', "            ")
    yield "            esac ;;"
    yield "        esac"
    yield "    fi"
    yield '    COMPREPLY=($(compgen -W "$words" -- "$word"))'
    yield "}"
    yield f"complete -o default -F _{program} {program}"


def _zsh(program: str, commands: Commands) -> Iterator[str]:
    yield f"_{program}() {{"
    yield "    local word=${words[CURRENT]} before=${words[CURRENT-1]}"
    yield "    if ((CURRENT == 2)); then"
    yield f"        compadd -- {' '.join(commands)}"
    yield "        return"
    yield "    fi"
    yield '    case "${words[2]} $before" in'
    yield from _value_cases(commands, "compadd -- {words}; return", "_files; return", "    ")
    yield "    esac"
    yield "    if [[ $word != -* ]]; then"
    yield "        _files"
    yield "        return"
    yield "    fi"
    yield '    case "${words[2]}" in'
    yield from _flag_cases(commands, "compadd -- {words}", "    ")
    yield "    esac"
    yield "}"
    yield f"compdef _{program} {program}"


def _fish(program: str, commands: Commands) -> Iterator[str]:
    for name, flags in commands.items():
        yield f"complete -c {program} -n __fish_use_subcommand -f -a {name}"
        for flag in flags:
            parts = [f"complete -c {program} -n '__fish_seen_subcommand_from {name}'"]
            for each in flag.names:
                kind = "-l" if each.startswith("--") else "-s"
                parts.append(f"{kind} {each.lstrip('-')}")
            if flag.values:
                parts.append(f"-x -a '{' '.join(flag.values)}'")
            elif flag.takes_value:
                parts.append("-r")
            yield " ".join([*parts, "-d", shlex.quote(flag.text)])


def _value_cases(commands: Commands, named: str, free: str, indent: str) -> Iterator[str]:
    """Yield a case for each flag with a value, which is one of some names or free."""
    for name, flags in commands.items():
        for flag in (each for each in flags if each.takes_value):
            pattern = " | ".join(f'"{name} {each}"' for each in flag.names)
            action = named.format(words=" ".join(flag.values)) if flag.values else free
            yield f"{indent}{pattern}) {action} ;;"


def _flag_cases(commands: Commands, action: str, indent: str) -> Iterator[str]:
    for name, flags in commands.items():
        words = " ".join(each for flag in flags for each in flag.names)
        yield f"{indent}{name}) {action.format(words=words)} ;;"
