"""The report of a measurement: what was measured, a table per backend, and a line of JSON."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ldm_runtime.benchmark.ceilings import Ceilings
from ldm_runtime.benchmark.rows import Row, machine
from ldm_runtime.benchmark.runs import shares
from ldm_runtime.benchmark.subject import Subject

_COLUMNS = f"{'':<32}{'first call':>28}{'steady state':>28}{'of matmul':>12}{'of copy':>9}"


def record(rows: Sequence[Row], subject: Subject, ceilings: Ceilings) -> dict[str, Any]:
    """Return the line of JSON as a mapping."""
    return {
        "benchmark": "latency",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": rows[0].commit,
        "machine": machine(),
        "ceilings": vars(ceilings),
        "work": {name: vars(work) for name, work in subject.work.items()},
        "rows": [row.as_dict() for row in rows],
    }


def heading(subject: Subject, ceilings: Ceilings, reasons: Sequence[str]) -> list[str]:
    """Return the lines above the table: the machine, its ceilings and what is measured."""
    request, manifest = subject.request, subject.manifest
    lines = [
        f"machine   {machine()}",
        f"ceilings  {ceilings}",
        f"bundle    {subject.bundle} ({manifest.spec.family}, weights {manifest.weights_dtype})",
        f"request   {request.num_images} x {request.width}x{request.height} pixels"
        + (_sampling(subject) if request.passes else ", nothing is sampled"),
    ]
    lines += [
        f"{name:<12}{work.flops / 1e9:>10.3f} GFLOP per call, {work.parameters / 1e6:.2f} M weights"
        for name, work in subject.work.items()
    ]
    return lines + [f"skipped   {reason}" for reason in reasons]


def _sampling(subject: Subject) -> str:
    request = subject.request
    return (
        f", {request.num_inference_steps} steps of {request.sampler}, guidance "
        f"{request.guidance_scale:g}: UNet batch {subject.rows}"
    )


def table(rows: Sequence[Row], subject: Subject, ceilings: Ceilings) -> list[str]:
    """Return the lines of one backend's table."""
    steady = {row.name: row for row in rows if row.settings["state"] == "steady"}
    first = {row.name: row for row in rows if row.settings["state"] == "first"}
    lines = ["", rows[0].device, _COLUMNS]
    for name, label in _labels(steady).items():
        again = steady.get(name)
        line = f"  {label:<30}{_cell(first.get(name)):>28}{_cell(again):>28}"
        if again and name in subject.work:
            of_matmul, of_copy = map(_share, shares(subject.work[name], again, ceilings))
            line = f"{line}{of_matmul:>12}{of_copy:>9}".rstrip()
        lines.append(line)
    peak = max(row.peak_bytes or 0 for row in rows)
    return [*lines, f"  {summed(steady)}", f"  peak resident memory {peak / 1e6:.0f} MB"]


def summed(steady: dict[str, Row]) -> str:
    """Return how the image of median time is made up; the parts add up exactly."""
    order = sorted(range(len(steady["image"].seconds)), key=steady["image"].seconds.__getitem__)
    chosen = order[len(order) // 2]
    parts = []
    for name, row in steady.items():
        if name not in ("image", "load", "rest"):
            calls = int(row.settings["calls"])
            times = f"{calls} calls of {name}" if calls > 1 else name
            parts.append(f"{times} {_milliseconds(calls * row.seconds[chosen])}")
    parts.append(f"sampler, tokenizer and Python {_milliseconds(steady['rest'].seconds[chosen])}")
    return f"{_milliseconds(steady['image'].seconds[chosen])} = {' + '.join(parts)}"


def _labels(steady: dict[str, Row]) -> dict[str, str]:
    networks = {
        name: f"one {name} call" for name in steady if name not in ("image", "load", "rest")
    }
    return {
        "import": "import",
        "load": "load (first: hashes checked)",
        **networks,
        "rest": "sampler, tokenizer and Python",
        "image": "whole image",
        "cold_start": "import + load + first image",
    }


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    low, high = (_number(1e3 * edge(row.seconds)) for edge in (min, max))
    mark = " " if row.is_stable else "!"
    return f"{_milliseconds(row.median_seconds)} ({low}-{high}){mark}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _milliseconds(seconds: float) -> str:
    return f"{_number(1e3 * seconds)} ms"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
