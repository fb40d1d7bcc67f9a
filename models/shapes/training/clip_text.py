"""The text encoder of the shapes model, a small CLIP, trained by itself as `caption_encoder` says.

Stable Diffusion's text encoder came trained, on pairs of images and texts, and stayed as it was.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ldm_export.networks.clip import ClipTextEncoder
from ldm_runtime.testing import text_encoder_spec
from ldm_runtime.text import ClipTokenizer
from models.shapes.catalog.learning_rate import Cycle
from models.shapes.data import scenes
from models.shapes.training.caption_encoder import (
    CaptionEncoder,
    caption_tokens,
    load_trained,
    make_supervision,
    train_caption_encoder,
    unpacked_state,
)
from models.shapes.training.trainer import HERE

VOCABULARY = HERE.parents[1] / "ldm_export/vocabularies/clip_bpe_simple_vocab_16e6.txt.gz"
MAX_TOKENS = 77
END_TOKEN = 49407
TEXT_ENCODER = text_encoder_spec(
    width=64,
    num_layers=4,
    num_heads=1,
    feed_forward_dim=256,
    max_tokens=MAX_TOKENS,
    pad_token_id=END_TOKEN,
)


def _embeddings(network: nn.Module) -> tuple[nn.Embedding, nn.Embedding]:
    assert isinstance(network, ClipTextEncoder), "`build` makes it"
    embeddings = network.text_model.embeddings
    return embeddings.token_embedding, embeddings.position_embedding


_CLIP = CaptionEncoder(
    run="text",
    record=TEXT_ENCODER,
    open_tokenizer=lambda: ClipTokenizer.from_file(VOCABULARY),
    build=ClipTextEncoder,
    embeddings=_embeddings,
    end_of=lambda tokens: (tokens == END_TOKEN).int().argmax(1),
    cycles=(Cycle(end=2_500), Cycle(start=2_500, end=3_500)),
    seed=2,
)


def load_tokens(captions: Sequence[str]) -> Tensor:
    """Return token ids (N + 1, 77) of captions; the last row is the empty caption."""
    return caption_tokens(_CLIP, captions)


def train_text() -> None:
    """Train the text encoder."""
    train_caption_encoder(_CLIP, make_supervision(_CLIP, _noun_places))


def unpacked_text(text: dict[str, Tensor]) -> dict[str, object]:
    """Return the state that training goes on from, of the encoder's weights."""
    return unpacked_state(_CLIP, text)


def load_text_encoder() -> ClipTextEncoder:
    """Return the trained text encoder."""
    return load_trained(_CLIP.run, ClipTextEncoder(TEXT_ENCODER))


def _noun_places(caption: str) -> list[int]:
    """Each word of these captions is one token for CLIP, after the start token."""
    return [1 + i for i, word in enumerate(caption.split()) if word in scenes.SHAPES]
