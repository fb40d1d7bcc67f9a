"""Work in other processes, watched: seconds of each step of an export, and memory."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring.processes import script_environment
from measuring.rows import ROOT

_STEP = re.compile(r"^(?P<step>\w+) +(?:built|reused) in (?P<seconds>[\d.]+) s$")
_TICK_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Time and memory that an export took.

    Attributes:
        seconds: From start to end of the process.
        cpu_seconds: Time its threads computed, which other programs disturb less.
        steps: Seconds of each step, and of the time before and after them; they add up.
        peak_bytes: Highest resident memory of the process, mapped files included.
        peak_anonymous_bytes: Highest part of it that is no mapped file, to 50 ms.
    """

    seconds: float
    cpu_seconds: float
    steps: Mapping[str, float]
    peak_bytes: int
    peak_anonymous_bytes: int


def measure_export(checkpoint: Path, out: Path, weights_dtype: str) -> Measurement:
    """Export in its own process and watch it.

    Raises:
        RuntimeError: It failed; the sentence it ended with.
    """
    command = ["-m", "ldm_export.cli", "--ckpt", str(checkpoint), "--out", str(out)]
    command += ["--engines", "none"]
    command += ["--weights-dtype", weights_dtype]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stderr is not None, "it is a pipe"
    memory = _AnonymousMemory(process.pid)
    memory.start()
    arrivals = []
    with process.stderr as lines:
        for line in lines:
            arrivals.append((time.monotonic() - started, line.rstrip()))
            print(f"  {line.rstrip()}", file=sys.stderr, flush=True)
    # The caller never loads torch, so what the child inherits of its peak is nothing.
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    memory.join()
    if process.returncode:
        last = arrivals[-1][1] if arrivals else "without a word"
        raise RuntimeError(f"the export ended with {process.returncode}: {last}")
    return Measurement(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        steps=step_seconds(arrivals, seconds),
        peak_bytes=usage.ru_maxrss * 1024,
        peak_anonymous_bytes=memory.peak_bytes,
    )


def step_seconds(arrivals: Sequence[tuple[float, str]], total: float) -> dict[str, float]:
    """Return the seconds of each step from the lines of an export and when they came.

    Args:
        arrivals: Seconds since the start, and the line that came then.
        total: Seconds until the end.
    """
    ends = [(at, match) for at, line in arrivals if (match := _STEP.match(line))]
    if not ends:
        return {"everything": total}
    steps = {match["step"]: float(match["seconds"]) for _, match in ends}
    first_end, first = ends[0]
    before = first_end - float(first["seconds"])
    after = total - before - sum(steps.values())
    return {"start, read, hash": before, **steps, "publish, rest": after}


def run_apart(work: Callable[..., None], what: str, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
    """Call a function in a fresh process, so that this one stays small.

    Args:
        work: The function, importable by name.
        what: Name of the work, for the error.
        arguments: Its arguments …
        options: … and its keyword arguments.

    Raises:
        RuntimeError: It failed; its reason went to stderr.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=work, args=arguments, kwargs=options
    )
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{what} ended with {process.exitcode}")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The last line of a watched script, and the time and memory that it took.

    Attributes:
        value: The JSON of its last line.
        seconds: From start to end of the process.
        peak_bytes: Highest resident memory of the process.
    """

    value: Any
    seconds: float
    peak_bytes: int


def ask(script: Path, *arguments: str) -> Answer:
    """Run a script of ours in its own process, which prints JSON.

    Raises:
        RuntimeError: It failed; the sentence it ended with.
    """
    command = [sys.executable, str(script), *arguments]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=complaints, text=True, env=script_environment()
        )
        assert process.stdout is not None, "it is a pipe"
        with process.stdout as output:
            answer = output.read()
        # The child's peak includes this process's own, which is little against a network's.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        complaints.seek(0)
        lines = complaints.read().strip().splitlines()
    if process.returncode:
        print("\n".join(f"  {line}" for line in lines), file=sys.stderr, flush=True)
        reason = lines[-1] if lines else "without a word"
        raise RuntimeError(f"{script.stem} ended with {process.returncode}: {reason}")
    return Answer(
        value=json.loads(answer.strip().splitlines()[-1]),
        seconds=time.monotonic() - started,
        peak_bytes=usage.ru_maxrss * 1024,
    )


class _AnonymousMemory(threading.Thread):
    """Watches how much memory of a process is not a mapped file."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self.peak_bytes = 0

    def run(self) -> None:
        """Look until the process ends."""
        while True:
            try:
                text = self._status.read_text()
            except OSError:
                return
            match = re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)
            if match is None:  # ended, but not yet waited for
                return
            self.peak_bytes = max(self.peak_bytes, int(match[1]) * 1024)
            time.sleep(_TICK_SECONDS)
