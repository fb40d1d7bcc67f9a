"""The text encoder of the shapes model, trained by itself to say what a caption says.

Stable Diffusion's text encoder came trained, on pairs of pictures and texts, and stayed as it was.
This one is trained on captions and the scenes they describe: every token from the end of a caption
on has to tell the whole scene through a linear layer, and every noun the thing it names. Trained
together with the UNet from nothing, it told "left" from "right" only after hours, because a UNet
that makes nothing of its context yet teaches nothing.
"""

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_export.networks.clip import ClipTextEncoder
from ldm_runtime.specs.networks import TextEncoderSpec
from ldm_runtime.text import ClipTokenizer
from models.shapes.catalog.learning_rate import Cycle
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

VOCABULARY = HERE.parents[1] / "ldm_export/vocabularies/clip_bpe_simple_vocab_16e6.txt.gz"
MAX_TOKENS = 77
END_TOKEN = 49407
TEXT_ENCODER = TextEncoderSpec(
    kind="clip",
    width=64,
    num_layers=4,
    num_heads=1,
    feed_forward_dim=256,
    vocab_size=49408,
    max_tokens=MAX_TOKENS,
    activation="quick_gelu",
    pad_token_id=END_TOKEN,
)
STEPS, BATCH = 2_500, 64


def load_tokens(captions: Sequence[str]) -> Tensor:
    """Return token ids (N + 1, 77) of captions; the last row is the empty caption."""
    tokenizer = ClipTokenizer.from_file(VOCABULARY)
    cache: dict[str, tuple[int, ...]] = {}
    for text in [*captions, ""]:
        if text not in cache:
            cache[text] = tokenizer.encode(text, MAX_TOKENS, pad_token_id=END_TOKEN).ids
    return torch.tensor([cache[text] for text in [*captions, ""]])


def make_lessons() -> Lessons:
    """Draw scenes that no picture is needed of."""
    source = scenes.random_scenes(np.random.default_rng(2), held_out=False)
    drawn = list(islice(source, NUM_CAPTIONS))
    captions = [scenes.caption(scene) for scene in drawn]
    tokens = load_tokens(captions)[:-1]
    return Lessons(
        tokens=tokens,
        ends=(tokens == END_TOKEN).int().argmax(1),
        scenes=torch.tensor([about_scene(scene) for scene in drawn]),
        nouns=torch.stack([_about_nouns(*pair) for pair in zip(drawn, captions, strict=True)]),
    )


def _about_nouns(scene: scenes.Scene, caption: str) -> Tensor:
    """Each word of these captions is one token for CLIP, after the start token."""
    answers = torch.full((MAX_TOKENS, len(ANSWERS)), NOT_ASKED)
    nouns = [1 + i for i, word in enumerate(caption.split()) if word in scenes.SHAPES]
    for place, thing in zip(nouns, about_things(scene), strict=True):
        answers[place] = torch.tensor(thing)
    return answers


class DescribingTextEncoder(nn.Module):
    """A text encoder with the two linear layers that only its training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ClipTextEncoder(TEXT_ENCODER)
        self.scene = nn.Linear(TEXT_ENCODER.width, sum(SCENE_ANSWERS))
        self.noun = nn.Linear(TEXT_ENCODER.width, sum(ANSWERS))
        nn.init.normal_(self.text.text_model.embeddings.token_embedding.weight, std=1.0)
        nn.init.normal_(self.text.text_model.embeddings.position_embedding.weight, std=0.3)


def train_text() -> None:
    """Train the text encoder."""
    lessons = make_lessons()
    torch.manual_seed(0)
    model = DescribingTextEncoder()
    trainer = Trainer("text", model, Cycle(end=STEPS))
    trained = len(lessons.tokens) - NUM_CHECKED

    def loss_at(_: int) -> Tensor:
        rows = torch.randint(trained, (BATCH,))
        scene, noun = _answers(model, lessons, rows)
        return answers_loss(scene, SCENE_ANSWERS, lessons.scenes[rows]) + answers_loss(
            noun, ANSWERS, lessons.nouns[rows].flatten(0, 1)
        )

    @torch.no_grad()
    def check() -> dict[str, float]:
        rows = torch.arange(trained, len(lessons.tokens))
        scene, _ = _answers(model, lessons, rows, last=True)
        right = [
            part.argmax(1) == lessons.scenes[rows, index]
            for index, part in enumerate(torch.split(scene, list(SCENE_ANSWERS), 1))
        ]
        return {"scenes_right": torch.stack(right).all(0).float().mean().item()}

    with sdpa_kernel(SDPBackend.MATH):
        trainer.run(loss_at, check)


def _answers(
    model: DescribingTextEncoder, lessons: Lessons, rows: Tensor, *, last: bool = False
) -> tuple[Tensor, Tensor]:
    """Return logits about scenes, from one token after the end or the last, and about nouns."""
    context = model.text(lessons.tokens[rows])
    ends = lessons.ends[rows]
    share = torch.ones(len(rows)) if last else torch.rand(len(rows))
    places = ends + (share * (MAX_TOKENS - 1 - ends)).round().long()
    after = context[torch.arange(len(rows)), places]
    return model.scene(after), model.noun(context.flatten(0, 1))


def load_text_encoder() -> ClipTextEncoder:
    """Return the trained text encoder."""
    state = torch.load(WORK / "text.pt", weights_only=True)["ema"]
    encoder = ClipTextEncoder(TEXT_ENCODER)
    encoder.load_state_dict(under("text.", state))
    return encoder.eval()
