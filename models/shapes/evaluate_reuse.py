r"""Measure what feature reuse costs a model and saves: the same prompts and noise, rule by rule.

    ldm-export models/shapes/shapes.ckpt out/reuse --reuse
    python models/shapes/evaluate_reuse.py --model shapes --bundle out/reuse --rules deep:2 deep:3
    python models/shapes/evaluate_reuse.py --report

The rules take turns at every prompt, after the image without one. Every 20 prompts become a row per
rule in `benchmarks/results/feature_reuse.jsonl`; a run that was stopped goes on with `--first`.
`--report` prints the table of docs/steering.md from all rows of the latest bundle of each model.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldm_runtime import Generator
from ldm_runtime.errors import LdmError
from measuring.rows import ROOT
from models.shapes.catalog.models import TrainedModel
from models.shapes.evaluation import paired, tasks
from models.shapes.evaluation.tasks import TaskRow

RESULTS = ROOT / "benchmarks/results/feature_reuse.jsonl"
RULES = ("deep:2", "deep:3", "deep:5")
NONE = "none"
_PROMPTS = 100


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", choices=paired.PAIRED_MODELS, help="which model the bundle is of"
    )
    parser.add_argument("--bundle", type=Path, default=Path("engines"))
    parser.add_argument("--rules", nargs="+", default=RULES, help="default: deep:2 deep:3 deep:5")
    parser.add_argument("--images", type=int, default=_PROMPTS, help="default: %(default)s")
    parser.add_argument("--first", type=int, default=0, help="prompts to leave out before them")
    parser.add_argument("--steps", type=int, help="default: the bundle's")
    parser.add_argument("--backend", default="onnxruntime", help="default: %(default)s")
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
            with Generator(args.bundle, backend=args.backend, threads=args.threads) as generator:
                for row in measure(generator, paired.PAIRED_MODELS[args.model], args):
                    tasks.append_row(args.results, row)
        print(report([*tasks.read_rows(args.results)]))
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(
    generator: Generator, model: TrainedModel, args: argparse.Namespace
) -> Iterator[TaskRow]:
    """Generate and score the images of every rule, and of none; yield a row of each per piece.

    Raises:
        LdmError: The bundle was exported without --reuse, or a rule is none.
    """
    unet = generator.spec.unet
    assert unet is not None, "every model here has a UNet"
    steps = {} if args.steps is None else {"num_inference_steps": args.steps}
    ways = [
        paired.Way(
            generator=generator,
            fields=steps if rule == NONE else {**steps, "reuse": rule},
            settings={"reuse": rule, "shallow_blocks": unet.shallow_blocks or 0},
        )
        for rule in (NONE, *args.rules)
    ]
    return paired.measure(model, ways, args.first, args.images)


def report(rows: Sequence[TaskRow]) -> str:
    """Return a table in Markdown: a line per model, number of blocks and rule.

    Speed is the mean time of an image without reuse over that with the rule, of the same prompts.
    """
    groups: dict[tuple[object, ...], dict[object, TaskRow]] = {}
    latest = {(row.name, row.settings["shallow_blocks"]): row.bundle_sha256 for row in rows}
    for row in rows:
        kind = row.name, row.settings["shallow_blocks"]
        if row.bundle_sha256 == latest[kind]:
            piece = row.settings["num_inference_steps"], row.settings["first"]
            groups.setdefault((*kind, row.settings["reuse"]), {})[piece] = row
    lines = [
        "| model | prompts | blocks | rule | whole images | PSNR | per image | faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, blocks, rule), pieces in groups.items():
        prompts, *others = paired.cells(pieces, groups[name, blocks, NONE])
        label = rule if rule == NONE else f"`{rule}`"
        lines.append(f"| {' | '.join((f'`{name}`', prompts, f'{blocks}', f'{label}', *others))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
