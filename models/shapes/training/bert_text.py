"""The BERT encoder of captions, trained by itself as `caption_encoder` says.

Unlike in CLIP every token sees every other, so that all that fill up a caption can tell the scene.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from torch import Tensor, nn

from ldm_export.networks.bert import BertTextEncoder
from ldm_runtime.text import WordPieceTokenizer
from models.shapes.catalog.learning_rate import Cycle
from models.shapes.catalog.models import BERT
from models.shapes.data import scenes
from models.shapes.training import caption_encoder
from models.shapes.training.caption_encoder import (
    CaptionEncoder,
    load_trained,
    make_supervision,
    train_caption_encoder,
    unpacked_state,
)
from models.shapes.training.trainer import HERE

VOCABULARY = HERE.parents[1] / "ldm_export/vocabularies/bert_base_uncased_vocab.txt"
RUN = "bert"


@cache
def _open_tokenizer() -> WordPieceTokenizer:
    return WordPieceTokenizer.from_file(VOCABULARY)


def _embeddings(network: nn.Module) -> tuple[nn.Embedding, nn.Embedding]:
    assert isinstance(network, BertTextEncoder), "`build` makes it"
    return network.transformer.token_emb, network.transformer.pos_emb.emb


_BERT = CaptionEncoder(
    run=RUN,
    record=BERT,
    open_tokenizer=_open_tokenizer,
    build=BertTextEncoder,
    embeddings=_embeddings,
    end_of=lambda tokens: (tokens != BERT.pad_token_id).sum(1) - 1,
    cycles=(Cycle(end=1_500), Cycle(start=1_500, end=2_500)),
    seed=4,
)


def caption_tokens(captions: Sequence[str]) -> Tensor:
    """Return token ids (N + 1, 77) of captions; the last row is the empty caption."""
    return caption_encoder.caption_tokens(_BERT, captions)


def noun_places(caption: str) -> list[int]:
    """Return where the names of kinds are among a caption's tokens; "cyan", say, is two tokens."""
    tokenizer = _open_tokenizer()
    words = caption.split()
    ends = accumulate(len(tokenizer.token_ids(word)) for word in words)
    return [end for word, end in zip(words, ends, strict=True) if word in scenes.SHAPES]


def train_words() -> None:
    """Train the encoder of captions."""
    train_caption_encoder(_BERT, make_supervision(_BERT, noun_places))


def unpacked_words(text: dict[str, Tensor]) -> dict[str, object]:
    """Return the state that training goes on from, of the encoder's weights."""
    return unpacked_state(_BERT, text)


def load_words() -> BertTextEncoder:
    """Return the trained encoder of captions."""
    return load_trained(RUN, BertTextEncoder(BERT))
