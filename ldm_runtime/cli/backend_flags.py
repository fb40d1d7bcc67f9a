"""Flags for the backend that runs networks, of every command that runs them."""

import argparse
from typing import get_args

from ldm_runtime.backends import BACKEND_ALIASES, BACKENDS
from ldm_runtime.backends.contract import Precision
from ldm_runtime.cli.parsing import positive
from ldm_runtime.suggestions import did_you_mean

#: Defaults of `--precision` and `--threads`, as most commands have them.
_FASTEST = "the backend's fastest"
_PER_CORE = "one per physical core that this process may use"


def add_backend_arguments(
    parser: argparse._ActionsContainer,
    *,
    default_precision: str = _FASTEST,
    default_threads: str = _PER_CORE,
) -> None:
    """Add `--backend`, `--precision` and `--threads`.

    Args:
        parser: The parser of a command, or a group of its flags.
        default_precision: What the help says of the precision unless one is given.
        default_threads: What it says of the number of threads, likewise.
    """
    parser.add_argument(
        *("-b", "--backend", "--device"),
        type=backend_name,
        default="auto",
        metavar="NAME",
        help=f"{', '.join(BACKENDS)}, or cpu for onnxruntime (default: auto, the best that can "
        "run here)",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help=f"precision that networks compute in (default: {default_precision})",
    )
    add_threads_argument(parser, default=default_threads)


def add_threads_argument(parser: argparse._ActionsContainer, *, default: str = _PER_CORE) -> None:
    """Add `--threads`, with what the help says of its default."""
    parser.add_argument(
        *("-t", "--threads"),
        type=positive,
        metavar="N",
        help=f"compute threads (default: {default})",
    )


def backend_name(text: str) -> str:
    """Read the name of a backend, or another name for it, as the type of an argument."""
    names = ("auto", *BACKENDS, *BACKEND_ALIASES)
    if text not in names:
        raise argparse.ArgumentTypeError(
            f"unknown backend {text!r}{did_you_mean(text, names)}; choose {', '.join(names)}"
        )
    return BACKEND_ALIASES.get(text, text)
