"""Metrics of the images of a model, by the detector or by plain arithmetic.

A scorer takes a prompt and the generated image and returns metrics: for each criterion the amount
reached and the amount possible. Metrics of many images are added; `scores` makes shares and
decibels of them. Every scorer is a pure function, and so serves training, where images come from
torch, as well as the evaluation of an exported bundle.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from PIL import Image

from ldm_runtime.specs.model import Task
from models.shapes.data import scenes
from models.shapes.data.labels import box_of, class_map, overlap_of, scene_map
from models.shapes.data.masks import Mask, mean_color_fill, visible_share
from models.shapes.evaluation import detector, scoring
from models.shapes.evaluation.scoring import InputImage

#: By criterion: the amount reached, and the amount possible.
Metrics = Mapping[str, tuple[float, float]]

#: The one criterion of every task: the image is right, nothing is missing, nothing extra.
WHOLE = "whole_images"
_FACTOR = 4  # of super-resolution
#: Criteria that are squared errors and numbers of values, by the score they become.
_DECIBELS: Mapping[str, str] = MappingProxyType(
    {"error": "psnr", "plain_error": "plain_psnr", "knowable_error": "knowable_psnr"}
)
_ROUNDING = 1 / 12  # mean squared error of rounding to whole numbers
_HALF = 0.5  # share of a thing that must be visible for it to be asked for
_IN_PLACE = 0.5  # overlap with its box from which a thing is in it
_MOST_THINGS = 3  # of any scene
_TRACE = 0.01  # share of a thing that must be visible for anything to be known of it


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationPrompt:
    """The source of an image.

    Attributes:
        scene: What it is to show.
        mask: For inpainting, its missing part.
        wording: For captions, how much of the scene they tell.
    """

    scene: scenes.Scene
    mask: Mask | None = None
    wording: scenes.Wording = scenes.FULL

    @property
    def caption(self) -> str:
        """The scene's caption in this wording."""
        return scenes.caption(self.scene, self.wording)

    @property
    def truth(self) -> InputImage:
        """The scene's own image."""
        return image_of(self.scene)


def image_of(scene: scenes.Scene) -> InputImage:
    """Return the image of a scene."""
    image: InputImage = np.rint(scenes.render(scene) * 255).astype(np.uint8)
    return image


def shrink(image: InputImage) -> InputImage:
    """Return an image of a quarter of the sides: the means of its blocks of 4x4 pixels."""
    height, width, channels = image.shape
    blocks = image.reshape(height // _FACTOR, _FACTOR, width // _FACTOR, _FACTOR, channels)
    small: InputImage = np.rint(blocks.astype(np.float32).mean(axis=(1, 3))).astype(np.uint8)
    return small


def enlarge(image: InputImage) -> InputImage:
    """Return an image of four times the sides by bicubic interpolation."""
    size = (image.shape[1] * _FACTOR, image.shape[0] * _FACTOR)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def score_scene(prompt: EvaluationPrompt, image: InputImage) -> Metrics:
    """Ask whether an image shows a scene of the training data's kind, and nothing else."""
    reading = detector.read_image(image)
    whole = reading.is_clean and 1 <= len(reading.things) <= len(prompt.scene.things)
    return {WHOLE: (whole, 1)}


def score_class(prompt: EvaluationPrompt, image: InputImage) -> Metrics:
    """Ask whether there is exactly one thing, of the kind and colour that the class stands for."""
    (asked,) = prompt.scene.things
    reading = detector.read_image(image)
    found = [(each.kind, each.color) for each in reading.things]
    right = found == [(asked.kind, asked.color)]
    return {
        WHOLE: (right and reading.is_clean, 1),
        "class": (right, 1),
        "found": ((asked.kind, asked.color) in found, 1),
    }


def score_words(prompt: EvaluationPrompt, image: InputImage) -> Metrics:
    """Ask for objects and relations, as `evaluate.py` does."""
    tally = scoring.score(prompt.scene, detector.read_image(image), prompt.wording)
    return {
        WHOLE: (tally.images_right, tally.images),
        "objects": (tally.objects_right, tally.objects),
        "relations": (tally.relations_right, tally.relations),
        "relations_of_found": (tally.relations_right, tally.relations_scored),
        "sizes": (tally.sizes_right, tally.objects),
        "backgrounds": (tally.backgrounds_right, tally.images),
        "extra": (tally.extra, tally.images),
    }


def score_layout(prompt: EvaluationPrompt, image: InputImage) -> Metrics:
    """Ask for things of the right label, and how well those fill the boxes they were asked in.

    `labels` counts things of the right kind and colour anywhere; `labels_in_place` those whose box
    overlaps the asked one at all.
    """
    asked, reading = prompt.scene.things, detector.read_image(image)
    overlaps = _overlaps_of_boxes(asked, reading)
    in_place = sum(each >= _IN_PLACE for each in overlaps)
    whole = reading.is_clean and in_place == len(asked) == len(reading.things)
    return {
        WHOLE: (whole, 1),
        "overlap": (sum(overlaps), len(overlaps)),
        "labels": (len(overlaps), len(asked)),
        "labels_in_place": (sum(each > 0 for each in overlaps), len(asked)),
    }


def _overlaps_of_boxes(asked: Sequence[scenes.Thing], reading: detector.Reading) -> list[float]:
    """Return how well each thing that was found overlaps the box that it was asked in."""
    matched = scoring.match(asked, reading.things)
    return [
        overlap_of(box_of(wanted), box_of(found))
        for wanted, found in zip(asked, matched, strict=True)
        if found is not None
    ]


def score_map(prompt: EvaluationPrompt, image: InputImage) -> Metrics:
    """Compare the asked class of every pixel with that of the image, read back."""
    wanted = scene_map(prompt.scene)
    reading = detector.read_image(image)
    found = class_map(reading.things, reading.background, gradient=reading.gradient)
    things = wanted != wanted[0, 0]
    right = found == wanted
    return {
        WHOLE: (_shows_scene(prompt.scene, reading), 1),
        "pixels": (float(right.sum()), right.size),
        "thing_pixels": (float(right[things].sum()), float(things.sum())),
    }


def _shows_scene(scene: scenes.Scene, reading: detector.Reading) -> bool:
    """Return whether an image shows the things of a scene in their places, and nothing else."""
    overlaps = _overlaps_of_boxes(scene.things, reading)
    return (
        reading.is_clean
        and sum(each >= _IN_PLACE for each in overlaps) == len(scene.things) == len(reading.things)
        and (reading.background, reading.gradient) == (scene.background, scene.gradient)
    )


def score_enlarged(prompt: EvaluationPrompt, image: InputImage) -> Metrics:
    """Return squared errors of an enlarged image and of the bicubic one."""
    truth = prompt.truth
    error = _squared_error(image, truth)
    plain_error = _squared_error(enlarge(shrink(truth)), truth)
    return {
        WHOLE: (_shows_scene(prompt.scene, detector.read_image(image)), 1),
        "error": error,
        "plain_error": plain_error,
        "mean_gain": (_gain(error, plain_error), 1),
    }


def score_filled(prompt: EvaluationPrompt, image: InputImage) -> Metrics:
    """Return the metrics of an inpainted image.

    `kept` is whether the rest is untouched; `error` and `plain_error` are those in the mask, of
    the image and of the mean colour of the rest, `knowable_error` that of the scene without what
    is wholly hidden, which cannot be known; `readable` is whether everything that shows by half
    or more is read back with its kind and colour. Of a whole image nobody can say what is missing
    in the mask; it has what shows, no more things than any scene, and is clean.
    """
    assert prompt.mask is not None, "inpainting needs a mask"
    mask, truth = prompt.mask, prompt.truth
    plain = mean_color_fill(truth, mask)
    shares = {each: visible_share(each, mask) for each in prompt.scene.things}
    showing = [each for each, share in shares.items() if share >= _HALF]
    traced = tuple(each for each, share in shares.items() if share >= _TRACE)
    knowable = image_of(replace(prompt.scene, things=traced))
    error = _squared_error(image[mask], truth[mask])
    plain_error = _squared_error(plain[mask], truth[mask])
    reading = detector.read_image(image)
    readable = None not in scoring.match(showing, reading.things)
    few = len(reading.things) <= _MOST_THINGS
    return {
        WHOLE: (readable and few and reading.is_clean, 1),
        "kept": (bool((image[~mask] == truth[~mask]).all()), 1),
        "error": error,
        "plain_error": plain_error,
        "mean_gain": (_gain(error, plain_error), 1),
        "knowable_error": _squared_error(knowable[mask], truth[mask]),
        "readable": (readable, 1),
    }


SCORERS: Mapping[Task, Callable[[EvaluationPrompt, InputImage], Metrics]] = MappingProxyType(
    {
        "unconditional": score_scene,
        "class-to-image": score_class,
        "text-to-image": score_words,
        "layout-to-image": score_layout,
        "semantic-synthesis": score_map,
        "super-resolution": score_enlarged,
        "inpainting": score_filled,
    }
)


def score_all(
    task: Task, prompts: Iterable[EvaluationPrompt], images: Iterable[InputImage]
) -> dict[str, tuple[float, float]]:
    """Return the sum of the metrics of images, one per prompt."""
    total: dict[str, tuple[float, float]] = {}
    for prompt, image in zip(prompts, images, strict=True):
        for name, (reached, of) in SCORERS[task](prompt, image).items():
            before = total.get(name, (0.0, 0.0))
            total[name] = before[0] + float(reached), before[1] + float(of)
    return total


def scores(metrics: Metrics) -> dict[str, float]:
    """Return shares, and decibels for errors.

    `gain` is how many decibels the plain way lacks by the errors of all images together, which
    the worst images decide; `mean_gain` is the mean of what it lacks in each. A criterion that
    nothing was asked of has no score.
    """
    shares = {
        _DECIBELS.get(name, name): decibels(reached / of) if name in _DECIBELS else reached / of
        for name, (reached, of) in metrics.items()
        if of
    }
    if {"psnr", "plain_psnr"} <= shares.keys():
        shares["gain"] = shares["psnr"] - shares["plain_psnr"]
    if {"knowable_psnr", "plain_psnr"} <= shares.keys():
        shares["knowable_gain"] = shares["knowable_psnr"] - shares["plain_psnr"]
    return shares


#: Goals of each model; `scores` has more than these.
GOALS: Mapping[Task, Mapping[str, float]] = MappingProxyType(
    {
        "unconditional": {WHOLE: 0.9},
        "class-to-image": {WHOLE: 0.95},
        "text-to-image": {WHOLE: 0.9, "objects": 0.9, "relations": 0.8},
        "layout-to-image": {"overlap": 0.6, "labels": 0.9},
        "semantic-synthesis": {"pixels": 0.85},
        "super-resolution": {"gain": 2.0},
        "inpainting": {"kept": 1.0, "gain": 3.0, "readable": 0.8},
    }
)


def _squared_error(image: InputImage, truth: InputImage) -> tuple[float, float]:
    error = image.astype(np.float64) - truth
    return float(np.square(error).sum()), float(error.size)


def _gain(error: tuple[float, float], plain_error: tuple[float, float]) -> float:
    (reached, of), (plain, plain_of) = error, plain_error
    return decibels(reached / of) - decibels(plain / plain_of)


def decibels(mean_squared_error: float) -> float:
    """Return the peak signal-to-noise ratio of an error in grey levels.

    An error below that of rounding to whole grey levels counts as that.
    """
    return 10 * math.log10(255**2 / max(mean_squared_error, _ROUNDING))
