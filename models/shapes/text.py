"""The text encoder of the shapes model, trained by itself to say what a caption says.

Stable Diffusion's text encoder came trained, on pairs of pictures and texts, and stayed as it was.
This one is trained on captions and the scenes they describe: every token from the end of a caption
on has to tell the whole scene through a linear layer, and every noun the thing it names. Trained
together with the UNet from nothing, it told "left" from "right" only after hours, because a UNet
that makes nothing of its context yet teaches nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import scenes
from cycles import Cycle
from first_stage import under
from ldm_export.networks.clip import ClipTextEncoder
from ldm_runtime.manifest import TextEncoderSpec
from ldm_runtime.tokenizers import ClipTokenizer
from trainer import HERE, WORK, Trainer

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
NUM_CAPTIONS, NUM_CHECKED = 20_000, 512
STEPS, BATCH = 2_500, 64
_SLOTS = 3
#: Number of answers to each question about a thing: kind, colour, size, relation; the last is none.
_THING = tuple(len(names) + 1 for names in (scenes.SHAPES, scenes.COLORS, scenes.SIZES))
_ANSWERS = (*_THING, len(scenes.RELATIONS) + 1)
_SCENE = (*(_SLOTS * _ANSWERS), len(scenes.BACKGROUNDS), 2)
_NOT_ASKED = -100


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Captions and what is to be said of them.

    Attributes:
        tokens: (N, 77).
        ends: Index of the first end token, (N,).
        scenes: Answers about the whole scene, (N, questions).
        nouns: Answers about the thing a token names, (N, 77, questions), or -100.
    """

    tokens: Tensor
    ends: Tensor
    scenes: Tensor
    nouns: Tensor


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
        scenes=torch.tensor([_about_scene(scene) for scene in drawn]),
        nouns=torch.stack([_about_nouns(*pair) for pair in zip(drawn, captions, strict=True)]),
    )


def _about_things(scene: scenes.Scene) -> list[tuple[int, ...]]:
    names = (scenes.SHAPES, scenes.COLORS, scenes.SIZES, scenes.RELATIONS)
    places = [{name: index for index, name in enumerate(each)} for each in names]
    relations = ("", *scene.relations)
    return [
        (
            places[0][thing.kind],
            places[1][thing.color],
            places[2][thing.size],
            places[3].get(relation, len(scenes.RELATIONS)),
        )
        for thing, relation in zip(scene.things, relations, strict=True)
    ]


def _about_scene(scene: scenes.Scene) -> list[int]:
    nothing = tuple(count - 1 for count in _ANSWERS)
    things = _about_things(scene)
    things += [nothing] * (_SLOTS - len(things))
    background = list(scenes.BACKGROUNDS).index(scene.background)
    return [*(answer for thing in things for answer in thing), background, int(scene.gradient)]


def _about_nouns(scene: scenes.Scene, caption: str) -> Tensor:
    """Each word of these captions is one token for CLIP, after the start token."""
    answers = torch.full((MAX_TOKENS, len(_ANSWERS)), _NOT_ASKED)
    nouns = [1 + i for i, word in enumerate(caption.split()) if word in scenes.SHAPES]
    for place, thing in zip(nouns, _about_things(scene), strict=True):
        answers[place] = torch.tensor(thing)
    return answers


class DescribingTextEncoder(nn.Module):
    """A text encoder with the two linear layers that only its training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ClipTextEncoder(TEXT_ENCODER)
        self.scene = nn.Linear(TEXT_ENCODER.width, sum(_SCENE))
        self.noun = nn.Linear(TEXT_ENCODER.width, sum(_ANSWERS))
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
        return _loss(scene, _SCENE, lessons.scenes[rows]) + _loss(
            noun, _ANSWERS, lessons.nouns[rows].flatten(0, 1)
        )

    @torch.no_grad()
    def check() -> dict[str, float]:
        rows = torch.arange(trained, len(lessons.tokens))
        scene, _ = _answers(model, lessons, rows, last=True)
        right = [
            part.argmax(1) == lessons.scenes[rows, index]
            for index, part in enumerate(torch.split(scene, list(_SCENE), 1))
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


def _loss(logits: Tensor, sizes: Sequence[int], answers: Tensor) -> Tensor:
    parts = torch.split(logits, list(sizes), 1)
    losses = [
        F.cross_entropy(part, answers[:, index], ignore_index=_NOT_ASKED)
        for index, part in enumerate(parts)
    ]
    return torch.stack(losses).mean()


def load_text_encoder() -> ClipTextEncoder:
    """Return the trained text encoder."""
    state = torch.load(WORK / "text.pt", weights_only=True)["ema"]
    encoder = ClipTextEncoder(TEXT_ENCODER)
    encoder.load_state_dict(under("text.", state))
    return encoder.eval()
