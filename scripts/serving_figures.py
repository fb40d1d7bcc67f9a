"""Write docs/serving-figures.md from measured rows: `python -m scripts.serving_figures`.

The rows are those that `benchmarks/arrivals.py` and `benchmarks/soak.py` wrote: of the first those
of the last commit that was measured, of the second the last row of every length.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring.rows import read_records

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/serving-figures.md"
ARRIVALS, SOAK = (ROOT / f"benchmarks/results/{name}.jsonl" for name in ("arrivals", "soak"))

_INTRODUCTION = """\
# How a server does under load

<!-- Written by `python -m scripts.serving_figures`; change that script, not this page. -->

What [serving](serving.md) promises, measured.
"""
_ARRIVALS = """
## Requests that arrive at a rate

Requests come as a Poisson process and differ in seed, steps and sampler. Two servers of one bundle
take turns at the same requests: one whose requests share calls of the UNet, and one that generates
one image after the other. Times are from a request's arrival to its image, waiting included; where
more arrive than can be generated, they are as long as the queue.
"""
_SOAK = """
## With faults

Clients ask without pause while workers are killed and stopped, the disk is full, others go away,
read slowly, and send what is malformed, wrong or too large. Every image is compared with the hash
of its request, which one generator made before without a server. **Lost** are requests without an
answer, or with one that is not due; **wrong** are other images; **twice** are images that were made
and not asked for. The growth is that of the server's memory after its first third.
"""

Row = Mapping[str, Any]


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


def page() -> str:
    """Return the page about the rows in the repository."""
    return _INTRODUCTION + _arrivals_part(read_records(ARRIVALS)) + _soak_part(read_records(SOAK))


def _arrivals_part(rows: Sequence[Row]) -> str:
    last = rows[-1]
    shown = {(row["rate"], row["way"]): row for row in rows if _measured(row) == _measured(last)}
    settings = last["settings"]
    head = (
        f"\nThe {settings['model']} model, {settings['mean_steps']} steps on average, "
        f"{settings['requests']} requests a rate, {settings['threads']} threads, at most "
        f"{settings['max_batch']} images a call. {_where(last)}, by `python benchmarks/arrivals.py "
        f"--rates {','.join(f'{rate:g}' for rate in sorted({rate for rate, _ in shown}))} "
        f"--requests {settings['requests']}`.\n\n"
    )
    lines = [
        "| arrivals a second | | images a second | median, s | 95th percentile, s |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {rate:g} | {way} | {row['images_per_second']:.2f} | {row['p50_seconds']:.2f} "
        f"| {row['p95_seconds']:.2f} |"
        for (rate, way), row in sorted(shown.items(), key=_by_rate)
    ]
    return _ARRIVALS + head + "\n".join(lines) + "\n"


def _measured(row: Row) -> tuple[str, Any]:
    """Return what was measured: a commit, whose rows may be uncommitted, with settings."""
    return row["commit"].rstrip("+"), row["settings"]


def _by_rate(item: tuple[tuple[float, str], Row]) -> tuple[float, bool]:
    (rate, way), _ = item
    return rate, way == "batched"


def _soak_part(rows: Sequence[Row]) -> str:
    last = {row["settings"]["seconds"]: row for row in rows}
    lines = [
        "| minutes | clients | requests | faults | lost | wrong | twice | 95th percentile, s "
        "| growth, MB per 1,000 requests |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_soak_line(row) for _, row in sorted(last.items())),
    ]
    return _SOAK + "\n" + "\n".join(lines) + "\n" + _faults(last[max(last)])


def _soak_line(row: Row) -> str:
    settings = row["settings"]
    growth = row["memory_mb_per_1000_requests"]
    return (
        f"| {settings['seconds'] / 60:g} | {settings['clients']} | {row['requests']:,} "
        f"| {row['num_faults']:,} | {row['lost']} | {row['wrong']} | {row['duplicate']} "
        f"| {row['p95_seconds']:.2f} | {'' if growth is None else f'{growth:.2f}'} |"
    )


def _faults(row: Row) -> str:
    counts = sorted(row["faults"].items(), key=lambda item: -item[1])
    listed = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts)
    seconds = row["settings"]["seconds"]
    return (
        f"\nFaults of the longest run: {listed}; {row['worker_restarts']:,.0f} workers were "
        f"replaced. {_where(row)}, by `python benchmarks/soak.py --seconds {seconds:g}`.\n"
    )


def _where(row: Row) -> str:
    return f"{row['machine']}, {row['date'][:10]}"


if __name__ == "__main__":
    sys.exit(main())
