r"""Measure the bundle of a model: generate images for held-out scenes and score them.

    ldm-export --ckpt models/shapes/inpainting.ckpt --config models/shapes/inpainting.yaml \\
        --out out/inpainting
    python models/shapes/evaluate_tasks.py --model inpainting --bundle out/inpainting
    python models/shapes/evaluate_tasks.py --report

Prints a table against the goals and appends a row to `benchmarks/results/shapes_tasks.jsonl`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm_runtime import Generator
from ldm_runtime.errors import LdmError
from models.shapes.catalog.models import MODELS

_IMAGES = 200


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="which model the bundle is of")
    parser.add_argument("--bundle", type=Path, default=Path("engines"))
    parser.add_argument("--images", type=int, default=_IMAGES, help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="default: the bundle's")
    parser.add_argument(
        "--short-captions",
        action="store_true",
        help='such as "a red circle", of models of captions',
    )
    parser.add_argument("--threads", type=int, help="threads that compute (default: all cores)")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results of this checkout")
    parser.add_argument("--sheet", type=Path, help="PNG to write the first images to")
    parser.add_argument("--report", action="store_true", help="print the latest results")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a bundle or print the results: 0 on success, 1 for an error, 2 for wrong usage."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.report and args.model is None:
        parser.error("give --model and --bundle, or --report")
    if args.short_captions and (args.model is None or MODELS[args.model].task != "text-to-image"):
        parser.error(f"--short-captions is for models of captions, not for {args.model}")
    if args.images < 2:
        parser.error(f"--images must be at least 2, got {args.images}")
    try:
        _report(args) if args.report else _evaluate(args)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _report(args: argparse.Namespace) -> None:
    from models.shapes.evaluation import tasks

    latest = {row.name: row for row in tasks.read_rows(args.results or tasks.RESULTS)}
    print("\n".join(map(tasks.table, latest.values())))


def _evaluate(args: argparse.Namespace) -> None:
    from models.shapes.data import scenes
    from models.shapes.evaluation import tasks

    wording = scenes.SHORT if args.short_captions else scenes.FULL
    with Generator(args.bundle, threads=args.threads) as generator:
        row, images = tasks.evaluate(
            generator, MODELS[args.model], args.images, args.steps, wording
        )
    tasks.append_row(args.results or tasks.RESULTS, row)
    print(tasks.table(row))
    if args.sheet is not None:
        Image.fromarray(tasks.sheet(images[:32])).save(args.sheet)


if __name__ == "__main__":
    sys.exit(main())
