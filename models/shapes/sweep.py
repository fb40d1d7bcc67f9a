"""Quality against speed: every sampler at several numbers of steps, on the same captions and noise.

    python models/shapes/evaluate.py --sweep --bundle engines/     # measures the missing cells
    python models/shapes/evaluate.py --report                      # writes docs/quality.*

Each sampler with a number of steps is a cell: one line of JSON, appended when it is done. A sweep
that was stopped goes on where it was; after a change to a sampler, start with another `--results`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm_runtime import Generator
from ldm_runtime.errors import LdmError
from measuring.rows import ROOT
from models.shapes.evaluation.cells import Cell, append_cell, read_cells
from models.shapes.evaluation.sweep_runs import (
    MOST_CALLS,
    STEPS,
    count_calls,
    plan,
    run_sweep,
    settings_of,
)

RESULTS = ROOT / "benchmarks/results/shapes_sweep.jsonl"
CAPTIONS = 64
_STOPPED = 130  # what a shell reports of a program that Ctrl-C ended


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `evaluate.py --sweep` and `evaluate.py --report`."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py --sweep",
        description="Measure samplers at several numbers of steps; Ctrl-C stops, the same "
        "command goes on.",
    )
    parser.add_argument("--sweep", action="store_true", help="measure the cells not yet there")
    parser.add_argument("--report", action="store_true", help="write quality.md and quality.png")
    parser.add_argument("--bundle", type=Path, default=Path("engines"))
    parser.add_argument(
        "--captions",
        type=_two_or_more,
        default=CAPTIONS,
        metavar="N",
        help="images per cell (default: %(default)s)",
    )
    parser.add_argument(
        "--samplers",
        nargs="+",
        default=(),
        metavar="NAME",
        help="only these (default: all there are)",
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        type=int,
        default=(),
        metavar="N",
        help=f"only these (default: {', '.join(map(str, STEPS))}; of those, up "
        f"to {MOST_CALLS} denoiser calls)",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument(
        "--docs",
        type=Path,
        default=ROOT / "docs",
        help="folder of the report (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Sweep, report, or both: 0 on success, 1 for an error, 130 if stopped by Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        if args.sweep:
            _sweep(args)
        if args.report:
            from models.shapes.evaluation import quality_report

            print(quality_report.write_report(args.results, args.docs))
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; {args.results} keeps the cells that are done", file=sys.stderr)
        return _STOPPED
    return 0


def _sweep(args: argparse.Namespace) -> None:
    with Generator(args.bundle) as generator:
        done = [(each.bundle_sha256, each.settings) for each in read_cells(args.results)]
        grid = plan(generator.spec, args.samplers, args.steps)
        todo = [
            request
            for request in grid
            if (generator.bundle_sha256, settings_of(request, args.captions)) not in done
        ]
        print(f"{len(grid) - len(todo)} of {len(grid)} cells are there", file=sys.stderr)
        left = sum(count_calls(request) for request in todo)
        for cell in run_sweep(generator, todo, args.captions):
            append_cell(args.results, cell)
            left -= cell.calls
            print(progress(cell, left), file=sys.stderr, flush=True)


def progress(cell: Cell, calls_left: int) -> str:
    """Return a line on a cell, and how long the rest takes if a call takes as long as there."""
    shares = cell.counts.shares()
    minutes = sum(cell.seconds) / cell.calls * calls_left / 60
    return (
        f"{cell.sampler}, {cell.steps} steps, {cell.calls} calls: "
        f"objects {shares['objects']:.0%}, whole images {shares['whole_images']:.0%}, "
        f"distance {cell.distance:.3f}, {cell.median_seconds:.2f} s per image; "
        f"about {minutes:.0f} min left"
    )


def _two_or_more(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number from 2, got {text!r}")
    return int(text)
