r"""Measure what feature reuse costs a model and saves: the same prompts and noise, rule by rule.

    ldm-export models/shapes/shapes.ckpt out/reuse --reuse
    python models/shapes/evaluate_reuse.py --model shapes --bundle out/reuse --rules deep:2 deep:3
    python models/shapes/evaluate_reuse.py --report

The rules take turns at every prompt, after the image without one, so that a disturbance of the
machine does not hit one alone. Appends a row per rule to `benchmarks/results/feature_reuse.jsonl`;
`--report` prints the table of docs/steering.md from the latest of each.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

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
_PROMPTS = 100
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
    if args.images < 1:
        parser.error(f"--images must be at least 1, got {args.images}")
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


def measure(generator: Generator, model: TrainedModel, args: argparse.Namespace) -> list[TaskRow]:
    """Generate and score the images of every rule, and of none; return a row for each.

    Raises:
        LdmError: The bundle was exported without --reuse, or a rule is none.
    """
    prompts = tasks.held_out_prompts(model, args.images, SEED)
    rules = (NONE, *args.rules)
    images: dict[str, list[InputImage]] = {rule: [] for rule in rules}
    seconds: dict[str, list[float]] = {rule: [] for rule in rules}
    for rule in rules:  # opens and warms up
        _generate(generator, model, prompts[0], 0, {"reuse": rule, "steps": 2})
    for index, prompt in enumerate(prompts):
        for rule in rules:
            started = time.perf_counter()
            fields = {"reuse": rule, "steps": args.steps}
            images[rule].append(_generate(generator, model, prompt, index, fields))
            seconds[rule].append(time.perf_counter() - started)
    return [
        _row(generator, model, prompts, args.steps, rule, images, seconds[rule]) for rule in rules
    ]


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


def _row(  # noqa: PLR0913  (what was measured)
    generator: Generator,
    model: TrainedModel,
    prompts: Sequence[EvaluationPrompt],
    steps: int | None,
    rule: str,
    images: Mapping[str, Sequence[InputImage]],
    seconds: Sequence[float],
) -> TaskRow:
    metrics = score_all(model.task, prompts, images[rule])
    unet = generator.spec.unet
    assert unet is not None, "every model here but the autoencoder has a UNet"
    settings = tasks.settings_of(generator.spec, steps) | {"images": len(prompts), "seed": SEED}
    psnr = {} if rule == NONE else {"psnr_to_whole": _psnr(images[rule], images[NONE])}
    return TaskRow(
        name=model.name,
        backend=generator.backend,
        commit=commit(),
        bundle_sha256=generator.bundle_sha256,
        device=machine(),
        settings=settings | {"reuse": rule, "shallow_blocks": unet.shallow_blocks or 0},
        seconds=tuple(seconds),
        task=model.task,
        metrics=metrics,
        scores=scores(metrics) | psnr,
        distances={},
    )


def _psnr(images: Sequence[InputImage], others: Sequence[InputImage]) -> float:
    """Return the PSNR in dB of images with others, of the mean error of all."""
    pairs = zip(images, others, strict=True)
    errors = [float(np.square(one.astype(float) - other).mean()) for one, other in pairs]
    mean = statistics.fmean(errors)
    return 10 * math.log10(_PEAK**2 / mean) if mean else math.inf


def report(rows: Sequence[TaskRow]) -> str:
    """Return a table in Markdown: a line per model, number of blocks and rule, the latest of each.

    Speed is the mean time of an image without reuse over that with the rule, of the same run.
    """
    latest = {
        (row.name, row.settings["shallow_blocks"], row.settings["reuse"]): row for row in rows
    }
    lines = [
        "| model | steps | blocks | rule | whole images | PSNR | per image | faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, blocks, rule), row in latest.items():
        whole = latest[name, blocks, NONE]
        spent, most = statistics.fmean(row.seconds), statistics.fmean(whole.seconds)
        psnr = row.scores.get("psnr_to_whole")
        lines.append(
            f"| `{name}` | {row.settings['num_inference_steps']} | {blocks} | "
            f"{'none' if rule == NONE else f'`{rule}`'} | {row.scores[WHOLE]:.1%} | "
            f"{'' if psnr is None else f'{psnr:.1f} dB'} | {spent:.3f} s | {most / spent:.2f}× |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
