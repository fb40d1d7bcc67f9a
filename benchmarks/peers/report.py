"""The rows of one run as a table: medians, each precision by itself."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peers.entrants import OURS
from peers.race import Row

_HEAD = (
    *("program", "open", "first image", "next image", "UNet, a step", "peak memory"),
    *("image", "next image against ours"),
)
#: Precisions in the order of the table, and what is computed in them.
PRECISIONS = {
    "fp32": "fp32",
    "bf16": "bf16, in which networks compute; inputs and outputs are fp32",
    "fp16": "fp16 weights of convolutions, sums in fp32",
}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """An entrant in one precision: the medians of its processes.

    Attributes:
        entrant: Its name.
        precision: Its precision.
        seconds: By "open", "first_image", "next_image" and "unet" (a step, both halves).
        spread: Slowest of the next images over the median, less 1.
        peak_bytes: The highest.
        psnr_db: The lowest to the reference; None is the same bytes.
        versions: Of its packages.
    """

    entrant: str
    precision: str
    seconds: dict[str, float]
    spread: float
    peak_bytes: int
    psnr_db: float | None
    versions: dict[str, str]

    @property
    def is_ours(self) -> bool:
        """Whether it is this package."""
        return self.entrant.startswith(OURS)


def latest_run(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the run that was begun last."""
    last = max((row["run"] for row in rows), default=None)
    return [row for row in rows if row["run"] == last]


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """Return the summaries of a run, the fastest first in each precision.

    Raises:
        ValueError: The rows are of several runs, whose times do not compare.
    """
    if len(runs := {row["run"] for row in rows}) > 1:
        raise ValueError(f"rows of several runs do not compare: {', '.join(sorted(runs))}")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["failure"] is None:
            groups.setdefault((row["entrant"], row["precision"]), []).append(row)
    order = list(PRECISIONS)
    return sorted(
        (_summary(entrant, precision, group) for (entrant, precision), group in groups.items()),
        key=lambda each: (order.index(each.precision), each.seconds["next_image"]),
    )


def failures(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for everything that was to be measured and was not."""
    return [
        f"{row['entrant']} {row['precision']}: {row['failure']}" for row in rows if row["failure"]
    ]


def table(rows: Sequence[Row]) -> list[str]:
    """Return a run in Markdown, one table per precision; see `summaries`."""
    found = summaries(rows)
    lines: list[str] = []
    for precision, meaning in PRECISIONS.items():
        of_precision = [each for each in found if each.precision == precision]
        if of_precision:
            lines += [f"**{meaning}**", "", f"| {' | '.join(_HEAD)} |"]
            lines += ["| --- |" + " ---: |" * (len(_HEAD) - 1)]
            ours = [each.seconds["next_image"] for each in of_precision if each.is_ours]
            best = min(ours, default=None)
            lines += [f"| {' | '.join(_cells(each, best))} |" for each in of_precision]
            lines.append("")
    return lines + [f"* Not measured: {sentence}" for sentence in failures(rows)]


def versions(rows: Sequence[Row]) -> str:
    """Return the versions of all packages of a run in one line."""
    known: dict[str, set[str]] = {}
    for each in summaries(rows):
        for package, version in each.versions.items():
            known.setdefault(package, set()).add(version)
    return ", ".join(f"{name} {' and '.join(sorted(known[name]))}" for name in sorted(known))


def _summary(entrant: str, precision: str, rows: Sequence[Row]) -> Summary:
    names = {name: f"{name}_seconds" for name in ("open", "first_image", "next_image")}
    following = [row["next_image_seconds"] for row in rows]
    likeness = [row["psnr_db"] for row in rows if row["psnr_db"] is not None]
    return Summary(
        entrant=entrant,
        precision=precision,
        seconds={
            **{name: _median(rows, key) for name, key in names.items()},
            "unet": statistics.median(each for row in rows for each in row["unet_seconds"]),
        },
        spread=max(following) / statistics.median(following) - 1,
        peak_bytes=max(row["peak_bytes"] for row in rows),
        psnr_db=min(likeness, default=None),
        versions=rows[0]["versions"],
    )


def _median(rows: Sequence[Row], key: str) -> float:
    values: list[Any] = [row[key] for row in rows]
    return float(statistics.median(values))


def _cells(summary: Summary, best: float | None) -> list[str]:
    seconds, following = summary.seconds, summary.seconds["next_image"]
    return [
        f"**{summary.entrant}**" if summary.is_ours else summary.entrant,
        f"{seconds['open']:.1f} s",
        f"{seconds['first_image']:.1f} s",
        f"{following:.1f} s" + (f" (+{summary.spread:.0%})" if summary.spread >= 0.005 else ""),
        f"{seconds['unet']:.2f} s",
        f"{summary.peak_bytes / 1e9:.2f} GB",
        "reference" if summary.psnr_db is None else f"{summary.psnr_db:.0f} dB",
        "–" if best is None else f"{following / best:.2f}×",
    ]
