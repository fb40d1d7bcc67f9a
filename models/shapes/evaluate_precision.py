r"""Measure what lower precision costs a model and saves: the same prompts and noise in each.

    ldm-export models/shapes/shapes.ckpt out/int8 --quantize int8
    python models/shapes/evaluate_precision.py --model shapes --bundle out/int8
    python models/shapes/evaluate_precision.py --report

The precisions take turns at every prompt, fp32 first. Every 20 prompts become a row per precision
in `benchmarks/results/precision.jsonl`; a run that was stopped goes on with `--first`. `--report`
prints the table of docs/trained-models.md from all rows of the latest bundle of each model.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ldm_runtime import Generator
from ldm_runtime.errors import LdmError
from measuring.rows import ROOT
from models.shapes.evaluation import paired, tasks
from models.shapes.evaluation.tasks import TaskRow

RESULTS = ROOT / "benchmarks/results/precision.jsonl"
EXACT = "fp32"
_PROMPTS = 100


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", choices=paired.PAIRED_MODELS, help="which model the bundle is of"
    )
    parser.add_argument("--bundle", type=Path, default=Path("engines"))
    parser.add_argument(
        "--precisions", nargs="+", default=("bf16", "int8"), help="default: bf16 int8"
    )
    parser.add_argument("--images", type=int, default=_PROMPTS, help="default: %(default)s")
    parser.add_argument("--first", type=int, default=0, help="prompts to leave out before them")
    parser.add_argument("--backend", default="openvino", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="threads that compute (default: all cores)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--report", action="store_true", help="print the latest results")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or print the results: 0 on success, 1 for an error, 2 for wrong usage."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.report and args.model is None:
        parser.error("give --model and --bundle, or --report")
    if args.images < 1 or args.first < 0:
        parser.error(f"--images from 1 on and --first from 0, got {args.images}, {args.first}")
    try:
        if not args.report:
            _measure(args)
        print(report([*tasks.read_rows(args.results)]))
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _measure(args: argparse.Namespace) -> None:
    with ExitStack() as opened:
        ways = []
        for precision in (EXACT, *args.precisions):
            options = {"precision": precision, "backend": args.backend, "threads": args.threads}
            generator = opened.enter_context(Generator(args.bundle, **options))
            settings = {"precision": precision}
            ways.append(paired.Way(generator=generator, fields={}, settings=settings))
        model = paired.PAIRED_MODELS[args.model]
        for row in paired.measure(model, ways, args.first, args.images):
            tasks.append_row(args.results, row)


def report(rows: Sequence[TaskRow]) -> str:
    """Return a table in Markdown: a line per model and precision.

    Speed is the mean time of an image in fp32 over that in the precision, of the same prompts.
    """
    groups: dict[tuple[str, str, str], dict[object, TaskRow]] = {}
    latest = {(row.name, row.backend): row.bundle_sha256 for row in rows}
    for row in rows:
        if row.bundle_sha256 == latest[row.name, row.backend]:
            kind = row.name, row.backend, str(row.settings["precision"])
            groups.setdefault(kind, {})[row.settings["first"]] = row
    lines = [
        "| model | backend | precision | prompts | whole images | PSNR | per image | faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, backend, precision), pieces in groups.items():
        figures = paired.cells(pieces, groups[name, backend, EXACT])
        lines.append(f"| {' | '.join((f'`{name}`', backend, precision, *figures))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
