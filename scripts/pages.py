"""The command of every script that writes one page or picture of docs/."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def write_page(
    description: str | None, default: Path, page: Callable[[], str], argv: Sequence[str] | None
) -> int:
    """Write a page to where `--out` says, and return the exit status.

    Args:
        description: Docstring of the script; its first line is the help.
        default: Where the page goes without `--out`.
        page: Returns the page.
        argv: Arguments; None is those of the process.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=default)
    out: Path = parser.parse_args(argv).out
    out.write_text(page(), encoding="utf-8")
    return 0
