"""Flags for the backend that runs networks, of every command that runs them."""

import argparse
from typing import get_args

from ldm_runtime.backends import BACKEND_ALIASES, BACKENDS
from ldm_runtime.backends.contract import Precision
from ldm_runtime.cli.parsing import positive
from ldm_runtime.suggestions import did_you_mean


def add_backend_arguments(parser: argparse._ActionsContainer) -> None:
    """Add `--backend`, `--precision` and `--threads`."""
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
        help="precision that networks compute in (default: the backend's fastest)",
    )
    add_threads_argument(parser)


def add_threads_argument(parser: argparse._ActionsContainer) -> None:
    """Add `--threads`."""
    parser.add_argument(
        *("-t", "--threads"),
        type=positive,
        metavar="N",
        help="compute threads (default: one per physical core that this process may use)",
    )


def backend_name(text: str) -> str:
    """Read the name of a backend, or another name for it, as the type of an argument."""
    names = ("auto", *BACKENDS, *BACKEND_ALIASES)
    if text not in names:
        raise argparse.ArgumentTypeError(
            f"unknown backend {text!r}{did_you_mean(text, names)}; choose {', '.join(names)}"
        )
    return BACKEND_ALIASES.get(text, text)
