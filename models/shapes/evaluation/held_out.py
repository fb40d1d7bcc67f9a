"""Held-out scenes and their captions, and the images of a bundle for them."""

import time
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
from PIL import Image

from ldm_runtime import Generator
from ldm_runtime.requests.request import parse_request
from models.shapes.data import scenes
from models.shapes.evaluation.scoring import InputImage, Tally, score_all

#: Of the captions, not of the training scenes; caption i is generated from noise seed + i.
SEED = 20_220_413


def held_out_scenes(count: int, seed: int) -> list[scenes.Scene]:
    """Return scenes whose captions were never trained on."""
    return list(islice(scenes.random_scenes(np.random.default_rng(seed), held_out=True), count))


def evaluate_bundle(
    generator: Generator,
    wanted: Sequence[scenes.Scene],
    settings: Mapping[str, object],
    wording: scenes.Wording = scenes.FULL,
) -> tuple[Tally, float]:
    """Generate each scene's caption and return the tally and the mean seconds per image.

    Args:
        generator: An open bundle.
        wanted: The scenes; image i is generated from noise SEED + i.
        settings: Further fields of the requests.
        wording: How much of a scene its caption tells.
    """
    images, seconds = generate_all(generator, wanted, settings, wording)
    return score_all(wanted, images, wording), sum(seconds) / max(len(wanted), 1)


def generate_all(
    generator: Generator,
    wanted: Sequence[scenes.Scene],
    settings: Mapping[str, object],
    wording: scenes.Wording = scenes.FULL,
) -> tuple[list[InputImage], list[float]]:
    """Return an image for each scene's caption, i from noise SEED + i, and the seconds of each."""
    images, seconds = [], []
    for index, scene in enumerate(wanted):
        started = time.perf_counter()
        image = generate(generator, scenes.caption(scene, wording), SEED + index, settings)
        seconds.append(time.perf_counter() - started)
        images.append(np.asarray(image))
    return images, seconds


def generate(
    generator: Generator, caption: str, seed: int, settings: Mapping[str, object]
) -> Image.Image:
    """Return a bundle's image for a caption; `settings` are request fields."""
    size = {"height": scenes.SIZE, "width": scenes.SIZE}
    fields = {"prompt": caption, "seed": seed, **size, **settings}
    return generator(parse_request(fields)).image
