"""Conditions of a model's UNet for rows of a corpus: context, concatenated channels, or both.

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
from models.shapes.catalog.models import TrainedModel
from models.shapes.data.labels import label_of, scene_map
from models.shapes.evaluation.scores import shrink
from models.shapes.training.bert_text import caption_tokens, load_words
from models.shapes.training.corpus import Corpus
from models.shapes.training.layouts import load_layouts, shuffled_layouts, tokens_of
from models.shapes.training.precision import autocast

_ORDERS_SEED = 6
_BATCH = 256


class Condition(NamedTuple):
    """Inputs of the UNet in addition to noisy latents: (B, T, D) and (B, C, 16, 16), or None."""

    context: Tensor | None = None
    concat: Tensor | None = None


#: Maps the trained conditioner, if the model has one, rows of the corpus (B,) and which of them
#: are dropped (B,), to a condition.
Conditions = Callable[[nn.Module | None, Tensor, Tensor], Condition]


def open_conditions(model: TrainedModel, corpus: Corpus) -> Conditions:
    """Return a function that makes the conditions of a corpus."""
    return _OPENERS[model.task](model, corpus)


def _nothing(_: TrainedModel, __: Corpus) -> Conditions:
    return lambda _conditioner, _rows, _dropped: Condition()


def _classes(model: TrainedModel, corpus: Corpus) -> Conditions:
    assert model.embedder is not None, "class-to-image has an embedder"
    null = model.embedder.null_class
    assert null is not None, "its last class is none"
    labels = torch.tensor([label_of(each.scene.things[0]) for each in corpus.prompts])

    def conditions(conditioner: nn.Module | None, rows: Tensor, dropped: Tensor) -> Condition:
        assert conditioner is not None, "the embedder is trained with the UNet"
        return Condition(context=conditioner(torch.where(dropped, null, labels[rows])))

    return conditions


def _captions(_: TrainedModel, corpus: Corpus) -> Conditions:
    tokens = caption_tokens([each.caption for each in corpus.prompts])
    return _encoded(load_words(), tokens)


def _layouts(_: TrainedModel, corpus: Corpus) -> Conditions:
    sampled = [each.scene for each in corpus.prompts]
    tokens = tokens_of([*shuffled_layouts(sampled, _ORDERS_SEED), []])
    return _encoded(load_layouts(), tokens)


def _encoded(encoder: BertTextEncoder, tokens: Tensor) -> Conditions:
    """Encode tokens (N + 1, T), the last row of which says nothing, once for all."""
    with torch.no_grad():
        parts = torch.split(tokens, _BATCH)
        contexts = torch.cat([encoder(part).bfloat16() for part in parts])

    def conditions(_: nn.Module | None, rows: Tensor, dropped: Tensor) -> Condition:
        chosen = torch.where(dropped, len(contexts) - 1, rows)
        return Condition(context=contexts[chosen].float())

    return conditions


def _maps(_: TrainedModel, corpus: Corpus) -> Conditions:
    maps = torch.from_numpy(np.stack([scene_map(each.scene) for each in corpus.prompts]))

    def conditions(conditioner: nn.Module | None, rows: Tensor, _: Tensor) -> Condition:
        assert conditioner is not None, "the segmentation encoder is trained with the UNet"
        return Condition(concat=conditioner(maps[rows].long()))

    return conditions


def _small_images(_: TrainedModel, corpus: Corpus) -> Conditions:
    small = np.stack([shrink(each.truth) for each in corpus.prompts])
    images = torch.from_numpy(small).movedim(3, 1)

    def conditions(_: nn.Module | None, rows: Tensor, __: Tensor) -> Condition:
        return Condition(concat=images[rows].float() / 127.5 - 1)

    return conditions


def _masked(_: TrainedModel, corpus: Corpus) -> Conditions:
    masked = corpus.masked
    assert masked is not None, "inpainting has masks"

    def conditions(_: nn.Module | None, rows: Tensor, __: Tensor) -> Condition:
        return Condition(concat=masked[rows])

    return conditions


_OPENERS: Mapping[Task, Callable[[TrainedModel, Corpus], Conditions]] = MappingProxyType(
    {
        "unconditional": _nothing,
        "class-to-image": _classes,
        "text-to-image": _captions,
        "layout-to-image": _layouts,
        "semantic-synthesis": _maps,
        "super-resolution": _small_images,
        "inpainting": _masked,
    }
)


def predict_with(unet: nn.Module, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that predicts v from noisy latents and timesteps under a condition."""

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        inputs = [noisy] if condition.concat is None else [noisy, condition.concat]
        with autocast():
            prediction: Tensor = unet(torch.cat(inputs, dim=1), timesteps, condition.context)
        return prediction.float()

    return predict


def guided(
    unet: nn.Module, conditions: Sequence[Condition], scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that predicts v with guidance, of the condition and the empty one.

    Source: Ho and Salimans 2022 (arXiv:2207.12598), equation 6.
    """
    wanted, nothing = (predict_with(unet, each) for each in conditions)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        without = nothing(noisy, timesteps)
        return without + scale * (wanted(noisy, timesteps) - without)

    return predict
