"""The evaluation of a model's bundle: images for held-out scenes, generated and scored."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ldm_runtime import Generator
from ldm_runtime.errors import LdmError
from ldm_runtime.specs.model import ModelSpec, Task
from ldm_runtime.specs.tasks import can_guide
from measuring.rows import ROOT, Row, append_line, commit, machine
from models.shapes.catalog.models import MODELS, TrainedModel
from models.shapes.data import scenes
from models.shapes.data.labels import box_of, label_of, scene_map
from models.shapes.data.masks import mask_image, random_mask
from models.shapes.evaluation import detector_check, frechet, held_out, results
from models.shapes.evaluation.scores import GOALS, EvaluationPrompt, score_all, scores, shrink
from models.shapes.evaluation.scoring import InputImage

RESULTS = ROOT / "benchmarks/results/shapes_tasks.jsonl"
#: Of the prompts; the one of index i starts from noise SEED + i.
SEED = held_out.SEED
#: Held-out images that unconditional ones are compared with, for each of those.
_REFERENCES = 4
_NOISE, _BLURS = 20.0, 2  # of the planted worse images: grey levels, and how often averaged


@dataclass(frozen=True, kw_only=True)
class TaskRow(Row):
    """One model, measured; `seconds` are those of each image.

    Attributes:
        task: Its task.
        metrics: By criterion, the amount reached and the amount possible.
        scores: Shares and decibels made of them.
        distances: Of unconditional images, Fréchet distances from held-out ones: "generated"
            theirs, "floor" that of as many other held-out ones, "worse" that of those blurred and
            noisy.
    """

    task: str
    metrics: Mapping[str, tuple[float, float]]
    scores: Mapping[str, float]
    distances: Mapping[str, float]


def held_out_prompts(
    model: TrainedModel, count: int, seed: int, wording: scenes.Wording = scenes.FULL
) -> list[EvaluationPrompt]:
    """Return prompts from scenes that were never trained on, with masks if needed.

    Their captions were not either, but for models of one thing an image: of its 288 captions 18
    are held out, which are not even of all labels. There the places are new.
    """
    source = _fresh_scenes(np.random.default_rng(seed), held_out=model.most_things > 1)
    few = (scene for scene in source if len(scene.things) <= model.most_things)
    masks = np.random.default_rng(seed + 1)
    return [
        EvaluationPrompt(
            scene=scene,
            mask=random_mask(masks) if model.task == "inpainting" else None,
            wording=wording,
        )
        for scene in islice(few, count)
    ]


def _fresh_scenes(rng: np.random.Generator, *, held_out: bool) -> Iterator[scenes.Scene]:
    if held_out:
        return scenes.random_scenes(rng, held_out=True)
    return iter(lambda: scenes.random_scene(rng), None)


def _of_layout(prompt: EvaluationPrompt) -> dict[str, Any]:
    objects = [{"label": label_of(each), "box": box_of(each)} for each in prompt.scene.things]
    return {"layout": objects}


def _of_mask(prompt: EvaluationPrompt) -> dict[str, Any]:
    assert prompt.mask is not None, "inpainting needs a mask"
    return {"image": prompt.truth, "mask_image": mask_image(prompt.mask)}


#: The fields of a request for a prompt.
FIELDS: Mapping[Task, Callable[[EvaluationPrompt], dict[str, Any]]] = MappingProxyType(
    {
        "unconditional": lambda _: {},
        "class-to-image": lambda asked: {"class_label": label_of(asked.scene.things[0])},
        "text-to-image": lambda asked: {"prompt": asked.caption},
        "layout-to-image": _of_layout,
        "semantic-synthesis": lambda asked: {"segmentation": scene_map(asked.scene)},
        "super-resolution": lambda asked: {"image": shrink(asked.truth)},
        "inpainting": _of_mask,
    }
)


def settings_of(spec: ModelSpec, steps: int | None) -> dict[str, Any]:
    """Return how the images are sampled: the bundle's defaults, in `steps` if it is not None."""
    names = ("sampler", "num_inference_steps", "eta")
    settings = {name: getattr(spec.defaults, name) for name in names}
    settings |= {"guidance_scale": spec.defaults.guidance_scale} if can_guide(spec) else {}
    return settings | _stated(steps)


def _stated(steps: int | None) -> dict[str, int]:
    return {} if steps is None else {"num_inference_steps": steps}


def generate_all(
    generator: Generator,
    model: TrainedModel,
    prompts: Sequence[EvaluationPrompt],
    steps: int | None,
) -> tuple[list[InputImage], list[float]]:
    """Return an image for each prompt and the seconds that each took, the bundle's steps or others.

    Raises:
        LdmError: A request is refused, or the bundle cannot generate it.
    """
    images, seconds = [], []
    for index, prompt in enumerate(prompts):
        started = time.perf_counter()
        fields = FIELDS[model.task](prompt) | _stated(steps)
        image = generator(seed=SEED + index, **fields).images[0]
        seconds.append(time.perf_counter() - started)
        images.append(np.asarray(image))
    return images, seconds


def distances_of(model: TrainedModel, images: Sequence[InputImage]) -> dict[str, float]:
    """Return how far images, as many held-out ones and as many worse ones are from held-out ones.

    Raises:
        ValueError: There are fewer than two images.
    """
    count = len(images)
    asked = held_out_prompts(model, (_REFERENCES + 1) * count, SEED + 2)
    truths = [prompt.truth for prompt in asked]
    reference = frechet.fit(frechet.features_of(np.stack(truths[count:])))
    rng = np.random.default_rng(SEED)
    worse = [detector_check.photograph(each.scene, rng, _NOISE, _BLURS) for each in asked[:count]]
    sets = {"generated": images, "floor": truths[:count], "worse": worse}
    return {
        name: frechet.distance(frechet.fit(frechet.features_of(np.stack(each))), reference)
        for name, each in sets.items()
    }


def evaluate(
    generator: Generator,
    model: TrainedModel,
    count: int,
    steps: int | None = None,
    wording: scenes.Wording = scenes.FULL,
) -> tuple[TaskRow, list[InputImage]]:
    """Generate and score; return the row and the images.

    Args:
        generator: An open bundle of the model.
        model: The model.
        count: Images.
        steps: Of each; None takes the bundle's.
        wording: For models of captions, how much of a scene its caption tells.

    Raises:
        LdmError: The bundle does another task, or cannot generate.
    """
    if generator.spec.task != model.task:
        raise LdmError(
            f"{generator.bundle} is {generator.spec.task}, but {model.name} is {model.task}; "
            "give the bundle of that model"
        )
    prompts = held_out_prompts(model, count, SEED, wording)
    images, seconds = generate_all(generator, model, prompts, steps)
    metrics = score_all(model.task, prompts, images)
    is_free = model.task == "unconditional"
    row = TaskRow(
        name=model.name,
        backend=generator.backend,
        commit=commit(),
        bundle_sha256=generator.bundle_sha256,
        device=machine(),
        settings=settings_of(generator.spec, steps)
        | {"images": count, "seed": SEED}
        | ({} if wording == scenes.FULL else {"captions": "short"}),
        seconds=tuple(seconds),
        task=model.task,
        metrics=metrics,
        scores=scores(metrics),
        distances=distances_of(model, images) if is_free else {},
    )
    return row, images


def table(row: TaskRow) -> str:
    """Return scores, goals and distances as text, one row each."""
    goals = GOALS[MODELS[row.name].task]
    lines = [f"{row.name:24}{'reached':>10}{'goal':>8}"]
    for name, reached in row.scores.items():
        goal = goals.get(name)
        verdict = "" if goal is None else "  reached" if reached >= goal else "  missed"
        wanted = "" if goal is None else f"{goal:.2f}"
        lines.append(f"  {name:22}{reached:10.3f}{wanted:>8}{verdict}")
    lines += [f"  {f'distance, {name}':22}{each:10.3f}" for name, each in row.distances.items()]
    lines.append(f"  {'seconds per image':22}{row.median_seconds:10.3f}")
    return "\n".join(lines)


def read_rows(path: Path) -> Iterator[TaskRow]:
    """Return the rows of a results file, oldest first; none if there is no file.

    Raises:
        LdmError: A line is no such row.
    """
    return results.read_rows(path, TaskRow, "model's row")


def append_row(path: Path, row: TaskRow) -> None:
    """Add a row to a results file."""
    append_line(path, row.as_dict())


def sheet(images: Sequence[InputImage], columns: int = 8) -> InputImage:
    """Return images side by side as one, as many as fill whole rows."""
    starts = range(0, len(images) - columns + 1, columns)
    lines = [np.concatenate(images[start : start + columns], axis=1) for start in starts]
    return np.concatenate(lines)
