"""One measured configuration as a record, with the machine that it was measured on."""

import json
import os
import platform
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
        commit: The code that was measured: its version, or its Git commit with "+" appended if the
            tree was dirty.
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


def _rounded(value: Any) -> Any:  # noqa: ANN401  (whatever JSON holds)
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value
