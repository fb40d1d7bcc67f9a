"""Measure what an image costs on this machine, part by part, on every backend that can run here.

    python benchmarks/latency.py

Without arguments: the shapes model, exported on first use. Prints the machine's own limits, a table
and one line of JSON; `--json` prints that line alone, so that

    python benchmarks/latency.py --json >> benchmarks/results/latency.jsonl

keeps a result. Every repetition is its own process, which generates twice; backends take turns.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring.rows import ROOT, Row, as_line, commit, machine

if TYPE_CHECKING:
    from measuring.ceilings import Ceilings
    from measuring.runs import Subject

_REPETITIONS = 10
_COLUMNS = f"{'':<32}{'first call':>28}{'steady state':>28}{'of matmul':>12}{'of copy':>9}"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="folder made by ldm-export (default: shapes)")
    parser.add_argument("--steps", type=_positive, help="sampler steps (default: the bundle's)")
    parser.add_argument("--size", type=_size, help="pixels, as 64 or 64x96 (height x width)")
    parser.add_argument("--batch", type=_positive, default=1, help="images in one call")
    parser.add_argument(
        "--backend", action="append", help="only this one; may be repeated (default: all)"
    )
    parser.add_argument(
        "--repetitions", type=_positive, default=_REPETITIONS, help="default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 on success, 1 for an error the user can act on, 2 for bad usage."""
    args = build_parser().parse_args(argv)
    try:
        from ldm_runtime import LdmError
    except ModuleNotFoundError as error:
        print(
            f"error: the package {error.name!r} is not installed; "
            f"run `pip install -e '.[export,cpu]'` in {ROOT}",
            file=sys.stderr,
        )
        return 1
    try:
        _run(args)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    from measuring.ceilings import measure_apart
    from measuring.runs import as_rows, find, open_subject, runnable_backends

    started = time.monotonic()
    height, width = args.size or (None, None)
    fields = {"height": height, "width": width, "num_inference_steps": args.steps}
    subject = open_subject(args.bundle, fields | {"num_images": args.batch})
    backends, reasons = runnable_backends(args.backend or [], subject)
    ceilings = measure_apart()
    if not args.json:
        print("\n".join(heading(subject, ceilings, reasons)), flush=True)
    found = []
    for one in find(subject, backends, args.repetitions):
        found.append(one)
        _show_progress(len(found), len(backends) * args.repetitions)
    rows = as_rows(subject, found)
    if not args.json:
        for backend in backends:
            print("\n".join(table([r for r in rows if r.backend == backend], subject, ceilings)))
        print("\n! slowest repetition more than 10 % above the median: something else was running")
        print(f"measured in {time.monotonic() - started:.0f} s\n")
    print(as_line(record(rows, subject, ceilings)))


def record(rows: Sequence[Row], subject: "Subject", ceilings: "Ceilings") -> dict[str, Any]:
    """Return the JSON line as a mapping."""
    return {
        "benchmark": "latency",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "ceilings": vars(ceilings),
        "work": {name: vars(work) for name, work in subject.work.items()},
        "rows": [row.as_dict() for row in rows],
    }


def heading(subject: "Subject", ceilings: "Ceilings", reasons: Sequence[str]) -> list[str]:
    """Return the lines above the table: the machine, its ceilings and what is measured."""
    request, manifest = subject.request, subject.manifest
    lines = [
        f"machine   {machine()}",
        f"ceilings  {ceilings}",
        f"bundle    {subject.bundle} ({manifest.spec.family}, weights {manifest.weights_dtype})",
        f"request   {request.num_images} x {request.height}x{request.width} pixels, "
        f"{request.num_inference_steps} steps of {request.sampler}, guidance "
        f"{request.guidance_scale:g}: UNet batch {subject.rows}",
    ]
    lines += [
        f"{name:<12}{work.flops / 1e9:>10.3f} GFLOP a call, {work.parameters / 1e6:.2f} M weights"
        for name, work in subject.work.items()
    ]
    return lines + [f"skipped   {reason}" for reason in reasons]


def table(rows: Sequence[Row], subject: "Subject", ceilings: "Ceilings") -> list[str]:
    """Return the lines of one backend's table."""
    from measuring.runs import shares

    steady = {row.name: row for row in rows if row.settings["state"] == "steady"}
    first = {row.name: row for row in rows if row.settings["state"] == "first"}
    lines = ["", rows[0].device, _COLUMNS]
    for name, label in _labels(steady).items():
        again = steady.get(name)
        line = f"  {label:<30}{_cell(first.get(name)):>28}{_cell(again):>28}"
        if again and name in subject.work:
            of_matmul, of_copy = shares(subject.work[name], again.median_seconds, ceilings)
            line += f"{of_matmul:>12.0%}{of_copy:>9.0%}"
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


def _milliseconds(seconds: float) -> str:
    return f"{_number(1e3 * seconds)} ms"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\r\x1b[K" if done == total else ""
        print(f"\r\x1b[Kprocess {done} of {total}{end}", end="", file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, is {number}")
    return number


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return _positive(height), _positive(width or height)


if __name__ == "__main__":
    sys.exit(main())
