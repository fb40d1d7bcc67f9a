"""The BERT encoder of captions, trained by itself to say what a caption says.

As `text.py` does for CLIP, and for the same reason; but here every token sees every other, so that
all that fill up a caption can tell the whole scene.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_export.networks.bert import BertTextEncoder
from ldm_runtime.text import WordPieceTokenizer
from models.shapes.catalog.learning_rate import Cycle
from models.shapes.catalog.systems import BERT
from models.shapes.data import scenes
from models.shapes.training.caption_questions import (
    ANSWERS,
    NOT_ASKED,
    NUM_CAPTIONS,
    NUM_CHECKED,
    SCENE_ANSWERS,
    Lessons,
    about_scene,
    about_things,
    answers_loss,
)
from models.shapes.training.first_stage import under
from models.shapes.training.trainer import HERE, WORK, Trainer

VOCABULARY = HERE.parents[1] / "ldm_export/vocabularies/bert_base_uncased_vocab.txt"
STAGE = "bert"
STEPS, BATCH = 1500, 64
_SEED = 4


@cache
def _open_tokenizer() -> WordPieceTokenizer:
    return WordPieceTokenizer.from_file(VOCABULARY)


def caption_tokens(captions: Sequence[str]) -> Tensor:
    """Return token ids (N + 1, 77) of captions; the last row is the empty caption."""
    tokenizer = _open_tokenizer()
    known: dict[str, tuple[int, ...]] = {}
    for text in [*captions, ""]:
        if text not in known:
            encoded = tokenizer.encode(text, BERT.max_tokens, pad_token_id=BERT.pad_token_id)
            known[text] = encoded.ids
    return torch.tensor([known[text] for text in [*captions, ""]])


def make_lessons() -> Lessons:
    """Draw scenes that no picture is needed of."""
    source = scenes.random_scenes(np.random.default_rng(_SEED), held_out=False)
    drawn = list(islice(source, NUM_CAPTIONS))
    captions = [scenes.caption(scene) for scene in drawn]
    tokens = caption_tokens(captions)[:-1]
    return Lessons(
        tokens=tokens,
        ends=(tokens != BERT.pad_token_id).sum(1) - 1,
        scenes=torch.tensor([about_scene(scene) for scene in drawn]),
        nouns=torch.stack([_about_nouns(*pair) for pair in zip(drawn, captions, strict=True)]),
    )


def noun_places(caption: str) -> list[int]:
    """Return where the names of kinds are among a caption's tokens; "cyan", say, is two tokens."""
    tokenizer = _open_tokenizer()
    words = caption.split()
    ends = accumulate(len(tokenizer.token_ids(word)) for word in words)
    return [end for word, end in zip(words, ends, strict=True) if word in scenes.SHAPES]


def _about_nouns(scene: scenes.Scene, caption: str) -> Tensor:
    answers = torch.full((BERT.max_tokens, len(ANSWERS)), NOT_ASKED)
    for place, thing in zip(noun_places(caption), about_things(scene), strict=True):
        answers[place] = torch.tensor(thing)
    return answers


class DescribingBert(nn.Module):
    """The encoder with the two linear layers that only its training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.text = BertTextEncoder(BERT)
        self.scene = nn.Linear(BERT.width, sum(SCENE_ANSWERS))
        self.noun = nn.Linear(BERT.width, sum(ANSWERS))
        nn.init.normal_(self.text.transformer.token_emb.weight, std=1.0)
        nn.init.normal_(self.text.transformer.pos_emb.emb.weight, std=0.3)

    def forward(self, tokens: Tensor, ends: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits about scenes and about nouns.

        Args:
            tokens: (B, 77).
            ends: Index of the end token, (B,).
            share: Which of the tokens from there on tells the scene: 0 the first, 1 the last.
        """
        context = self.text(tokens)
        places = ends + (share * (BERT.max_tokens - 1 - ends)).round().long()
        after = context[torch.arange(len(tokens)), places]
        return self.scene(after), self.noun(context.flatten(0, 1))


def train_words() -> None:
    """Train the encoder of captions."""
    lessons = make_lessons()
    torch.manual_seed(0)
    model = DescribingBert()
    trainer = Trainer(STAGE, model, Cycle(end=STEPS))
    trained = len(lessons.tokens) - NUM_CHECKED

    def answers(rows: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        scene, noun = model(lessons.tokens[rows], lessons.ends[rows], share)
        return scene, noun

    def loss_at(_: int) -> Tensor:
        rows = torch.randint(trained, (BATCH,))
        scene, noun = answers(rows, torch.rand(BATCH))
        return answers_loss(scene, SCENE_ANSWERS, lessons.scenes[rows]) + answers_loss(
            noun, ANSWERS, lessons.nouns[rows].flatten(0, 1)
        )

    @torch.no_grad()
    def check() -> dict[str, float]:
        rows = torch.arange(trained, len(lessons.tokens))
        scene, _ = answers(rows, torch.ones(len(rows)))
        right = [
            part.argmax(1) == lessons.scenes[rows, index]
            for index, part in enumerate(torch.split(scene, list(SCENE_ANSWERS), 1))
        ]
        return {"scenes_right": torch.stack(right).all(0).float().mean().item()}

    with sdpa_kernel(SDPBackend.MATH):
        trainer.run(loss_at, check)


def load_words() -> BertTextEncoder:
    """Return the trained encoder of captions."""
    state = torch.load(WORK / f"{STAGE}.pt", weights_only=True)["ema"]
    encoder = BertTextEncoder(BERT)
    encoder.load_state_dict(under("text.", state))
    return encoder.eval().requires_grad_(False)
