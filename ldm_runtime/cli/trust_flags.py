"""Flags that say what of a bundle is trusted, of every command that runs its networks."""

import argparse
import re


def add_trust_arguments(parser: argparse._ActionsContainer) -> None:
    """Add `--sha256`."""
    parser.add_argument(
        "--sha256",
        type=_sha256,
        metavar="HEX",
        help="refuse the bundle unless its manifest has this sha256, which `ldm inspect` prints",
    )


def _sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", text):
        raise argparse.ArgumentTypeError(f"must be 64 hexadecimal digits, got {text!r}")
    return text.lower()
