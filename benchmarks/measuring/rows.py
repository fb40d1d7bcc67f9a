"""The rows of the benchmarks, with the commit that they were measured at."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_runtime.benchmark.rows import Row, as_line, machine, usable_cpus

__all__ = [
    "ROOT",
    "Row",
    "append_line",
    "as_line",
    "commit",
    "machine",
    "read_records",
    "usable_cpus",
]

ROOT = Path(__file__).resolve().parents[2]


def append_line(results: Path, record: Mapping[str, Any]) -> None:
    """Add a record to a results file, one line of JSON each; a missing file is made."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(as_line(record) + "\n")


def read_records(results: Path) -> list[dict[str, Any]]:
    """Return the records of a results file."""
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def commit() -> str:
    """Return this repository's commit, with "+" if the tree is dirty, or "unknown"."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
