"""Supervision of caption encoders: attributes of a scene, to be predicted from its caption."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.shapes.data import scenes

NUM_CAPTIONS, NUM_CHECKED = 20_000, 512
_SLOTS = 3
#: Number of answers to each attribute of a thing: kind, colour, size, relation; the last is none.
_THING = tuple(len(names) + 1 for names in (scenes.SHAPES, scenes.COLORS, scenes.SIZES))
ANSWERS = (*_THING, len(scenes.RELATIONS) + 1)
SCENE_ANSWERS = (*(_SLOTS * ANSWERS), len(scenes.BACKGROUNDS), 2)
NOT_ASKED = -100


@dataclass(frozen=True, kw_only=True)
class CaptionSupervision:
    """Captions and the answers to predict from them.

    Attributes:
        tokens: (N, 77).
        ends: Index of the first end token, (N,).
        scenes: Answers about the whole scene, (N, attributes).
        nouns: Answers about the thing a token names, (N, 77, attributes), or -100.
    """

    tokens: Tensor
    ends: Tensor
    scenes: Tensor
    nouns: Tensor


def about_things(
    scene: scenes.Scene, wording: scenes.Wording = scenes.FULL
) -> list[tuple[int, ...]]:
    """Return the answers about each thing of a scene that its caption tells, or NOT_ASKED."""
    names = (scenes.SHAPES, scenes.COLORS, scenes.SIZES, scenes.RELATIONS)
    places = [{name: index for index, name in enumerate(each)} for each in names]
    relations = ("", *scene.relations)
    return [
        (
            places[0][thing.kind],
            places[1][thing.color],
            places[2][thing.size] if wording.sizes else NOT_ASKED,
            places[3].get(relation, len(scenes.RELATIONS))
            if wording.relations or not relation
            else NOT_ASKED,
        )
        for thing, relation in zip(scene.things, relations, strict=True)
    ]


def about_scene(scene: scenes.Scene, wording: scenes.Wording = scenes.FULL) -> list[int]:
    """Return the answers about a whole scene, those about things that are not there included."""
    nothing = tuple(count - 1 for count in ANSWERS)
    things = about_things(scene, wording)
    things += [nothing] * (_SLOTS - len(things))
    backdrop = (list(scenes.BACKGROUNDS).index(scene.background), int(scene.gradient))
    told = backdrop if wording.background else (NOT_ASKED, NOT_ASKED)
    return [*(answer for thing in things for answer in thing), *told]


def answers_loss(logits: Tensor, sizes: Sequence[int], answers: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (N, sum of sizes) for answers (N, Q)."""
    parts = torch.split(logits, list(sizes), 1)
    losses = [
        F.cross_entropy(part, answers[:, index], ignore_index=NOT_ASKED)
        for index, part in enumerate(parts)
    ]
    return torch.stack(losses).mean()
