"""What a picture that a system drew is worth: marks by the detector or by plain arithmetic.

A judge takes a question and the picture that was drawn and gives marks: for each criterion what was
reached and of how much. Marks of many pictures are added; `scores` makes shares and decibels of
them. Every judge is a pure function, and so serves training, where pictures come from torch, as
well as the exam through an exported bundle.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from PIL import Image

from ldm_runtime.specs.model import Task
from models.shapes.data import scenes
from models.shapes.data.holes import Mask, mean_color_fill, visible_share
from models.shapes.data.labels import box_of, class_map, overlap_of, scene_map
from models.shapes.evaluation import detector, judging
from models.shapes.evaluation.judging import InputImage

#: By criterion: what was reached, and of how much.
Marks = Mapping[str, tuple[float, float]]

_FACTOR = 4  # of super-resolution
#: Criteria that are squared errors and numbers of values, by the score they become.
_DECIBELS: Mapping[str, str] = MappingProxyType(
    {"error": "psnr", "plain_error": "plain_psnr", "knowable_error": "knowable_psnr"}
)
_ROUNDING = 1 / 12  # mean squared error of rounding to whole numbers
_SATURATED = 64  # spread of a pixel's channels from which it is coloured, grey levels
_GRAY_TOLERANCE = 12.0  # mean grey levels a background may be off
_CLEAR = 0.75  # overlap with its template from which a thing is what it looks like
_HALF = 0.5  # share of a thing that must be visible for it to be asked for
_TRACE = 0.01  # share of a thing that must be visible for anything to be known of it


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """What a picture is drawn from: a scene, and for inpainting what is missing of it."""

    scene: scenes.Scene
    hole: Mask | None = None

    @property
    def truth(self) -> InputImage:
        """The scene's own picture."""
        return drawing_of(self.scene)


def drawing_of(scene: scenes.Scene) -> InputImage:
    """Return the picture of a scene."""
    picture: InputImage = np.rint(scenes.render(scene) * 255).astype(np.uint8)
    return picture


def shrink(picture: InputImage) -> InputImage:
    """Return a picture of a quarter of the sides: the means of its blocks of 4x4 pixels."""
    height, width, channels = picture.shape
    blocks = picture.reshape(height // _FACTOR, _FACTOR, width // _FACTOR, _FACTOR, channels)
    small: InputImage = np.rint(blocks.astype(np.float32).mean(axis=(1, 3))).astype(np.uint8)
    return small


def enlarge(picture: InputImage) -> InputImage:
    """Return a picture of four times the sides by bicubic interpolation."""
    size = (picture.shape[1] * _FACTOR, picture.shape[0] * _FACTOR)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def judge_scene(question: Question, picture: InputImage) -> Marks:
    """Ask whether a picture shows a scene of the training data's kind, and nothing besides."""
    reading = detector.read_picture(picture)
    most = len(question.scene.things)
    valid = (
        1 <= len(reading.things) <= most
        and min(reading.overlaps) >= _CLEAR
        and stray_pixels(picture, reading) < detector.SMALLEST_AREA
        and _background_error(picture, reading) <= _GRAY_TOLERANCE
    )
    return {"valid": (valid, 1)}


def judge_class(question: Question, picture: InputImage) -> Marks:
    """Ask whether there is exactly one thing, of the kind and colour that the class stands for."""
    (asked,) = question.scene.things
    reading = detector.read_picture(picture)
    found = [(each.kind, each.color) for each in reading.things]
    return {
        "class": (found == [(asked.kind, asked.color)], 1),
        "found": ((asked.kind, asked.color) in found, 1),
    }


def judge_words(question: Question, picture: InputImage) -> Marks:
    """Ask for objects and relations, as `evaluate.py` does."""
    tally = judging.judge(question.scene, detector.read_picture(picture))
    return {
        "objects": (tally.objects_right, tally.objects),
        "relations": (tally.relations_right, tally.relations),
        "relations_of_found": (tally.relations_right, tally.relations_judged),
        "sizes": (tally.sizes_right, tally.objects),
        "backgrounds": (tally.backgrounds_right, tally.pictures),
        "whole_pictures": (tally.pictures_right, tally.pictures),
    }


def judge_layout(question: Question, picture: InputImage) -> Marks:
    """Ask for things of the right label, and how well those fill the boxes they were asked in.

    `labels` counts things of the right kind and colour anywhere; `labels_in_place` those whose box
    overlaps the asked one at all.
    """
    asked = question.scene.things
    matched = judging.match(asked, detector.read_picture(picture).things)
    overlaps = [
        overlap_of(box_of(wanted), box_of(found))
        for wanted, found in zip(asked, matched, strict=True)
        if found is not None
    ]
    return {
        "overlap": (sum(overlaps), len(overlaps)),
        "labels": (len(overlaps), len(asked)),
        "labels_in_place": (sum(each > 0 for each in overlaps), len(asked)),
    }


def judge_map(question: Question, picture: InputImage) -> Marks:
    """Compare the asked class of every pixel with that of the picture, read back."""
    wanted = scene_map(question.scene)
    reading = detector.read_picture(picture)
    found = class_map(reading.things, reading.background, gradient=reading.gradient)
    things = wanted != wanted[0, 0]
    right = found == wanted
    return {
        "pixels": (float(right.sum()), right.size),
        "thing_pixels": (float(right[things].sum()), float(things.sum())),
    }


def judge_enlarged(question: Question, picture: InputImage) -> Marks:
    """Return squared errors of an enlarged picture and of the bicubic one."""
    truth = question.truth
    error = _squared_error(picture, truth)
    plain_error = _squared_error(enlarge(shrink(truth)), truth)
    return {
        "error": error,
        "plain_error": plain_error,
        "mean_gain": (_gain(error, plain_error), 1),
    }


def judge_filled(question: Question, picture: InputImage) -> Marks:
    """Return what became of a picture with a hole.

    `kept` is whether the rest is untouched; `error` and `plain_error` are those in the hole, of
    the picture and of the mean colour of the rest, `knowable_error` that of the scene without what
    is wholly hidden, which nobody can know of; `readable` is whether everything that shows by half
    or more is read back with its kind and colour.
    """
    assert question.hole is not None, "inpainting needs a hole"
    hole, truth = question.hole, question.truth
    plain = mean_color_fill(truth, hole)
    shares = {each: visible_share(each, hole) for each in question.scene.things}
    showing = [each for each, share in shares.items() if share >= _HALF]
    traced = tuple(each for each, share in shares.items() if share >= _TRACE)
    knowable = drawing_of(replace(question.scene, things=traced))
    error = _squared_error(picture[hole], truth[hole])
    plain_error = _squared_error(plain[hole], truth[hole])
    matched = judging.match(showing, detector.read_picture(picture).things)
    return {
        "kept": (bool((picture[~hole] == truth[~hole]).all()), 1),
        "error": error,
        "plain_error": plain_error,
        "mean_gain": (_gain(error, plain_error), 1),
        "knowable_error": _squared_error(knowable[hole], truth[hole]),
        "readable": (None not in matched, 1),
    }


JUDGES: Mapping[Task, Callable[[Question, InputImage], Marks]] = MappingProxyType(
    {
        "unconditional": judge_scene,
        "class-to-image": judge_class,
        "text-to-image": judge_words,
        "layout-to-image": judge_layout,
        "semantic-synthesis": judge_map,
        "super-resolution": judge_enlarged,
        "inpainting": judge_filled,
    }
)


def judge_all(
    task: Task, questions: Iterable[Question], pictures: Iterable[InputImage]
) -> dict[str, tuple[float, float]]:
    """Return the sum of the marks of pictures, one a question."""
    total: dict[str, tuple[float, float]] = {}
    for question, picture in zip(questions, pictures, strict=True):
        for name, (reached, of) in JUDGES[task](question, picture).items():
            before = total.get(name, (0.0, 0.0))
            total[name] = before[0] + float(reached), before[1] + float(of)
    return total


def scores(marks: Marks) -> dict[str, float]:
    """Return shares, and decibels of what are errors.

    `gain` is how many decibels the plain way lacks by the errors of all pictures together, which
    the worst pictures decide; `mean_gain` is the mean of what it lacks in each. A criterion that
    nothing was asked of has no score.
    """
    shares = {
        _DECIBELS.get(name, name): decibels(reached / of) if name in _DECIBELS else reached / of
        for name, (reached, of) in marks.items()
        if of
    }
    if {"psnr", "plain_psnr"} <= shares.keys():
        shares["gain"] = shares["psnr"] - shares["plain_psnr"]
    if {"knowable_psnr", "plain_psnr"} <= shares.keys():
        shares["knowable_gain"] = shares["knowable_psnr"] - shares["plain_psnr"]
    return shares


#: What each system has to reach; `scores` has more than these.
GOALS: Mapping[Task, Mapping[str, float]] = MappingProxyType(
    {
        "unconditional": {"valid": 0.9},
        "class-to-image": {"class": 0.95},
        "text-to-image": {"objects": 0.9, "relations": 0.8},  # those of the shapes model
        "layout-to-image": {"overlap": 0.6, "labels": 0.9},
        "semantic-synthesis": {"pixels": 0.85},
        "super-resolution": {"gain": 2.0},
        "inpainting": {"kept": 1.0, "gain": 3.0, "readable": 0.8},
    }
)


def stray_pixels(picture: InputImage, reading: detector.Reading) -> int:
    """Return how many pixels are coloured that belong to nothing that was read."""
    levels = detector.smooth(picture.astype(np.float32))
    coloured = levels.max(axis=2) - levels.min(axis=2) > _SATURATED
    for thing in reading.things:
        coloured &= detector.smooth(scenes.coverage(thing)) <= 0
    return int(coloured.sum())


def _background_error(picture: InputImage, reading: detector.Reading) -> float:
    """Return how many grey levels the background is off, where nothing was read."""
    free = np.ones(picture.shape[:2], np.bool_)
    for thing in reading.things:
        free &= detector.smooth(scenes.coverage(thing)) <= 0
    wanted = scenes.backdrop(reading.background, gradient=reading.gradient)
    errors = np.abs(picture.astype(np.float32).mean(axis=2) - wanted)
    return float(errors[free].mean()) if free.any() else math.inf


def _squared_error(picture: InputImage, truth: InputImage) -> tuple[float, float]:
    error = picture.astype(np.float64) - truth
    return float(np.square(error).sum()), float(error.size)


def _gain(error: tuple[float, float], plain_error: tuple[float, float]) -> float:
    (reached, of), (plain, plain_of) = error, plain_error
    return decibels(reached / of) - decibels(plain / plain_of)


def decibels(mean_squared_error: float) -> float:
    """Return the peak signal-to-noise ratio of an error in grey levels.

    An error below that of rounding to whole grey levels counts as that.
    """
    return 10 * math.log10(255**2 / max(mean_squared_error, _ROUNDING))
