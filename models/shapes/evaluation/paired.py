"""Ways of making the same images, in turns: what each costs them and saves.

The first way is what the others are compared with. All take turns at every prompt, so that a
disturbance of the machine does not hit one alone. Every 20 prompts become a row per way, so that a
run that was stopped can go on.
"""

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np

from ldm_runtime import Generator
from measuring.rows import commit, machine
from models.shapes.catalog.models import MODELS, TrainedModel
from models.shapes.evaluation import tasks
from models.shapes.evaluation.scores import WHOLE, EvaluationPrompt, score_all, scores
from models.shapes.evaluation.scoring import InputImage
from models.shapes.evaluation.tasks import SEED, TaskRow

PIECE = 20
_ERROR = "squared_error"  # of an image, with that of the first way
_PEAK = 255
#: Every model of a task of its own, and the model of full captions that the others descend from.
PAIRED_MODELS: Mapping[str, TrainedModel] = MappingProxyType(
    {"shapes": replace(MODELS["text_to_image_bert"], name="shapes", most_things=3), **MODELS}
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """A way of making images.

    Attributes:
        generator: An open bundle.
        fields: Fields of its requests, in addition to those of the prompt.
        settings: What its rows say of it.
    """

    generator: Generator
    fields: Mapping[str, Any]
    settings: Mapping[str, Any]

    def draw(
        self, model: TrainedModel, prompt: EvaluationPrompt, index: int, **fields: object
    ) -> InputImage:
        """Return the image of a prompt, whose seed is that of its index."""
        asked = {**tasks.FIELDS[model.task](prompt), **self.fields, **fields}
        return np.asarray(self.generator(seed=SEED + index, **asked).images[0])


def measure(model: TrainedModel, ways: Sequence[Way], first: int, count: int) -> Iterator[TaskRow]:
    """Generate and score the images of every way; yield a row of each per piece.

    Args:
        model: The model.
        ways: At least one.
        first: The first prompt.
        count: Prompts.

    Raises:
        LdmError: An image cannot be generated.
    """
    end = first + count
    prompts = tasks.held_out_prompts(model, end, SEED)
    for way in ways:  # opens and warms up
        way.draw(model, prompts[0], 0, num_inference_steps=2)
    for start in range(first, end, PIECE):
        indices = range(start, min(start + PIECE, end))
        images: list[list[InputImage]] = [[] for _ in ways]
        seconds: list[list[float]] = [[] for _ in ways]
        for index, number in product(indices, range(len(ways))):
            started = time.perf_counter()
            images[number].append(ways[number].draw(model, prompts[index], index))
            seconds[number].append(time.perf_counter() - started)
        piece = prompts[start : indices.stop]
        for number, way in enumerate(ways):
            metrics = score_all(model.task, piece, images[number])
            settings = {"seed": SEED, "first": start, "images": len(piece), **way.settings}
            steps = way.fields.get("num_inference_steps")
            yield TaskRow(
                name=model.name,
                backend=way.generator.backend,
                commit=commit(),
                bundle_sha256=way.generator.bundle_sha256,
                device=machine(),
                settings=tasks.settings_of(way.generator.spec, steps) | settings,
                seconds=tuple(seconds[number]),
                task=model.task,
                metrics={**metrics, _ERROR: _squared_error(images[number], images[0])},
                scores=scores(metrics),
                distances={},
            )


def _squared_error(
    images: Sequence[InputImage], others: Sequence[InputImage]
) -> tuple[float, float]:
    """Return the sum of the mean squared errors of images, and how many they are."""
    pairs = zip(images, others, strict=True)
    errors = [float(np.square(one.astype(float) - other).mean()) for one, other in pairs]
    return sum(errors), len(errors)


def cells(pieces: Mapping[object, TaskRow], first: Mapping[object, TaskRow]) -> tuple[str, ...]:
    """Return prompts, whole images, PSNR, seconds per image and speed of a way, to print.

    Speed is the mean time of an image of the first way over that of this one, of the same prompts.

    Args:
        pieces: The way's rows.
        first: Those of the first way, by the same keys.
    """
    right, asked = _sum_of(pieces.values(), WHOLE)
    error, number = _sum_of(pieces.values(), _ERROR)
    psnr = "" if not error else f"{10 * math.log10(_PEAK**2 * number / error):.1f} dB"
    spent = _mean_seconds(pieces.values())
    most = _mean_seconds(first[piece] for piece in pieces)
    whole = f"{right / asked:.1%}" if asked else ""
    return f"{number:.0f}", whole, psnr, f"{spent:.3f} s", f"{most / spent:.2f}×"


def _sum_of(rows: Iterable[TaskRow], metric: str) -> tuple[float, float]:
    reached, possible = zip(*(row.metrics.get(metric, (0.0, 0.0)) for row in rows), strict=True)
    return sum(reached), sum(possible)


def _mean_seconds(rows: Iterable[TaskRow]) -> float:
    return statistics.fmean(seconds for row in rows for seconds in row.seconds)
