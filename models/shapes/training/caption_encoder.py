"""Training of a text encoder by itself, on captions and the scenes that they describe.

Every token from the end of a caption on has to tell the whole scene through a linear layer, and
every noun the thing that it names. Trained together with the UNet from nothing, an encoder told
"left" from "right" only after hours, because a UNet that ignores its context teaches nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_runtime.specs.networks import TextEncoderSpec
from ldm_runtime.text import Tokenizer
from models.shapes.catalog.learning_rate import Cycle
from models.shapes.data import scenes
from models.shapes.training.autoencoder import under
from models.shapes.training.caption_supervision import (
    ANSWERS,
    NOT_ASKED,
    NUM_CAPTIONS,
    NUM_CHECKED,
    SCENE_ANSWERS,
    CaptionSupervision,
    about_scene,
    about_things,
    answers_loss,
)
from models.shapes.training.trainer import WORK, Trainer

_Encoder = TypeVar("_Encoder", bound=nn.Module)

_BATCH = 64
_WORDINGS_SEED = 8


@dataclass(frozen=True, kw_only=True)
class CaptionEncoder:
    """A kind of text encoder, and how it is trained.

    Attributes:
        run: Its name in the log and in the folder of work.
        record: Its hyperparameters.
        open_tokenizer: Returns its tokenizer.
        build: Makes the network.
        embeddings: Returns its token and position embeddings, whose initial values are random.
        end_of: Returns the index of the end token of each row of token ids, (N,).
        cycles: Training steps, and their learning rates.
        seed: Of the captions.
    """

    run: str
    record: TextEncoderSpec
    open_tokenizer: Callable[[], Tokenizer]
    build: Callable[[TextEncoderSpec], nn.Module]
    embeddings: Callable[[nn.Module], tuple[nn.Embedding, nn.Embedding]]
    end_of: Callable[[Tensor], Tensor]
    cycles: tuple[Cycle, ...]
    seed: int


class DescribingEncoder(nn.Module):
    """An encoder with the two linear layers that only its training needs."""

    def __init__(self, kind: CaptionEncoder) -> None:
        super().__init__()
        self.text = kind.build(kind.record)
        self.scene = nn.Linear(kind.record.width, sum(SCENE_ANSWERS))
        self.noun = nn.Linear(kind.record.width, sum(ANSWERS))
        tokens, positions = kind.embeddings(self.text)
        nn.init.normal_(tokens.weight, std=1.0)
        nn.init.normal_(positions.weight, std=0.3)

    def forward(self, tokens: Tensor, ends: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits about scenes and about nouns.

        Args:
            tokens: (B, 77).
            ends: Index of the end token, (B,).
            share: Which of the tokens from there on tells the scene: 0 the first, 1 the last.
        """
        context = self.text(tokens)
        places = ends + (share * (tokens.shape[1] - 1 - ends)).round().long()
        after = context[torch.arange(len(tokens)), places]
        return self.scene(after), self.noun(context.flatten(0, 1))


def caption_tokens(kind: CaptionEncoder, captions: Sequence[str]) -> Tensor:
    """Return token ids (N + 1, 77) of captions; the last row is the empty caption."""
    tokenizer, record = kind.open_tokenizer(), kind.record
    known: dict[str, tuple[int, ...]] = {}
    for text in [*captions, ""]:
        if text not in known:
            encoded = tokenizer.encode(text, record.max_tokens, pad_token_id=record.pad_token_id)
            known[text] = encoded.ids
    return torch.tensor([known[text] for text in [*captions, ""]])


def make_supervision(
    kind: CaptionEncoder, noun_places: Callable[[str], Sequence[int]]
) -> CaptionSupervision:
    """Return captions of random scenes, without images, and their supervision.

    Args:
        kind: The encoder.
        noun_places: Returns where the names of shapes are among a caption's tokens.
    """
    source = scenes.random_scenes(np.random.default_rng(kind.seed), held_out=False)
    sampled = list(islice(source, NUM_CAPTIONS))
    rng = np.random.default_rng((_WORDINGS_SEED, kind.seed))
    wordings = [scenes.random_wording(rng) for _ in sampled]
    captions = list(map(scenes.caption, sampled, wordings))
    tokens = caption_tokens(kind, captions)[:-1]
    nouns = torch.full((len(sampled), kind.record.max_tokens, len(ANSWERS)), NOT_ASKED)
    for row, (scene, wording) in enumerate(zip(sampled, wordings, strict=True)):
        things = about_things(scene, wording)
        for place, thing in zip(noun_places(captions[row]), things, strict=True):
            nouns[row, place] = torch.tensor(thing)
    return CaptionSupervision(
        tokens=tokens,
        ends=kind.end_of(tokens),
        scenes=torch.tensor(list(map(about_scene, sampled, wordings))),
        nouns=nouns,
    )


def load_trained(run: str, encoder: _Encoder) -> _Encoder:
    """Give an encoder what a run has learned, without the layers that only its training needs."""
    state = torch.load(WORK / f"{run}.pt", weights_only=True)["ema"]
    encoder.load_state_dict(under("text.", state))
    return encoder.eval().requires_grad_(False)


def unpacked_state(kind: CaptionEncoder, text: dict[str, Tensor]) -> dict[str, object]:
    """Return the state that training goes on from, of the weights (name -> value) of an encoder.

    The two linear layers are not in a checkpoint: going on begins with new ones.
    """
    torch.manual_seed(0)
    model = DescribingEncoder(kind)
    model.text.load_state_dict(text)
    weights = model.state_dict()
    return {"model": weights, "ema": weights, "optimizer": None, "step": kind.cycles[0].end}


def train_caption_encoder(kind: CaptionEncoder, supervision: CaptionSupervision) -> None:
    """Train an encoder; its weights are saved under the name of its run."""
    torch.manual_seed(0)
    model = DescribingEncoder(kind)
    trainer = Trainer(kind.run, model, *kind.cycles)
    trained = len(supervision.tokens) - NUM_CHECKED

    def answers(rows: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        scene, noun = model(supervision.tokens[rows], supervision.ends[rows], share)
        return scene, noun

    def loss_at(_: int) -> Tensor:
        rows = torch.randint(trained, (_BATCH,))
        scene, noun = answers(rows, torch.rand(_BATCH))
        return answers_loss(scene, SCENE_ANSWERS, supervision.scenes[rows]) + answers_loss(
            noun, ANSWERS, supervision.nouns[rows].flatten(0, 1)
        )

    @torch.no_grad()
    def check() -> dict[str, float]:
        rows = torch.arange(trained, len(supervision.tokens))
        scene, _ = answers(rows, torch.ones(len(rows)))
        asked = supervision.scenes[rows].unbind(1)
        right = [
            (part.argmax(1) == answers) | (answers == NOT_ASKED)
            for part, answers in zip(torch.split(scene, list(SCENE_ANSWERS), 1), asked, strict=True)
        ]
        return {"scenes_right": torch.stack(right).all(0).float().mean().item()}

    with sdpa_kernel(SDPBackend.MATH):
        trainer.run(loss_at, check)
