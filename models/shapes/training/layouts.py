"""The encoder of layouts, trained by itself to predict which label covers which part of the image.

Points are numbers of cells in a grid of 90 by 90, and a cell says nothing of its neighbours: 8,100
of them would have to be learned one by one. Their embeddings begin as sinusoids of the coordinates,
and the three tokens of an object share part of their position's embedding, so that what belongs
together is found at once. Then every token of an object has to tell, by a linear layer, the label,
the box and which cells of a coarse grid the box covers, which is what the UNet has to know.
"""

import math
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_export.networks.bert import BertTextEncoder
from ldm_runtime.inputs.layouts import LayoutObject, layout_tokens
from models.shapes.catalog.learning_rate import Cycle
from models.shapes.catalog.models import LAYOUT
from models.shapes.data import scenes
from models.shapes.data.labels import NUM_LABELS, box_of, label_features, label_of
from models.shapes.training.caption_encoder import load_trained
from models.shapes.training.trainer import Trainer

RUN = "layouts"
STEPS, BATCH = 1500, 64
NUM_SCENES, NUM_CHECKED = 12_000, 512
_SEED = 5
_TOKENS = 3  # an object
_SLOTS = (LAYOUT.max_tokens - 2) // _TOKENS
_GRID = math.isqrt(LAYOUT.vocab_size)
_PLACES = 128  # over which the context of a label is averaged
_CELLS = 8  # per side of the coarse grid
_BOX_WEIGHT, _CELL_WEIGHT = 4.0, 2.0


def scene_layout(scene: scenes.Scene, order: Sequence[int] | None = None) -> list[LayoutObject]:
    """Return the layout of a scene, in another order if one is given."""
    things = [scene.things[index] for index in order or range(len(scene.things))]
    return [LayoutObject(label=label_of(each), box=box_of(each)) for each in things]


def tokens_of(layouts: Sequence[Sequence[LayoutObject]]) -> Tensor:
    """Return tokens (N, 92) of layouts."""
    return torch.from_numpy(np.stack([layout_tokens(tuple(each), LAYOUT) for each in layouts]))


def shuffled_layouts(sampled: Sequence[scenes.Scene], seed: int) -> list[list[LayoutObject]]:
    """Return the layouts of scenes, objects in random order."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(scene.things)).tolist() for scene in sampled]
    return [scene_layout(scene, order) for scene, order in zip(sampled, orders, strict=True)]


def coordinate_features(width: int) -> Tensor:
    """Return sinusoids (8192, width) of where in the image the cell of a token is.

    Of the rows behind the last cell only the very last is ever used: none.
    """
    cells = torch.arange(LAYOUT.vocab_size)
    points = torch.stack([cells % _GRID, cells // _GRID], dim=1) / (_GRID - 1)
    waves = math.pi * 2.0 ** torch.linspace(0, 4, width // 4)
    angles = (points[:, :, None] * waves).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class DescribingLayouts(nn.Module):
    """The encoder with the three linear layers that only its training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.text = BertTextEncoder(LAYOUT)
        self.label = nn.Linear(LAYOUT.width, NUM_LABELS + 1)
        self.box = nn.Linear(LAYOUT.width, 4)
        self.cells = nn.Linear(LAYOUT.width, _CELLS**2)
        with torch.no_grad():
            tokens = self.text.transformer.token_emb.weight
            tokens.copy_(coordinate_features(LAYOUT.width))
            # Labels have the numbers of cells in the top row, of which they must not look like.
            looks = label_features(LAYOUT.width, np.random.default_rng(_SEED))
            tokens[:NUM_LABELS] += 1.5 * torch.from_numpy(looks)
            tokens[-1] = torch.randn(LAYOUT.width)
            slots = 0.7 * torch.randn(_SLOTS + 1, 1, LAYOUT.width)
            roles = 0.7 * torch.randn(1, _TOKENS, LAYOUT.width)
            places = (slots + roles).flatten(0, 1)[: LAYOUT.max_tokens]
            self.text.transformer.pos_emb.emb.weight.copy_(places)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return predictions of each object's tokens in layouts (B, 92): label, box and cells."""
        context = self.text(tokens)[:, : _TOKENS * _SLOTS]
        return self.label(context), self.box(context), self.cells(context)


def answers_of(layouts: Sequence[Sequence[LayoutObject]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the answers for each slot: labels (N, 30), boxes (N, 30, 4) and cells."""
    labels = torch.full((len(layouts), _SLOTS), NUM_LABELS)
    boxes = torch.zeros(len(layouts), _SLOTS, 4)
    for row, layout in enumerate(layouts):
        for slot, each in enumerate(layout):
            labels[row, slot] = each.number
            boxes[row, slot] = torch.tensor(each.box)
    edges = torch.arange(_CELLS + 1) / _CELLS
    left, top, right, bottom = (side[..., None] for side in boxes.unbind(2))
    across = (left < edges[1:]) & (right > edges[:-1])
    down = (top < edges[1:]) & (bottom > edges[:-1])
    cells = (down[..., :, None] & across[..., None, :]).flatten(2)
    return labels, boxes, cells.float()


def train_layouts() -> None:
    """Train the encoder of layouts."""
    source = scenes.random_scenes(np.random.default_rng(_SEED), held_out=False)
    layouts = shuffled_layouts(list(islice(source, NUM_SCENES)), _SEED)
    tokens, answers = tokens_of(layouts), answers_of(layouts)
    torch.manual_seed(0)
    model = DescribingLayouts()
    trainer = Trainer(RUN, model, Cycle(end=STEPS))
    trained = len(tokens) - NUM_CHECKED

    def loss_at(_: int) -> Tensor:
        rows = torch.randint(trained, (BATCH,))
        wanted = [each[rows].repeat_interleave(_TOKENS, dim=1) for each in answers]
        return _loss(model(tokens[rows]), wanted[0], wanted[1], wanted[2])

    @torch.no_grad()
    def check() -> dict[str, float]:
        label, box, cells = (each[:, ::_TOKENS] for each in model(tokens[trained:]))
        labels, boxes, covered = (each[trained:] for each in answers)
        there = labels < NUM_LABELS
        return {
            "labels_right": (label.argmax(2) == labels)[there].float().mean().item(),
            "box_error": (box - boxes)[there].abs().mean().item(),
            "cells_right": ((cells > 0) == (covered > 0.5))[there].float().mean().item(),
        }

    with sdpa_kernel(SDPBackend.MATH):
        trainer.run(loss_at, check)


def _loss(
    said: tuple[Tensor, Tensor, Tensor], labels: Tensor, boxes: Tensor, cells: Tensor
) -> Tensor:
    label, box, covered = said
    there = labels < NUM_LABELS
    of_labels = F.cross_entropy(label.flatten(0, 1), labels.flatten())
    of_objects = F.cross_entropy(label[there], labels[there])
    of_boxes = F.l1_loss(box[there], boxes[there])
    of_cells = F.binary_cross_entropy_with_logits(covered[there], cells[there])
    return of_labels + of_objects + _BOX_WEIGHT * of_boxes + _CELL_WEIGHT * of_cells


def load_layouts() -> BertTextEncoder:
    """Return the trained encoder of layouts."""
    return load_trained(RUN, BertTextEncoder(LAYOUT))


@torch.no_grad()
def label_contexts() -> Tensor:
    """Return the contexts of every label, averaged over places, and of none, (25, 64).

    Means over the places of a thing in scenes, of the first of its three tokens.
    """
    encoder = load_layouts()
    source = scenes.random_scenes(np.random.default_rng(_SEED), held_out=False)
    boxes = [box_of(scene.things[0]) for scene in islice(source, _PLACES)]
    contexts = [
        encoder(tokens_of([[LayoutObject(label=label, box=box)] for box in boxes]))[:, 0].mean(0)
        for label in range(NUM_LABELS)
    ]
    return torch.stack([*contexts, encoder(tokens_of([[]]))[0, 0]])
