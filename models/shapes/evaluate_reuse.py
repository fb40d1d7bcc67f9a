r"""Measure what feature reuse costs a model and saves: the same prompts and noise, rule by rule.

    ldm-export models/shapes/shapes.ckpt out/reuse --reuse
    python models/shapes/evaluate_reuse.py --model shapes --bundle out/reuse --rules deep:2 deep:3
    python models/shapes/evaluate_reuse.py --report

The rules take turns at every prompt, after the image without one, so that a disturbance of the
machine does not hit one alone. Every 20 prompts become a row per rule in
`benchmarks/results/feature_reuse.jsonl`; a run that was stopped goes on with `--first`. `--report`
prints the table of docs/steering.md from all rows of the latest bundle of each model.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ldm_runtime import Generator
from ldm_runtime.errors import LdmError
from measuring.rows import ROOT, commit, machine
from models.shapes.catalog.models import MODELS, TrainedModel
from models.shapes.evaluation import tasks
from models.shapes.evaluation.scores import WHOLE, EvaluationPrompt, score_all, scores
from models.shapes.evaluation.scoring import InputImage
from models.shapes.evaluation.tasks import SEED, TaskRow

RESULTS = ROOT / "benchmarks/results/feature_reuse.jsonl"
RULES = ("deep:2", "deep:3", "deep:5")
NONE = "none"
_PROMPTS, _PIECE = 100, 20
_ERROR = "squared_error"  # of an image, with that without reuse
_PEAK = 255
#: Every model of a task of its own, and the model of full captions that the others descend from.
_MODELS: Mapping[str, TrainedModel] = MappingProxyType(
    {"shapes": replace(MODELS["text_to_image_bert"], name="shapes", most_things=3), **MODELS}
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=_MODELS, help="which model the bundle is of")
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
                for row in measure(generator, _MODELS[args.model], args):
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
    rules, end = (NONE, *args.rules), args.first + args.images
    prompts = tasks.held_out_prompts(model, end, SEED)
    for rule in rules:  # opens and warms up
        _generate(generator, model, prompts[0], 0, {"reuse": rule, "steps": 2})
    for first in range(args.first, end, _PIECE):
        indices = range(first, min(first + _PIECE, end))
        images: dict[str, list[InputImage]] = {rule: [] for rule in rules}
        seconds: dict[str, list[float]] = {rule: [] for rule in rules}
        for index, rule in product(indices, rules):
            started = time.perf_counter()
            fields = {"reuse": rule, "steps": args.steps}
            images[rule].append(_generate(generator, model, prompts[index], index, fields))
            seconds[rule].append(time.perf_counter() - started)
        piece = prompts[first : indices.stop]
        for rule in rules:
            metrics = score_all(model.task, piece, images[rule])
            settings = _settings(generator, args.steps) | {"first": first, "images": len(piece)}
            yield TaskRow(
                name=model.name,
                backend=generator.backend,
                commit=commit(),
                bundle_sha256=generator.bundle_sha256,
                device=machine(),
                settings=settings | {"reuse": rule},
                seconds=tuple(seconds[rule]),
                task=model.task,
                metrics={**metrics, _ERROR: _squared_error(images[rule], images[NONE])},
                scores=scores(metrics),
                distances={},
            )


def _generate(
    generator: Generator,
    model: TrainedModel,
    prompt: EvaluationPrompt,
    index: int,
    wanted: Mapping[str, object],
) -> InputImage:
    fields = tasks.FIELDS[model.task](prompt)
    if wanted["reuse"] != NONE:
        fields["reuse"] = wanted["reuse"]
    if wanted["steps"] is not None:
        fields["num_inference_steps"] = wanted["steps"]
    return np.asarray(generator(seed=SEED + index, **fields).images[0])


def _settings(generator: Generator, steps: int | None) -> dict[str, Any]:
    unet = generator.spec.unet
    assert unet is not None, "every model here has a UNet"
    blocks = unet.shallow_blocks or 0
    return tasks.settings_of(generator.spec, steps) | {"seed": SEED, "shallow_blocks": blocks}


def _squared_error(
    images: Sequence[InputImage], others: Sequence[InputImage]
) -> tuple[float, float]:
    """Return the sum of the mean squared errors of images, and how many they are."""
    pairs = zip(images, others, strict=True)
    errors = [float(np.square(one.astype(float) - other).mean()) for one, other in pairs]
    return sum(errors), len(errors)


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
        without = groups[name, blocks, NONE]
        right, asked = _sum_of(pieces.values(), WHOLE)
        error, number = _sum_of(pieces.values(), _ERROR)
        psnr = "" if not error else f"{10 * math.log10(_PEAK**2 * number / error):.1f} dB"
        spent = _mean_seconds(pieces.values())
        most = _mean_seconds(without[piece] for piece in pieces)
        label = rule if rule == NONE else f"`{rule}`"
        lines.append(
            f"| `{name}` | {asked:.0f} | {blocks} | {label} | {right / asked:.1%} | {psnr} | "
            f"{spent:.3f} s | {most / spent:.2f}× |"
        )
    return "\n".join(lines)


def _sum_of(rows: Iterable[TaskRow], metric: str) -> tuple[float, float]:
    reached, possible = zip(*(row.metrics[metric] for row in rows), strict=True)
    return sum(reached), sum(possible)


def _mean_seconds(rows: Iterable[TaskRow]) -> float:
    return statistics.fmean(seconds for row in rows for seconds in row.seconds)


if __name__ == "__main__":
    sys.exit(main())
