"""Held-out scenes and their captions, and the images of a bundle for them."""

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from ldm_runtime import Generator
from models.shapes.data import scenes
from models.shapes.data.masks import Mask, mask_image, mean_color_fill, random_mask
from models.shapes.evaluation.scores import image_of
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
        generator: An open bundle; one that inpaints gets each scene's image with a hole in it.
        wanted: The scenes; image i is generated from noise SEED + i.
        settings: Further fields of the requests.
        wording: How much of a scene its caption tells.
    """
    images, seconds = generate_all(generator, wanted, settings, wording)
    return score_all(wanted, images, wording), sum(seconds) / max(len(wanted), 1)


def tally_of_holes(wanted: Sequence[scenes.Scene], wording: scenes.Wording) -> Tally:
    """Return the tally of images whose holes are filled with the mean colour of the rest.

    It is what an image with a hole is worth without a model that fills it.
    """
    filled = [mean_color_fill(image_of(scene), hole(i)) for i, scene in enumerate(wanted)]
    return score_all(wanted, filled, wording)


def hole(index: int) -> Mask:
    """Return the mask (64, 64) of the scene of an index, true where its image is missing."""
    return random_mask(np.random.default_rng((SEED, index)))


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
        given = {**settings, **_image_fields(generator, scene, index)}
        image = generate(generator, scenes.caption(scene, wording), SEED + index, given)
        seconds.append(time.perf_counter() - started)
        images.append(np.asarray(image))
    return images, seconds


def generate(
    generator: Generator, caption: str, seed: int, settings: Mapping[str, object]
) -> Image.Image:
    """Return a bundle's image for a caption; `settings` are request fields."""
    size = {} if "image" in settings else {"height": scenes.SIZE, "width": scenes.SIZE}
    fields: dict[str, Any] = {"prompt": caption, "seed": seed, **size, **settings}
    return generator(**fields).image


def _image_fields(generator: Generator, scene: scenes.Scene, index: int) -> dict[str, object]:
    """Return the image and the mask that a bundle needs, if it inpaints."""
    if generator.spec.task != "text-inpainting":
        return {}
    return {"image": image_of(scene), "mask_image": mask_image(hole(index))}
