"""Held-out scenes and their captions, and the images of a bundle for them."""

import time
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
from PIL import Image

from ldm_runtime import Generator
from models.shapes.data import scenes
from models.shapes.evaluation.judging import InputImage, Tally, judge_all

#: Of the captions, not of the training scenes; caption i is drawn from noise seed + i.
SEED = 20_220_413


def held_out_scenes(count: int, seed: int) -> list[scenes.Scene]:
    """Return scenes whose captions were never trained on."""
    return list(islice(scenes.random_scenes(np.random.default_rng(seed), held_out=True), count))


def evaluate_bundle(
    generator: Generator, wanted: Sequence[scenes.Scene], settings: Mapping[str, object]
) -> tuple[Tally, float]:
    """Draw each scene's caption and return the tally and the mean seconds a picture took.

    Args:
        generator: An open bundle.
        wanted: The scenes; picture i is drawn from noise SEED + i.
        settings: Further fields of the requests.
    """
    pictures, seconds = draw_all(generator, wanted, settings)
    return judge_all(wanted, pictures), sum(seconds) / max(len(wanted), 1)


def draw_all(
    generator: Generator, wanted: Sequence[scenes.Scene], settings: Mapping[str, object]
) -> tuple[list[InputImage], list[float]]:
    """Return a picture for each scene's caption, i from noise SEED + i, and the seconds of each."""
    pictures, seconds = [], []
    for index, scene in enumerate(wanted):
        started = time.perf_counter()
        image = draw(generator, scene, SEED + index, settings)
        seconds.append(time.perf_counter() - started)
        pictures.append(np.asarray(image))
    return pictures, seconds


def draw(
    generator: Generator, scene: scenes.Scene, seed: int, settings: Mapping[str, object]
) -> Image.Image:
    """Return the picture a bundle draws for a scene's caption; `settings` are request fields."""
    size = {"height": scenes.SIZE, "width": scenes.SIZE}
    return generator(prompt=scenes.caption(scene), seed=seed, **size, **settings).images[0]
