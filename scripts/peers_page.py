"""Write docs/performance.md and its chart from one measured run: `python -m scripts.peers_page`.

The rows are those that `benchmarks/latency.py --peers` wrote. Only rows of one run are compared:
the last one at full size, or the one that `--run` names.
"""

import argparse
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from measuring.rows import read_records
from peers.race import LONG_SECONDS, Row
from peers.report import PRECISIONS, Summary, latest_run, summaries, table, versions
from peers.weights import MODEL

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/performance.md"
CHART = ROOT / "docs/peers.svg"
ROWS = ROOT / "benchmarks/results/peers.jsonl"

_INTRODUCTION = """\
# Time and memory next to other programs

<!-- Written by `python -m scripts.peers_page`; change that script, not this page. -->

![seconds per image and peak memory of every program](peers.svg)

"""
_LEGEND = """
* **Weights**: the same random ones for everyone, of Stable Diffusion 1.5's networks and stored in
  fp16, each in the form that the program's own tool makes of them: `benchmarks/peers/weights.py`.
* **Open**: import and load in a new process. **First image**: with what is compiled then.
  **Next image**: the same once more in the same process.{spread}
  Before the run each program ran once, so that what it keeps on disk is there.
* **UNet, a step**: both halves of guidance, in one call or two; the median of all steps.
* **Peak memory**: the highest resident memory of the process, of all repetitions.
* **Image**: the lowest PSNR to the reference's image, from the same noise: everyone computes the
  same. Weights are random, so that it says nothing of what a precision costs a trained model.
* **Against ours**: the next image's time over that of this package's fastest in the same precision.
  Times in different precisions are not times of the same work.
* Every repetition is a process of its own, and the programs take turns. A process of more than
  {minutes} minutes is not repeated.
"""
_SPREAD = "\n  In brackets, how far the slowest repetition is above the median."

_WIDTH, _LEFT, _BAR, _GAP, _HEAD = 860, 230, 18, 6, 34  # pixels
_PANEL, _SPACE, _VALUE = 250, 60, 52
_OURS, _PEER, _INK = "#2f6fb3", "#b9c4cf", "#333333"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and the chart."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", help="the run to show (default: the last one at full size)")
    args = parser.parse_args(argv)
    if not ROWS.is_file():
        sys.stderr.write(f"no {ROWS.name}, so no page: nothing was measured yet\n")
        return 0
    rows = rows_of_run(read_records(ROWS), args.run)
    PAGE.write_text(page(rows), encoding="utf-8")
    CHART.write_text(chart(rows), encoding="utf-8")
    return 0


def rows_of_run(rows: Sequence[Row], run: str | None = None) -> list[Row]:
    """Return the rows of a run; None is the last one at full size.

    Raises:
        SystemExit: There is no such run.
    """
    full = [row for row in rows if row["settings"]["model"] == MODEL]
    chosen = latest_run(full) if run is None else [row for row in rows if row["run"] == run]
    if not chosen:
        raise SystemExit(f"no rows of {run or 'a run at full size'} in {ROWS.name}")
    return chosen


def page(rows: Sequence[Row]) -> str:
    """Return the page about one run."""
    rounds = max(row["repetition"] for row in rows)
    legend = _LEGEND.format(spread="" if rounds == 1 else _SPREAD, minutes=LONG_SECONDS // 60)
    return _INTRODUCTION + _setting(rows, rounds) + "\n\n" + "\n".join(table(rows)) + legend


def _setting(rows: Sequence[Row], rounds: int) -> str:
    settings = rows[0]["settings"]
    return "\n".join(
        [
            f"One image of {settings['width']}×{settings['height']} pixels in {settings['steps']} "
            f"steps of Euler's method, guidance {settings['guidance_scale']:g}, "
            f"{settings['threads']} threads, {rounds} repetition{'' if rounds == 1 else 's'}. "
            f"{rows[0]['machine']}, {rows[0]['date'][:10]}.",
            f"Run `{rows[0]['run']}` of `benchmarks/results/{ROWS.name}`, measured by "
            f"`python benchmarks/latency.py --peers --repetitions {rounds}` with:",
            f"{versions(rows)}.",
        ]
    )


def chart(rows: Sequence[Row]) -> str:
    """Return the chart about one run as SVG: bars of time and memory, by precision."""
    found = summaries(rows)
    slowest = max(each.seconds["next_image"] for each in found)
    largest = max(each.peak_bytes for each in found)
    columns = (_LEFT, _LEFT + _PANEL + _SPACE)
    parts = [
        _text(columns[0], 20, "next image, seconds", bold=True),
        _text(columns[1], 20, "peak memory, GB", bold=True),
    ]
    top = _HEAD
    for precision in PRECISIONS:
        of_precision = [each for each in found if each.precision == precision]
        if of_precision:
            parts.append(_text(12, top + 13, precision, bold=True))
            top += _BAR + _GAP
        for each in of_precision:
            seconds = each.seconds["next_image"]
            parts.append(_text(12, top + 13, each.entrant, bold=each.is_ours))
            parts += _bar(columns[0], top, seconds / slowest, f"{seconds:.1f}", each)
            size = each.peak_bytes
            parts += _bar(columns[1], top, size / largest, f"{size / 1e9:.1f}", each)
            top += _BAR + _GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top + _GAP}" '
            f'width="{_WIDTH}" height="{top + _GAP}" font-family="system-ui, sans-serif">',
            f'<rect width="{_WIDTH}" height="{top + _GAP}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _text(left: float, base: int, text: str, *, bold: bool = False) -> str:
    style = f'font-size="13" fill="{_INK}"' + (' font-weight="600"' if bold else "")
    return f'<text x="{left:g}" y="{base}" {style}>{escape(text)}</text>'


def _bar(left: int, top: int, share: float, label: str, summary: Summary) -> list[str]:
    width = max(1, round(share * (_PANEL - _VALUE)))
    colour = _OURS if summary.is_ours else _PEER
    return [
        f'<rect x="{left}" y="{top}" width="{width}" height="{_BAR}" rx="2" fill="{colour}"/>',
        _text(left + width + 6, top + 13, label),
    ]


if __name__ == "__main__":
    sys.exit(main())
