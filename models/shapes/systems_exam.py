r"""Measure the bundle of a system: draw what held-out scenes ask for, judge the pictures, count.

    ldm-export --ckpt models/shapes/inpainting.ckpt --config models/shapes/inpainting.yaml \\
        --out out/inpainting
    python models/shapes/systems_exam.py --system inpainting --bundle out/inpainting
    python models/shapes/systems_exam.py --report

Prints a table against the goals and appends a row to `benchmarks/results/shapes_systems.jsonl`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm_runtime import Generator
from ldm_runtime.errors import LdmError
from models.shapes.catalog.systems import SYSTEMS

_PICTURES, _STEPS = 200, 50


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--system", choices=SYSTEMS, help="which system the bundle is of")
    parser.add_argument("--bundle", type=Path, default=Path("engines"))
    parser.add_argument("--pictures", type=int, default=_PICTURES, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=_STEPS, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="threads that compute (default: all cores)")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results of this checkout")
    parser.add_argument("--sheet", type=Path, help="PNG to write the first pictures to")
    parser.add_argument("--report", action="store_true", help="print what was measured last")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Examine a bundle or print the results: 0 on success, 1 for an error, 2 for wrong usage."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.report and args.system is None:
        parser.error("give --system and --bundle, or --report")
    if args.pictures < 2:
        parser.error(f"--pictures must be at least 2, got {args.pictures}")
    try:
        _report(args) if args.report else _examine(args)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _report(args: argparse.Namespace) -> None:
    from models.shapes.evaluation import systems as exam

    latest = {row.name: row for row in exam.read_rows(args.results or exam.RESULTS)}
    print("\n".join(map(exam.table, latest.values())))


def _examine(args: argparse.Namespace) -> None:
    from models.shapes.evaluation import systems as exam

    with Generator(args.bundle, threads=args.threads) as generator:
        row, pictures = exam.examine(generator, SYSTEMS[args.system], args.pictures, args.steps)
    exam.append_row(args.results or exam.RESULTS, row)
    print(exam.table(row))
    if args.sheet is not None:
        Image.fromarray(exam.sheet(pictures[:32])).save(args.sheet)


if __name__ == "__main__":
    sys.exit(main())
