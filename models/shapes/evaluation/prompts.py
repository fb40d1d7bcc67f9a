"""The prompts of every cell of a sweep: held-out captions, and right images to compare with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from models.shapes.data import scenes
from models.shapes.evaluation import frechet, held_out

Images = npt.NDArray[np.uint8]

#: Right images of each caption.
LAYOUTS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptSet:
    """The prompts of every cell, and the images that its own are compared with.

    Attributes:
        wanted: The scenes whose captions are the prompts.
        reference: The distribution of the features of right images.
        floor: Distance of the wanted scenes' own renders from it.
    """

    wanted: Sequence[scenes.Scene]
    reference: frechet.Gaussian
    floor: float


def prepare_prompts(captions: int) -> PromptSet:
    """Return the prompts: the same for every sweep with as many captions."""
    wanted = held_out.held_out_scenes(captions, held_out.SEED)
    reference = reference_of(wanted)
    return PromptSet(
        wanted=wanted, reference=reference, floor=distance_from(reference, renders(wanted))
    )


def another_layout(rng: np.random.Generator, scene: scenes.Scene) -> scenes.Scene:
    """Return a scene with the same caption and everything in other places."""
    while True:
        things = tuple(_elsewhere(rng, thing) for thing in scene.things)
        if scenes.is_possible(things, scene.relations):
            return replace(scene, things=things)


def _elsewhere(rng: np.random.Generator, thing: scenes.Thing) -> scenes.Thing:
    radius = rng.uniform(*scenes.SIZES[thing.size])
    x, y = rng.uniform(radius + 2, scenes.SIZE - radius - 2, size=2)
    return thing._replace(x=x, y=y, radius=radius)


def renders(sampled: Sequence[scenes.Scene]) -> Images:
    """Return the images (N, 64, 64, 3) of scenes."""
    return np.stack([np.rint(scenes.render(each) * 255).astype(np.uint8) for each in sampled])


def reference_of(wanted: Sequence[scenes.Scene]) -> frechet.Gaussian:
    """Return the distribution of right images for the captions of scenes: `LAYOUTS` of each.

    Of the same captions, because other captions have other colours, which would be most of the
    distance between two small sets.
    """
    rng = np.random.default_rng(held_out.SEED)
    sampled = [another_layout(rng, each) for each in wanted for _ in range(LAYOUTS)]
    return frechet.fit(frechet.features_of(renders(sampled)))


def distance_from(reference: frechet.Gaussian, images: Images) -> float:
    """Return the Fréchet distance of images (N, 64, 64, 3) from right ones."""
    return frechet.distance(frechet.fit(frechet.features_of(images)), reference)
