"""One measured configuration as a record, with the machine and the commit it was measured on."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: A row is stable if its slowest repetition is within this share of the median.
STABLE_SPREAD = 0.10


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured configuration. Times are wall clock seconds, results in hand.

    Rows are found by `name` and `backend`, so that another program measured on the same machine
    becomes rows of the same table.

    Attributes:
        name: The part that ran, such as "unet" or "image".
        backend: The backend of this package that ran it, or the peer.
        commit: Git commit of this repository, with "+" appended if the tree was dirty.
        bundle_sha256: Hash of the manifest, so that the exact networks can be found again.
        device: Machine and library version in one string.
        settings: Everything that was varied (state, batch, height, num_inference_steps, …).
        seconds: Every timed repetition, in order; summaries are derived, never stored alone.
        peak_bytes: Highest resident memory of the process, if this row is about one.
    """

    name: str
    backend: str
    commit: str
    bundle_sha256: str
    device: str
    settings: Mapping[str, str | int | float]
    seconds: tuple[float, ...]
    peak_bytes: int | None = None

    @property
    def median_seconds(self) -> float:
        """Median of the timed repetitions."""
        return statistics.median(self.seconds)

    @property
    def is_stable(self) -> bool:
        """Whether the slowest repetition is within 10 % of the median."""
        return max(self.seconds) <= (1 + STABLE_SPREAD) * self.median_seconds

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and what is derived from them, ready for JSON."""
        derived = {"median_seconds": self.median_seconds, "is_stable": self.is_stable}
        return asdict(self) | derived


def as_line(record: Mapping[str, Any]) -> str:
    """Return one line of JSON, numbers to six digits."""
    return json.dumps(_rounded(record), ensure_ascii=False, allow_nan=False)


def append_line(results: Path, record: Mapping[str, Any]) -> None:
    """Add a record to a results file, one line of JSON each; a missing file is made."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(as_line(record) + "\n")


def commit() -> str:
    """Return this repository's commit, with "+" if the tree is dirty, or "unknown"."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if _git("status", "--porcelain") else "")


def machine() -> str:
    """Return processor, usable CPUs and operating system in one string."""
    return f"{_processor()}, {usable_cpus()} CPUs, {platform.system()} {platform.machine()}"


def usable_cpus() -> int:
    """Return how many CPUs this process may use; also where our package is not installed."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _rounded(value: Any) -> Any:  # noqa: ANN401  (whatever JSON holds)
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value
