"""Prompts as context: weights, chunks and padding."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends.contract import Runner
from ldm_runtime.conditioning.contract import Conditioning, OpenNetwork
from ldm_runtime.errors import BundleError, RequestError
from ldm_runtime.requests.resolved import PromptCondition, ResolvedRequest
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.networks import TextEncoderSpec
from ldm_runtime.text import ClipTokenizer, Tokenizer, WordPieceTokenizer
from ldm_runtime.text.prompts import Token, parse_prompt, split_chunks

_LOGGER = logging.getLogger(__name__)

#: Most chunks of the text encoder's length per prompt; each lengthens cross-attention.
MAX_CHUNKS = 16

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Chunk:
    """One sequence of tokens for the text encoder.

    Attributes:
        ids: (max_tokens,) int64: start token, text, end token, padding.
        weights: (max_tokens,) float32: 1 for all but the text.
    """

    ids: npt.NDArray[np.int64]
    weights: Float32Array


#: Readers of the vocabulary of each kind of text encoder.
_TOKENIZERS: Mapping[str, Callable[[Path], Tokenizer]] = MappingProxyType(
    {
        "clip": ClipTokenizer.from_file,
        "openclip": ClipTokenizer.from_file,
        "bert": WordPieceTokenizer.from_file,
    }
)


def open_tokenizer(path: Path, spec: ModelSpec) -> Tokenizer:
    """Open the tokenizer of a bundle whose task has prompts.

    Raises:
        BundleError: The file is missing, malformed or larger than the text encoder's vocabulary,
            or the model has no text encoder.
    """
    record = spec.find(TextEncoderSpec)
    if record is None:
        raise BundleError(f"{path} is a vocabulary, but this {spec.task} model has no text encoder")
    try:
        tokenizer = _TOKENIZERS[record.kind](path)
    except (OSError, ValueError) as error:
        raise BundleError(f"{error}; export the bundle again") from error
    if tokenizer.vocab_size > record.vocab_size:
        raise BundleError(
            f"{path} has {tokenizer.vocab_size} tokens, the text encoder knows "
            f"{record.vocab_size}; export with the tokenizer it was trained with"
        )
    return tokenizer


def encode_text(
    network: OpenNetwork, tokenizer: Tokenizer | None, request: ResolvedRequest, spec: ModelSpec
) -> Conditioning:
    """Return context (2, T, D), of the negative prompt first, or (1, T, D) without guidance.

    T is the text encoder's `max_tokens` times the number of chunks that the longer prompt takes;
    the other is filled up with empty chunks. Each chunk is encoded alone, then weighted. A
    literal prompt has one chunk without weights; the text that is cut off is logged as a warning.

    See `ldm_runtime.conditioning.encode_conditioning`.

    Raises:
        RequestError: A prompt takes too many chunks, or its weights are invalid.
    """
    assert tokenizer is not None, "the bundle has no tokenizer"
    record = spec.network(TextEncoderSpec)
    condition = request.condition_as(PromptCondition)
    texts = {"prompt": condition.prompt}
    if request.is_guided:
        texts = {"negative_prompt": condition.negative_prompt, **texts}
    read = _literal_chunk if condition.literal else _weighted_chunks
    prompts = {field: read(tokenizer, field, text, record) for field, text in texts.items()}
    empty = _chunk((), tokenizer, record)
    engine = network("text_encoder")
    # One call per chunk keeps the batch size independent of the length of the prompts.
    contexts = [
        _encode(engine, dict(zip(prompts, chunks, strict=True)))
        for chunks in zip_longest(*prompts.values(), fillvalue=empty)
    ]
    return Conditioning(context=np.concatenate(contexts, axis=1))


def _encode(engine: Runner, chunks: Mapping[str, Chunk]) -> Float32Array:
    """Encode one chunk of every prompt: (number of prompts, max_tokens, D)."""
    tokens = np.stack([chunk.ids for chunk in chunks.values()])
    context: Float32Array = engine.run({"tokens": tokens})["context"]
    return np.stack(
        [
            _weighted(field, each, chunk.weights)
            for each, (field, chunk) in zip(context, chunks.items(), strict=True)
        ]
    )


def _weighted(field: str, context: Float32Array, weights: Float32Array) -> Float32Array:
    """Multiply a chunk's context (T, D) with its weights (T,), then restore its mean.

    Source: AUTOMATIC1111/stable-diffusion-webui 1.10, "Original" in `modules/sd_emphasis.py`.
    """
    if (weights == 1).all():
        return context
    weighted = context * weights[:, None]
    mean = float(weighted.mean(dtype=np.float64))
    if mean == 0:
        raise RequestError(field, "its weights cancel each other; change one of them")
    return weighted * (float(context.mean(dtype=np.float64)) / mean)


def _literal_chunk(
    tokenizer: Tokenizer, field: str, text: str, record: TextEncoderSpec
) -> list[Chunk]:
    encoding = tokenizer.encode(text, record.max_tokens, pad_token_id=record.pad_token_id)
    if encoding.cut:
        _LOGGER.warning(
            "%s is longer than %d tokens; left out: %r",
            field,
            record.max_tokens - 2,
            encoding.cut,
        )
    return [Chunk(np.array(encoding.ids), np.ones(record.max_tokens, dtype=np.float32))]


def _weighted_chunks(
    tokenizer: Tokenizer, field: str, text: str, record: TextEncoderSpec
) -> list[Chunk]:
    room = record.max_tokens - 2
    try:
        parts = [
            [
                Token(token, fragment.weight)
                for fragment in part
                for token in tokenizer.token_ids(fragment.text)
            ]
            for part in parse_prompt(text)
        ]
    except ValueError as error:
        raise RequestError(field, str(error)) from error
    (comma_id,) = tokenizer.token_ids(",")
    chunks = split_chunks(parts, room, comma_id)
    if len(chunks) > MAX_CHUNKS:
        raise RequestError(
            field,
            f"takes {len(chunks)} chunks of {room} tokens, more than {MAX_CHUNKS}; shorten it",
        )
    return [_chunk(chunk, tokenizer, record) for chunk in chunks]


def _chunk(tokens: Sequence[Token], tokenizer: Tokenizer, record: TextEncoderSpec) -> Chunk:
    """Add start token, end token and padding, all of weight 1."""
    ids = np.full(record.max_tokens, record.pad_token_id, dtype=np.int64)
    weights = np.ones(record.max_tokens, dtype=np.float32)
    end = len(tokens) + 1
    ids[0], ids[1:end], ids[end] = (
        tokenizer.start_id,
        [each.id for each in tokens],
        tokenizer.end_id,
    )
    weights[1:end] = [each.weight for each in tokens]
    return Chunk(ids, weights)
