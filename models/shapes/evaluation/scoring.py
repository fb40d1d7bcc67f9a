"""Scores of an image generated from a caption: its content against the caption."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import numpy.typing as npt

from models.shapes.data import scenes
from models.shapes.evaluation import detector

#: RGB (64, 64, 3).
InputImage = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Counts of what was asked for, and of what is right.

    Attributes:
        images: Images scored.
        images_right: Those with every object, size, relation and the background right, every
            shape clear, and nothing else.
        objects: Objects asked for.
        objects_right: Those with a detection of the same kind and colour.
        sizes_right: Objects right that also have the right size.
        relations: Relations asked for.
        relations_scored: Those whose two objects were both found.
        relations_right: Relations scored that hold.
        backgrounds_right: Images with the right colour of background.
        gradients_right: Images with a gradient exactly if asked for.
        extra: Things detected that the caption lacks.
    """

    images: int = 0
    images_right: int = 0
    objects: int = 0
    objects_right: int = 0
    sizes_right: int = 0
    relations: int = 0
    relations_scored: int = 0
    relations_right: int = 0
    backgrounds_right: int = 0
    gradients_right: int = 0
    extra: int = 0

    def __add__(self, other: Self) -> "Tally":
        names = [field.name for field in fields(self)]
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def shares(self) -> dict[str, float | None]:
        """Return the shares that are right; None where there was nothing to get right.

        An object or relation counts as wrong if anything it needs was not found, except in
        `relations_of_found_objects`.
        """
        pairs = {
            "objects": (self.objects_right, self.objects),
            "relations": (self.relations_right, self.relations),
            "relations_of_found_objects": (self.relations_right, self.relations_scored),
            "sizes": (self.sizes_right, self.objects),
            "backgrounds": (self.backgrounds_right, self.images),
            "gradients": (self.gradients_right, self.images),
            "whole_images": (self.images_right, self.images),
        }
        return {name: right / of if of else None for name, (right, of) in pairs.items()}


def match(
    wanted: Iterable[scenes.Thing], found: Iterable[scenes.Thing]
) -> list[scenes.Thing | None]:
    """Return for each thing wanted one found with its kind and colour, or None; each used once.

    Of several, one of the right size is preferred, then the earlier.
    """
    left = list(found)
    matched: list[scenes.Thing | None] = []
    for thing in wanted:
        alike = [each for each in left if (each.kind, each.color) == (thing.kind, thing.color)]
        same_size = [each for each in alike if each.size == thing.size]
        best = next(iter(same_size + alike), None)
        matched.append(best)
        if best is not None:
            left.remove(best)
    return matched


def relation_holds(relation: str, first: scenes.Thing, other: scenes.Thing) -> bool:
    """Tell whether `first` is e.g. left of `other`: that way, and more that way than across."""
    toward_x, toward_y = scenes.RELATIONS[relation]
    dx, dy = other.x - first.x, other.y - first.y
    return dx * toward_x + dy * toward_y > abs(dx * toward_y) + abs(dy * toward_x)


def score(
    scene: scenes.Scene, reading: detector.Reading, wording: scenes.Wording = scenes.FULL
) -> Tally:
    """Compare a scene with the content of its image; what its caption does not tell is right."""
    matched = match(scene.things, reading.things)
    found = [thing for thing in matched if thing is not None]
    relations = scene.relations if wording.relations else ()
    related = [
        relation_holds(relation, matched[0], other)
        for relation, other in zip(relations, matched[1:], strict=False)
        if matched[0] is not None and other is not None
    ]
    sizes_right = sum(
        thing is not None and (thing.size == wanted.size or not wording.sizes)
        for wanted, thing in zip(scene.things, matched, strict=True)
    )
    background = reading.background == scene.background or not wording.background
    gradient = reading.gradient == scene.gradient or not wording.background
    extra = len(reading.things) - len(found)
    whole = (
        sizes_right == len(scene.things)
        and sum(related) == len(relations)
        and (background and gradient and not extra and reading.is_clean)
    )
    return Tally(
        images=1,
        images_right=int(whole),
        objects=len(scene.things),
        objects_right=len(found),
        sizes_right=sizes_right,
        relations=len(relations),
        relations_scored=len(related),
        relations_right=sum(related),
        backgrounds_right=int(background),
        gradients_right=int(gradient),
        extra=extra,
    )


def score_all(
    wanted: Sequence[scenes.Scene],
    images: Sequence[InputImage],
    wording: scenes.Wording = scenes.FULL,
) -> Tally:
    """Read the images and compare each with its scene, as far as its caption tells that."""
    readings = map(detector.read_image, images)
    pairs = zip(wanted, readings, strict=True)
    return sum((score(scene, reading, wording) for scene, reading in pairs), Tally())


def table(tally: Tally) -> str:
    """Return the counts and shares as text, a row each."""
    rows = {
        "objects (kind and colour)": ("objects", tally.objects_right, tally.objects),
        "relations": ("relations", tally.relations_right, tally.relations),
        "  of objects found": (
            "relations_of_found_objects",
            tally.relations_right,
            tally.relations_scored,
        ),
        "sizes": ("sizes", tally.sizes_right, tally.objects),
        "background colours": ("backgrounds", tally.backgrounds_right, tally.images),
        "gradient or plain": ("gradients", tally.gradients_right, tally.images),
        "whole images": ("whole_images", tally.images_right, tally.images),
    }
    shares = tally.shares()
    lines = [f"{'':27}{'right':>7}{'of':>6}{'share':>9}"]
    for label, (key, right, count) in rows.items():
        share = shares[key]
        lines.append(f"{label:27}{right:7}{count:6}{'-' if share is None else f'{share:.1%}':>9}")
    lines.append(f"{'things not asked for':27}{tally.extra:7}")
    return "\n".join(lines)
