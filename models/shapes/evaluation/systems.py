"""The exam of a system's bundle: held-out scenes asked for, drawn by the runtime, and judged."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from ldm_runtime import Generator
from ldm_runtime.errors import LdmError
from ldm_runtime.specs.model import Task
from measuring.rows import ROOT, Row, as_line, commit, machine
from models.shapes.catalog.systems import SYSTEMS, System
from models.shapes.data import scenes
from models.shapes.data.holes import random_hole
from models.shapes.data.labels import box_of, label_of, scene_map
from models.shapes.evaluation import detector_check, frechet, held_out
from models.shapes.evaluation.judging import InputImage
from models.shapes.evaluation.scores import GOALS, Question, judge_all, scores, shrink

RESULTS = ROOT / "benchmarks/results/shapes_systems.jsonl"
#: Of the questions; the one of index i is drawn from noise SEED + i.
SEED = held_out.SEED
#: Held-out pictures that unconditional ones are compared with, for each of those.
_REFERENCES = 4
_NOISE, _BLURS = 20.0, 2  # of the planted worse pictures: grey levels, and how often averaged


@dataclass(frozen=True, kw_only=True)
class SystemRow(Row):
    """One system, measured; `seconds` are those of each picture.

    Attributes:
        task: What it does.
        marks: By criterion, what was reached and of how much.
        scores: Shares and decibels made of them.
        distances: Of unconditional pictures, Fréchet distances from held-out ones: "drawn" theirs,
            "floor" that of as many other held-out ones, "worse" that of those blurred and noisy.
    """

    task: str
    marks: Mapping[str, tuple[float, float]]
    scores: Mapping[str, float]
    distances: Mapping[str, float]


def held_out_questions(system: System, count: int, seed: int) -> list[Question]:
    """Return questions about scenes that were never trained on, with holes if needed.

    Their captions were not either, but for systems of one thing a picture: of its 288 captions 18
    are held out, which are not even of all labels. There the places are new.
    """
    source = _fresh_scenes(np.random.default_rng(seed), held_out=system.most_things > 1)
    few = (scene for scene in source if len(scene.things) <= system.most_things)
    holes = np.random.default_rng(seed + 1)
    return [
        Question(scene=scene, hole=random_hole(holes) if system.task == "inpainting" else None)
        for scene in islice(few, count)
    ]


def _fresh_scenes(rng: np.random.Generator, *, held_out: bool) -> Iterator[scenes.Scene]:
    if held_out:
        return scenes.random_scenes(rng, held_out=True)
    return iter(lambda: scenes.random_scene(rng), None)


def _of_layout(question: Question) -> dict[str, Any]:
    objects = [{"label": label_of(each), "box": box_of(each)} for each in question.scene.things]
    return {"layout": objects}


def _of_hole(question: Question) -> dict[str, Any]:
    assert question.hole is not None, "inpainting needs a hole"
    mask = np.where(question.hole, np.uint8(255), np.uint8(0))
    return {"image": question.truth, "mask_image": mask}


#: What a question says in the fields of a request.
FIELDS: Mapping[Task, Callable[[Question], dict[str, Any]]] = MappingProxyType(
    {
        "unconditional": lambda _: {},
        "class-to-image": lambda asked: {"class_label": label_of(asked.scene.things[0])},
        "text-to-image": lambda asked: {"prompt": scenes.caption(asked.scene)},
        "layout-to-image": _of_layout,
        "semantic-synthesis": lambda asked: {"segmentation": scene_map(asked.scene)},
        "super-resolution": lambda asked: {"image": shrink(asked.truth)},
        "inpainting": _of_hole,
    }
)


def settings_of(system: System, steps: int) -> dict[str, Any]:
    """Return how the pictures are sampled, as fields of requests."""
    settings: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": steps, "eta": 0.0}
    return settings | ({"guidance_scale": system.guidance_scale} if system.drops else {})


def draw_all(
    generator: Generator, system: System, questions: Sequence[Question], steps: int
) -> tuple[list[InputImage], list[float]]:
    """Return a picture for each question and the seconds that each took.

    Raises:
        LdmError: A request is refused, or the bundle cannot draw it.
    """
    pictures, seconds, settings = [], [], settings_of(system, steps)
    for index, question in enumerate(questions):
        started = time.perf_counter()
        fields = FIELDS[system.task](question) | settings
        image = generator(seed=SEED + index, **fields).images[0]
        seconds.append(time.perf_counter() - started)
        pictures.append(np.asarray(image))
    return pictures, seconds


def distances_of(system: System, pictures: Sequence[InputImage]) -> dict[str, float]:
    """Return how far pictures, as many held-out ones and as many worse ones are from held-out ones.

    Raises:
        ValueError: There are fewer than two pictures.
    """
    count = len(pictures)
    asked = held_out_questions(system, (_REFERENCES + 1) * count, SEED + 2)
    drawn = [question.truth for question in asked]
    reference = frechet.fit(frechet.features_of(np.stack(drawn[count:])))
    rng = np.random.default_rng(SEED)
    worse = [detector_check.photograph(each.scene, rng, _NOISE, _BLURS) for each in asked[:count]]
    sets = {"drawn": pictures, "floor": drawn[:count], "worse": worse}
    return {
        name: frechet.distance(frechet.fit(frechet.features_of(np.stack(each))), reference)
        for name, each in sets.items()
    }


def examine(
    generator: Generator, system: System, count: int, steps: int
) -> tuple[SystemRow, list[InputImage]]:
    """Draw and judge; return the row and the pictures.

    Raises:
        LdmError: The bundle does another task, or cannot draw.
    """
    if generator.spec.task != system.task:
        raise LdmError(
            f"{generator.bundle} is {generator.spec.task}, but {system.name} is {system.task}; "
            "give the bundle of that system"
        )
    questions = held_out_questions(system, count, SEED)
    pictures, seconds = draw_all(generator, system, questions, steps)
    marks = judge_all(system.task, questions, pictures)
    is_free = system.task == "unconditional"
    row = SystemRow(
        name=system.name,
        system=generator.backend,
        commit=commit(),
        bundle_sha256=generator.bundle_sha256,
        device=machine(),
        settings=settings_of(system, steps) | {"pictures": count, "seed": SEED},
        seconds=tuple(seconds),
        task=system.task,
        marks=marks,
        scores=scores(marks),
        distances=distances_of(system, pictures) if is_free else {},
    )
    return row, pictures


def table(row: SystemRow) -> str:
    """Return scores, goals and distances as text, a row each."""
    goals = GOALS[SYSTEMS[row.name].task]
    lines = [f"{row.name:24}{'reached':>10}{'goal':>8}"]
    for name, reached in row.scores.items():
        goal = goals.get(name)
        verdict = "" if goal is None else "  reached" if reached >= goal else "  missed"
        wanted = "" if goal is None else f"{goal:.2f}"
        lines.append(f"  {name:22}{reached:10.3f}{wanted:>8}{verdict}")
    lines += [f"  {f'distance, {name}':22}{each:10.3f}" for name, each in row.distances.items()]
    lines.append(f"  {'seconds a picture':22}{row.median_seconds:10.3f}")
    return "\n".join(lines)


def read_rows(path: Path) -> Iterator[SystemRow]:
    """Yield the rows of a results file, oldest first; none if there is no file.

    Raises:
        LdmError: A line is no such row.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            yield msgspec.json.decode(line, type=SystemRow)
        except msgspec.MsgspecError as error:
            raise LdmError(f"{path}:{number} is no system's row ({error}); remove it") from error


def append_row(path: Path, row: SystemRow) -> None:
    """Add a row to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(as_line(row.as_dict()) + "\n")


def sheet(pictures: Sequence[InputImage], columns: int = 8) -> InputImage:
    """Return pictures side by side as one, as many as fill whole rows."""
    starts = range(0, len(pictures) - columns + 1, columns)
    lines = [np.concatenate(pictures[start : start + columns], axis=1) for start in starts]
    return np.concatenate(lines)
