"""Flags that say what of a bundle is trusted, of every command that runs its networks."""

import argparse
import re


def add_trust_arguments(parser: argparse._ActionsContainer) -> None:
    """Add `--sha256` and `--trust-engines`."""
    parser.add_argument(
        "--sha256",
        type=_sha256,
        metavar="HEX",
        help="refuse the bundle unless its manifest has this sha256, which `ldm inspect` prints",
    )
    parser.add_argument(
        "--trust-engines",
        action="store_true",
        help="run TensorRT engines that were not built on this machine; they are code, so only of "
        "a bundle from a source you trust",
    )


def _sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", text):
        raise argparse.ArgumentTypeError(f"must be 64 hexadecimal digits, got {text!r}")
    return text.lower()
