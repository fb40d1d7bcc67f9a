"""Limits that Linux' control groups of version 1 and 2 set to a process, as in containers."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, kw_only=True)
class ControlGroups:
    """The control groups of this process; a limit holds for all groups below the one it is set in.

    Attributes:
        root: Where the groups are mounted.
        membership: The file that names the groups of this process.
    """

    root: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")

    def processors(self) -> float:
        """Return how many processors' time the process may use; infinity without a limit."""
        return self._lowest("cpu", _processors)

    def memory_bytes(self) -> float:
        """Return how much memory the process may use; infinity without a limit."""
        return self._lowest("memory", _memory_bytes)

    def _lowest(self, controller: str, limit: Callable[[Path], float]) -> float:
        return min(map(limit, self._folders(controller)), default=math.inf)

    def _folders(self, controller: str) -> Iterator[Path]:
        """Yield the folder of each group that counts; in a container some may not be visible."""
        for line in (_text(self.membership) or "").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            mount = self.root / controller if controllers else self.root
            group = PurePosixPath(path.lstrip("/"))
            yield from (mount / each for each in (group, *group.parents))


def _processors(folder: Path) -> float:
    """Return the limit of one group: microseconds of processor time by microseconds of time."""
    quota, _, period = (_text(folder / "cpu.max") or "").partition(" ")
    if not period:
        quota, period = (
            _text(folder / name) or "" for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else math.inf


def _memory_bytes(folder: Path) -> float:
    limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes") or ""
    return float(limit) if limit.isdecimal() else math.inf


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
