"""Processors that this process may use, by its affinity and the quotas of its control groups."""

import math
import os
from collections.abc import Set
from pathlib import Path

from ldm_runtime.backends.control_groups import ControlGroups
from ldm_runtime.errors import BackendError

#: Most threads of an engine; no machine has more cores.
MAX_THREADS = 1024
_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_processors(groups: ControlGroups | None = None) -> int:
    """Return how many logical processors this process may use, at least 1.

    Args:
        groups: Its control groups; None is those that it is in.
    """
    return _within_quota(len(_affinity()), groups)


def default_threads(
    groups: ControlGroups | None = None,
    affinity: Set[int] | None = None,
    topology: Path = _TOPOLOGY,
) -> int:
    """Return how many threads compute by default: one per physical core that may be used.

    A quota is rounded up: more threads than it pays for would only wait for each other.

    Args:
        groups: The control groups of this process; None is those that it is in.
        affinity: Numbers of the processors it may use; None is what the system says.
        topology: Folder with what the system says of each processor.
    """
    numbers = _affinity() if affinity is None else affinity
    cores = {_core(topology, number) for number in numbers}
    return _within_quota(len(cores), groups)


def compute_threads(threads: int | None) -> int:
    """Return how many threads an engine computes with: as many as asked for, or the default.

    Raises:
        BackendError: There are more than `MAX_THREADS`: a library would start them all, and the
            machine stand still.
    """
    if threads is not None and threads > MAX_THREADS:
        raise BackendError(
            f"threads must be at most {MAX_THREADS}, got {threads}; one per core is enough"
        )
    return threads or default_threads()


def _within_quota(count: int, groups: ControlGroups | None) -> int:
    quota = (groups or ControlGroups()).processors()
    return max(1, math.ceil(min(count, quota)))


def _affinity() -> Set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _core(topology: Path, number: int) -> str:
    """Return the name of a processor's core: the processors that share it."""
    try:
        return (topology / f"cpu{number}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(number)
