"""Conditions of the models without captions, made of scenes: labels, boxes and class maps.

A label is a kind and a colour, one number from 0 to 23. A class map has a number for every pixel:
first the backgrounds, plain and with a gradient, then the labels of what lies on them.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from models.shapes.data import scenes

ClassIds = npt.NDArray[np.uint8]
#: Left, top, right, bottom; 0 to 1.
Box = tuple[float, float, float, float]

_KINDS, _COLORS = tuple(scenes.SHAPES), tuple(scenes.COLORS)
_BACKGROUNDS = tuple(scenes.BACKGROUNDS)
NUM_LABELS = len(_KINDS) * len(_COLORS)
NUM_BACKGROUNDS = 2 * len(_BACKGROUNDS)
#: Classes of a pixel.
NUM_CLASSES = NUM_BACKGROUNDS + NUM_LABELS
_COVERED = 0.5  # share of a pixel from which it belongs to what covers it

#: How far a shape of half extent 1 reaches from its centre: left, up, right, down.
_EXTENTS: Mapping[str, Box] = MappingProxyType(
    {
        "circle": (1.0, 1.0, 1.0, 1.0),
        "square": (0.9, 0.9, 0.9, 0.9),
        "triangle": (1.04, 1.0, 1.04, 0.8),
        "cross": (1.0, 1.0, 1.0, 1.0),
    }
)


def label_of(thing: scenes.Thing) -> int:
    """Return the label of a thing, 0 to `NUM_LABELS` - 1."""
    return _KINDS.index(thing.kind) * len(_COLORS) + _COLORS.index(thing.color)


def looks_of(label: int) -> tuple[str, str]:
    """Return the kind and the colour that a label stands for."""
    return _KINDS[label // len(_COLORS)], _COLORS[label % len(_COLORS)]


def label_names() -> list[str]:
    """Return the names of the labels, such as "red circle", in order."""
    return [" ".join(reversed(looks_of(label))) for label in range(NUM_LABELS)]


def label_features(width: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Return initial embeddings (NUM_LABELS, width) of labels, standard normal.

    Each is the sum of a vector for its kind and one for its colour: what is learned of a kind in
    one colour then holds for it in the others.
    """
    kinds = rng.standard_normal((len(_KINDS), 1, width))
    colors = rng.standard_normal((1, len(_COLORS), width))
    features: npt.NDArray[np.float32] = ((kinds + colors) / np.sqrt(2)).astype(np.float32)
    return features.reshape(NUM_LABELS, width)


def box_of(thing: scenes.Thing) -> Box:
    """Return the smallest box around a thing, in shares of the image's sides."""
    left, up, right, down = (thing.radius * each for each in _EXTENTS[thing.kind])
    sides = (thing.x - left, thing.y - up, thing.x + right, thing.y + down)
    inside = tuple(min(max(side / scenes.SIZE, 0.0), 1.0) for side in sides)
    return inside[0], inside[1], inside[2], inside[3]


def overlap_of(first: Box, second: Box) -> float:
    """Return the intersection of two boxes over their union, 0 to 1."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (sum(areas) - shared) if shared else 0.0


def background_class(background: str, *, gradient: bool) -> int:
    """Return the class of a background's pixels."""
    return 2 * _BACKGROUNDS.index(background) + int(gradient)


def class_names() -> list[str]:
    """Return the names of the classes of pixels, such as "white gradient", in order."""
    backgrounds = [f"{name}{kind}" for name in _BACKGROUNDS for kind in (" plain", " gradient")]
    return [*backgrounds, *label_names()]


def class_map(things: Iterable[scenes.Thing], background: str, *, gradient: bool) -> ClassIds:
    """Return the class (SIZE, SIZE) of every pixel of a scene, or of a reading of an image."""
    ids = np.full((scenes.SIZE, scenes.SIZE), background_class(background, gradient=gradient))
    for thing in things:
        ids[scenes.coverage(thing) >= _COVERED] = NUM_BACKGROUNDS + label_of(thing)
    return ids.astype(np.uint8)


def scene_map(scene: scenes.Scene) -> ClassIds:
    """Return the class (SIZE, SIZE) of every pixel of a scene."""
    return class_map(scene.things, scene.background, gradient=scene.gradient)


def class_colors() -> npt.NDArray[np.float32]:
    """Return a colour (NUM_CLASSES, 3) for every class, from -1 to 1.

    Gradients end in another grey than they begin with; halfway is theirs, which tells them from
    plain backgrounds. Kinds of a colour share it: outlines say what they are.
    """
    grays = [
        scenes.backdrop(name, gradient=gradient).mean()
        for name in _BACKGROUNDS
        for gradient in (False, True)
    ]
    colors = [scenes.COLORS[looks_of(label)[1]] for label in range(NUM_LABELS)]
    levels = np.array([(gray, gray, gray) for gray in grays] + colors, np.float32)
    scaled: npt.NDArray[np.float32] = levels / np.float32(127.5) - np.float32(1)
    return scaled
