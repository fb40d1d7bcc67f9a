"""The detector on rendered scenes whose content is known: the accuracy of its readings."""

import numpy as np

from models.shapes.data import scenes
from models.shapes.evaluation import detector
from models.shapes.evaluation.scoring import InputImage, match, score

DETECTOR_RENDERS = 2000
DETECTOR_GOAL = 0.99


_NEAR = 2.0  # pixels that a detection on a clean render may be off


def evaluate_detector(
    count: int, seed: int, *, noise: float = 0.0, blurs: int = 0
) -> dict[str, float]:
    """Return the share of renders, clean or degraded, that are read back without any mistake.

    Args:
        count: How many renders.
        seed: Of the scenes and the noise.
        noise: Standard deviation of added noise in grey levels.
        blurs: How many times to average each pixel with its neighbours first.
    """
    rng = np.random.default_rng(seed)
    sampled = [scenes.random_scene(rng) for _ in range(count)]
    readings = [detector.read_image(photograph(each, rng, noise, blurs)) for each in sampled]
    right = sum(map(_is_exact, sampled, readings))
    overlaps = [overlap for reading in readings for overlap in reading.overlaps]
    return {"images": count, "right": right / count, "lowest_overlap": min(overlaps, default=0)}


def photograph(
    scene: scenes.Scene, rng: np.random.Generator, noise: float, blurs: int
) -> InputImage:
    """Render a scene to uint8 through a bad lens: blurred (weights 1 2 1), then noisy."""
    image = scenes.render(scene) * 255
    for _ in range(blurs):
        image = detector.smooth(image)
    noisy = image + noise * rng.standard_normal(image.shape, np.float32)
    levels: InputImage = np.rint(np.clip(noisy, 0, 255)).astype(np.uint8)
    return levels


def _is_exact(scene: scenes.Scene, reading: detector.Reading) -> bool:
    """Tell whether a reading says everything of a scene, places included."""
    matched = match(scene.things, reading.things)
    near = all(
        found is not None
        and max(abs(found.x - thing.x), abs(found.y - thing.y)) < _NEAR
        and abs(found.radius - thing.radius) < _NEAR
        for thing, found in zip(scene.things, matched, strict=True)
    )
    return near and score(scene, reading).images_right == 1
