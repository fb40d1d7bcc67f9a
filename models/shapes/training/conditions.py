"""What the rows of a corpus feed a system's UNet: a context, channels behind the latents, or both.

A dropped row gets the condition that says nothing: the null class, the layout without objects, the
empty caption.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldm_export.networks.bert import BertTextEncoder
from ldm_runtime.specs.model import Task
from models.shapes.catalog.systems import System
from models.shapes.data import scenes
from models.shapes.data.labels import label_of, scene_map
from models.shapes.evaluation.scores import shrink
from models.shapes.training.bert_text import caption_tokens, load_words
from models.shapes.training.corpus import Corpus
from models.shapes.training.layouts import load_layouts, shuffled_layouts, tokens_of

_ORDERS_SEED = 6
_BATCH = 256


class Condition(NamedTuple):
    """What the UNet gets besides noisy latents: (B, T, D) and (B, C, 16, 16), or None."""

    context: Tensor | None = None
    concat: Tensor | None = None


#: Maps the trained conditioner, if the system has one, rows of the corpus (B,) and which of them
#: are dropped (B,), to a condition.
Conditions = Callable[[nn.Module | None, Tensor, Tensor], Condition]


def open_conditions(system: System, corpus: Corpus) -> Conditions:
    """Return what makes the conditions of a corpus."""
    return _OPENERS[system.task](system, corpus)


def _nothing(_: System, __: Corpus) -> Conditions:
    return lambda _conditioner, _rows, _dropped: Condition()


def _classes(system: System, corpus: Corpus) -> Conditions:
    assert system.embedder is not None, "class-to-image has an embedder"
    null = system.embedder.null_class
    assert null is not None, "its last class is none"
    labels = torch.tensor([label_of(each.scene.things[0]) for each in corpus.questions])

    def conditions(conditioner: nn.Module | None, rows: Tensor, dropped: Tensor) -> Condition:
        assert conditioner is not None, "the embedder is trained with the UNet"
        return Condition(context=conditioner(torch.where(dropped, null, labels[rows])))

    return conditions


def _captions(_: System, corpus: Corpus) -> Conditions:
    tokens = caption_tokens([scenes.caption(each.scene) for each in corpus.questions])
    return _encoded(load_words(), tokens)


def _layouts(_: System, corpus: Corpus) -> Conditions:
    drawn = [each.scene for each in corpus.questions]
    tokens = tokens_of([*shuffled_layouts(drawn, _ORDERS_SEED), []])
    return _encoded(load_layouts(), tokens)


def _encoded(encoder: BertTextEncoder, tokens: Tensor) -> Conditions:
    """Encode tokens (N + 1, T), the last row of which says nothing, once for all."""
    with torch.no_grad():
        parts = torch.split(tokens, _BATCH)
        contexts = torch.cat([encoder(part).bfloat16() for part in parts])

    def conditions(_: nn.Module | None, rows: Tensor, dropped: Tensor) -> Condition:
        return Condition(context=contexts[torch.where(dropped, len(contexts) - 1, rows)])

    return conditions


def _maps(_: System, corpus: Corpus) -> Conditions:
    maps = torch.from_numpy(np.stack([scene_map(each.scene) for each in corpus.questions]))

    def conditions(conditioner: nn.Module | None, rows: Tensor, _: Tensor) -> Condition:
        assert conditioner is not None, "the rescaler is trained with the UNet"
        return Condition(concat=conditioner(maps[rows].long()))

    return conditions


def _small_pictures(_: System, corpus: Corpus) -> Conditions:
    small = np.stack([shrink(each.truth) for each in corpus.questions])
    pictures = torch.from_numpy(small).movedim(3, 1)

    def conditions(_: nn.Module | None, rows: Tensor, __: Tensor) -> Condition:
        return Condition(concat=pictures[rows].float() / 127.5 - 1)

    return conditions


def _holes(_: System, corpus: Corpus) -> Conditions:
    masked = corpus.masked
    assert masked is not None, "inpainting has holes"

    def conditions(_: nn.Module | None, rows: Tensor, __: Tensor) -> Condition:
        return Condition(concat=masked[rows])

    return conditions


_OPENERS: Mapping[Task, Callable[[System, Corpus], Conditions]] = MappingProxyType(
    {
        "unconditional": _nothing,
        "class-to-image": _classes,
        "text-to-image": _captions,
        "layout-to-image": _layouts,
        "semantic-synthesis": _maps,
        "super-resolution": _small_pictures,
        "inpainting": _holes,
    }
)


def predict_with(unet: nn.Module, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what predicts v from noisy latents and timesteps under a condition."""

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        inputs = [noisy] if condition.concat is None else [noisy, condition.concat]
        with torch.autocast("cpu", torch.bfloat16):
            prediction: Tensor = unet(torch.cat(inputs, dim=1), timesteps, condition.context)
        return prediction.float()

    return predict


def guided(
    unet: nn.Module, conditions: Sequence[Condition], scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what predicts v with guidance, of the condition and of the one that says nothing.

    Source: Ho and Salimans 2022 (arXiv:2207.12598), equation 6.
    """
    wanted, nothing = (predict_with(unet, each) for each in conditions)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        without = nothing(noisy, timesteps)
        return without + scale * (wanted(noisy, timesteps) - without)

    return predict
