"""Procedural scenes: small images of coloured shapes, and captions that describe them.

A scene is a record; `render` rasterises it with anti-aliased edges and `caption` describes it in
English. Everything is derived from a NumPy generator, so a seed names a data set.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SIZE = 64

#: RGB of the shapes. Hues are at least 40 degrees apart, so that an image can be read back.
COLORS: Mapping[str, tuple[int, int, int]] = {
    "red": (222, 40, 44),
    "green": (36, 168, 60),
    "blue": (40, 76, 224),
    "yellow": (240, 212, 36),
    "purple": (156, 48, 196),
    "cyan": (48, 204, 220),
}
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (244, 244, 244),
    "gray": (132, 132, 132),
    "black": (22, 22, 22),
}
#: Half the extent of a shape in pixels, lowest and highest.
SIZES: Mapping[str, tuple[float, float]] = {"small": (6.0, 7.5), "large": (11.0, 12.5)}
#: Direction from the first object named to the second: (x, y), y pointing down.
RELATIONS: Mapping[str, tuple[int, int]] = {
    "left of": (1, 0),
    "right of": (-1, 0),
    "above": (0, 1),
    "below": (0, -1),
}
_GRADIENT = 56  # grey levels between the top and the bottom of a gradient background
_HELD_OUT_SHARE = 16  # one caption in this many is never trained on

Image = npt.NDArray[np.float32]


class Thing(NamedTuple):
    """One shape: kind, colour, which size class, where (pixels) and how big (half extent)."""

    kind: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One to three things on a background.

    Attributes:
        things: The first is the one the relations start from.
        relations: `relations[i]` leads from things[0] to things[i + 1].
        background: Name of its colour.
        gradient: Whether the background grows darker (or, if black, lighter) towards the bottom.
    """

    things: tuple[Thing, ...]
    relations: tuple[str, ...]
    background: str
    gradient: bool


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The features that a caption tells of a scene, in addition to kinds and colours.

    Attributes:
        sizes: Whether things are called small or large.
        relations: Whether it tells where things are; "and" stands between them otherwise.
        background: Whether it tells the colour of the background, and its gradient.
    """

    sizes: bool = True
    relations: bool = True
    background: bool = True


FULL = Wording()
#: "a red circle", "a red circle and a blue square".
SHORT = Wording(sizes=False, relations=False, background=False)


def caption(scene: Scene, wording: Wording = FULL) -> str:
    """Return e.g. "a large red circle left of a small blue square on a white background"."""
    names = [
        f"a {thing.size} {thing.color} {thing.kind}"
        if wording.sizes
        else f"a {thing.color} {thing.kind}"
        for thing in scene.things
    ]
    if wording.relations:
        parts = [
            f"{relation} {name}" for relation, name in zip(scene.relations, names[1:], strict=True)
        ]
        objects = " ".join([names[0], " and ".join(parts)]).strip()
    else:
        objects = " and ".join(names)
    if not wording.background:
        return objects
    gradient = " gradient" if scene.gradient else ""
    return f"{objects} on a {scene.background}{gradient} background"


def random_wording(rng: np.random.Generator) -> Wording:
    """Sample a wording: half of them tell everything, a quarter nothing more than they must."""
    style = rng.random()
    if style < 0.5:
        return FULL
    if style < 0.75:
        return SHORT
    sizes, relations, background = (bool(flag) for flag in rng.random(3) < 0.5)
    return Wording(sizes=sizes, relations=relations, background=background)


def is_held_out(text: str) -> bool:
    """Tell whether a caption is kept for evaluation and never trained on."""
    return zlib.crc32(text.encode()) % _HELD_OUT_SHARE == 0


def random_scenes(rng: np.random.Generator, *, held_out: bool) -> Iterator[Scene]:
    """Yield scenes without end, either only with held-out captions or only with the others."""
    while True:
        scene = random_scene(rng)
        if is_held_out(caption(scene)) == held_out:
            yield scene


def random_scene(rng: np.random.Generator) -> Scene:
    """Sample one scene; things do not touch, and no two share both kind and colour."""
    count = int(rng.choice([1, 2, 3], p=[0.3, 0.45, 0.25]))
    while True:
        relations = _random_relations(rng, count - 1)
        things = tuple(_random_thing(rng) for _ in range(count))
        if is_possible(things, relations):
            break
    background = _pick(rng, tuple(BACKGROUNDS))
    return Scene(
        things=things,
        relations=relations,
        background=background,
        gradient=bool(rng.random() < 1 / 3),
    )


def render(scene: Scene) -> Image:
    """Return the image (SIZE, SIZE, 3) in [0, 1]."""
    image = np.repeat(backdrop(scene.background, gradient=scene.gradient)[..., None], 3, axis=2)
    for thing in scene.things:
        share = coverage(thing)[..., None]
        image += share * (np.array(COLORS[thing.color], np.float32) - image)
    return image / np.float32(255)


def backdrop(background: str, *, gradient: bool) -> Image:
    """Return the grey levels (SIZE, SIZE) of a background, 0 to 255."""
    level = np.float32(BACKGROUNDS[background][0])  # all three are grey
    rows = np.linspace(0, _GRADIENT, SIZE, dtype=np.float32)[:, None]
    slope = 0.0 if not gradient else (1.0 if background == "black" else -1.0)
    return np.broadcast_to(level + slope * rows, (SIZE, SIZE)).astype(np.float32)


def coverage(thing: Thing) -> Image:
    """Return the share (SIZE, SIZE) of each pixel that a thing covers, 0 to 1."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
    distance = SHAPES[thing.kind]((x - thing.x) / thing.radius, (y - thing.y) / thing.radius)
    share: Image = np.clip(0.5 - distance * thing.radius, 0, 1)
    return share


def _circle(x: Image, y: Image) -> Image:
    distance: Image = np.hypot(x, y) - np.float32(1)
    return distance


def _square(x: Image, y: Image) -> Image:
    distance: Image = np.maximum(abs(x), abs(y)) - np.float32(0.9)
    return distance


def _triangle(x: Image, y: Image) -> Image:
    """Point up: base at y = 0.8, apex at y = -1."""
    height, half_base = 1.8, 1.04
    norm = np.hypot(height, half_base)
    side = (abs(x) * height - (y + 1) * half_base) / norm
    distance: Image = np.maximum(side, y - np.float32(0.8)).astype(np.float32)
    return distance


def _cross(x: Image, y: Image) -> Image:
    long, short = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    distance: Image = np.maximum(long - np.float32(1), short - np.float32(0.34))
    return distance


#: Signed distance (in half extents, negative inside) of a point from each kind of shape.
SHAPES: Mapping[str, Callable[[Image, Image], Image]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}


def _random_thing(rng: np.random.Generator) -> Thing:
    size = _pick(rng, tuple(SIZES))
    radius = _uniform(rng, *SIZES[size])
    x = _uniform(rng, radius + 2, SIZE - radius - 2)
    y = _uniform(rng, radius + 2, SIZE - radius - 2)
    kind, color = _pick(rng, tuple(SHAPES)), _pick(rng, tuple(COLORS))
    return Thing(kind=kind, color=color, size=size, x=x, y=y, radius=radius)


def _random_relations(rng: np.random.Generator, count: int) -> tuple[str, ...]:
    """Sample relations; of two, one is horizontal and one vertical, so that both can be read."""
    if count == 2:
        pair = [_pick(rng, ("left of", "right of")), _pick(rng, ("above", "below"))]
        return tuple(str(relation) for relation in rng.permutation(pair))
    return tuple(_pick(rng, tuple(RELATIONS)) for _ in range(count))


# Scenes are sampled by rejection; these return what `rng.choice` and `rng.uniform` would, sooner.
def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def is_possible(things: tuple[Thing, ...], relations: tuple[str, ...]) -> bool:
    """Return whether all relations of a scene's things hold, without their overlapping."""
    if not all(map(_holds, relations, things[1:], [things[0]] * 2)):
        return False
    looks = {(thing.kind, thing.color) for thing in things}
    apart = all(
        math.hypot(a.x - b.x, a.y - b.y) > 1.15 * (a.radius + b.radius) + 2
        for index, a in enumerate(things)
        for b in things[:index]
    )
    return len(looks) == len(things) and apart


def _holds(relation: str, other: Thing, first: Thing) -> bool:
    """Tell whether `relation` leads from `first` to `other` clearly: along it more than across."""
    toward_x, toward_y = RELATIONS[relation]
    dx, dy = other.x - first.x, other.y - first.y
    along = dx * toward_x + dy * toward_y
    across = abs(dx * toward_y) + abs(dy * toward_x)
    return bool(along > 12 and along > 1.5 * across)
