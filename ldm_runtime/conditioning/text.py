"""Prompts as context: weights, chunks and padding."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends.contract import Runner, Tensors
from ldm_runtime.conditioning.contract import Conditioning, OpenNetwork
from ldm_runtime.conditioning.micro_conditioning import embed_micro_conditioning
from ldm_runtime.errors import BundleError, RequestError
from ldm_runtime.requests.resolved import PromptCondition, ResolvedRequest
from ldm_runtime.specs.micro_conditioning import micro_conditioning_kind, pooled_length
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.networks import TextEncoderSpec
from ldm_runtime.text import (
    ClipTokenizer,
    LearnedWord,
    Tokenizer,
    WordPieceTokenizer,
    learned_ids,
)
from ldm_runtime.text.prompts import Token, parse_prompt, split_chunks

_LOGGER = logging.getLogger(__name__)

#: Most chunks of the text encoder's length per prompt; each lengthens cross-attention.
MAX_CHUNKS = 16

Float32Array = npt.NDArray[np.float32]


_PADDING = -1


@dataclass(frozen=True, eq=False)
class Chunk:
    """One sequence of tokens for the text encoder.

    Attributes:
        ids: (max_tokens,) int64: start token, text, end token, and `_PADDING`, for which each text
            encoder has a token of its own. Those of learned words follow the vocabulary's.
        weights: (max_tokens,) float32: 1 for all but the text.
    """

    ids: npt.NDArray[np.int64]
    weights: Float32Array


#: Readers of the vocabulary of each kind of text encoder.
_TOKENIZERS: Mapping[str, Callable[[Path, Sequence[LearnedWord]], Tokenizer]] = MappingProxyType(
    {
        "clip": ClipTokenizer.from_file,
        "openclip": ClipTokenizer.from_file,
        "bert": lambda path, _: WordPieceTokenizer.from_file(path),
    }
)


def open_tokenizer(
    path: Path, spec: ModelSpec, learned_words: Sequence[LearnedWord] = ()
) -> Tokenizer:
    """Open the tokenizer of a bundle whose task has prompts.

    Args:
        path: Its vocabulary.
        spec: The model.
        learned_words: Words that it finds in prompts, from `inputs.textual_inversion`.

    Raises:
        BundleError: The file is missing, malformed or larger than the text encoder's vocabulary,
            or the model has no text encoder.
    """
    record = spec.find(TextEncoderSpec)
    if record is None:
        raise BundleError(f"{path} is a vocabulary, but this {spec.task} model has no text encoder")
    try:
        tokenizer = _TOKENIZERS[record.kind](path, learned_words)
    except (OSError, ValueError) as error:
        raise BundleError(f"{error}; export the bundle again") from error
    if tokenizer.vocab_size > record.vocab_size:
        raise BundleError(
            f"{path} has {tokenizer.vocab_size} tokens, the text encoder knows "
            f"{record.vocab_size}; export with the tokenizer it was trained with"
        )
    return tokenizer


def used_inversions(tokenizer: Tokenizer | None, request: ResolvedRequest) -> Mapping[str, str]:
    """Return the hash of the file of each learned word that a request's prompts have, by word."""
    condition = request.condition
    if tokenizer is None or not isinstance(condition, PromptCondition):
        return {}
    if not tokenizer.learned_words:  # spares every other request a second look at its prompts
        return {}
    texts = (condition.prompt, condition.negative_prompt)
    found = {token for text in texts for token in tokenizer.token_ids(text)}
    words = tokenizer.learned_words
    ids = learned_ids(words, tokenizer.vocab_size)
    return {
        word.text: word.sha256 for word, each in zip(words, ids, strict=True) if each[0] in found
    }


def encode_text(
    network: OpenNetwork, tokenizer: Tokenizer | None, request: ResolvedRequest, spec: ModelSpec
) -> Conditioning:
    """Return context (2, T, D), of the negative prompt first, or (1, T, D) without guidance.

    T is the text encoder's `max_tokens` times the number of chunks that the longer prompt takes;
    the other is filled up with empty chunks. Each chunk is encoded alone, then weighted. A
    literal prompt has one chunk without weights; the text that is cut off is logged as a warning.

    Two text encoders encode the same chunks, and their contexts are side by side in D. A model with
    a vector (2, V) gets it from the pooled output of the first chunk and from micro-conditioning.
    Where the model's null prompt is zeros, an empty negative prompt is.

    See `ldm_runtime.conditioning.encode_conditioning`.

    Raises:
        RequestError: A prompt takes too many chunks, or its weights are invalid.
    """
    assert tokenizer is not None, "the bundle has no tokenizer"
    condition = request.condition_as(PromptCondition)
    texts = {"prompt": condition.prompt}
    if request.is_guided:
        texts = {"negative_prompt": condition.negative_prompt, **texts}
    max_tokens = spec.network(TextEncoderSpec).max_tokens
    chunks = _chunks_of(tokenizer, texts, max_tokens, literal=condition.literal)
    encoded = [
        _encode(
            network(name), chunks, partial(_inputs, name, record, tokenizer, condition.clip_skip)
        )
        for name, record in spec.networks.items()
        if isinstance(record, TextEncoderSpec)
    ]
    context = np.concatenate([each.context for each in encoded], axis=2)
    vector = _vector(encoded, request, spec)
    if request.is_guided and spec.null_prompt == "zeros" and not condition.negative_prompt:
        context[0] = 0
        if vector is not None:
            vector[0, : pooled_length(spec)] = 0
    return Conditioning(context=context, vector=vector)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Encoded:
    """The prompts of a request, encoded by one text encoder, in the order of their fields.

    Attributes:
        context: (number of prompts, T, D).
        pooled: (number of prompts, P), or None.
    """

    context: Float32Array
    pooled: Float32Array | None


def _chunks_of(
    tokenizer: Tokenizer, texts: Mapping[str, str], max_tokens: int, *, literal: bool
) -> list[dict[str, Chunk]]:
    """Return the chunks of all prompts by field, first the first of each."""
    read = _literal_chunk if literal else _weighted_chunks
    prompts = {field: read(tokenizer, field, text, max_tokens) for field, text in texts.items()}
    empty = _chunk((), tokenizer, max_tokens)
    return [
        dict(zip(prompts, chunks, strict=True))
        for chunks in zip_longest(*prompts.values(), fillvalue=empty)
    ]


def _encode(
    engine: Runner,
    chunks: Sequence[Mapping[str, Chunk]],
    inputs: Callable[[npt.NDArray[np.int64]], Tensors],
) -> _Encoded:
    """Encode chunks; one call for each keeps the batch size independent of the prompts' length."""
    ids = [np.stack([chunk.ids for chunk in each.values()]) for each in chunks]
    outputs = [engine.run(inputs(each)) for each in ids]
    contexts = [
        np.stack(
            [
                _weighted(field, context, chunk.weights)
                for context, (field, chunk) in zip(output["context"], each.items(), strict=True)
            ]
        )
        for output, each in zip(outputs, chunks, strict=True)
    ]
    return _Encoded(context=np.concatenate(contexts, axis=1), pooled=outputs[0].get("pooled"))


def _inputs(
    name: str,
    record: TextEncoderSpec,
    tokenizer: Tokenizer,
    clip_skip: int,
    ids: npt.NDArray[np.int64],
) -> Tensors:
    """Return the inputs of a text encoder for the ids (B, max_tokens) of one chunk per prompt."""
    is_learned = ids >= tokenizer.vocab_size
    tokens = np.where(ids == _PADDING, record.pad_token_id, ids)
    inputs: dict[str, npt.NDArray[np.generic]] = {
        "tokens": np.where(is_learned, record.vocab_size, tokens)
    }
    if record.learned_dim is not None:
        embeddings = np.zeros((*ids.shape, record.learned_dim), dtype=np.float32)
        if is_learned.any():
            vectors = np.concatenate([word.vectors[name] for word in tokenizer.learned_words])
            embeddings[is_learned] = vectors[ids[is_learned] - tokenizer.vocab_size]
        inputs["learned_embeddings"] = embeddings
    if record.num_clip_skips is not None:
        inputs["clip_skip"] = np.full(len(ids), clip_skip, dtype=np.int64)
    return inputs


def _vector(
    encoded: Sequence[_Encoded], request: ResolvedRequest, spec: ModelSpec
) -> Float32Array | None:
    kind = micro_conditioning_kind(spec)
    if kind is None:
        return None
    pooled = [each.pooled for each in encoded if each.pooled is not None]
    return np.concatenate([*pooled, embed_micro_conditioning(request, kind)], axis=1)


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


def _literal_chunk(tokenizer: Tokenizer, field: str, text: str, max_tokens: int) -> list[Chunk]:
    encoding = tokenizer.encode(text, max_tokens, pad_token_id=_PADDING)
    if encoding.cut:
        _LOGGER.warning(
            "%s is longer than %d tokens; left out: %r",
            field,
            max_tokens - 2,
            encoding.cut,
        )
    return [Chunk(np.array(encoding.ids), np.ones(max_tokens, dtype=np.float32))]


def _weighted_chunks(tokenizer: Tokenizer, field: str, text: str, max_tokens: int) -> list[Chunk]:
    room = max_tokens - 2
    words = learned_ids(tokenizer.learned_words, tokenizer.vocab_size)
    following = {ids[0]: len(ids) - 1 for ids in words}
    try:
        parts = [
            [
                Token(token, fragment.weight, following.get(token, 0))
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
    return [_chunk(chunk, tokenizer, max_tokens) for chunk in chunks]


def _chunk(tokens: Sequence[Token], tokenizer: Tokenizer, max_tokens: int) -> Chunk:
    """Add start token, end token and padding, all of weight 1."""
    ids = np.full(max_tokens, _PADDING, dtype=np.int64)
    weights = np.ones(max_tokens, dtype=np.float32)
    end = len(tokens) + 1
    ids[0], ids[1:end], ids[end] = (
        tokenizer.start_id,
        [each.id for each in tokens],
        tokenizer.end_id,
    )
    weights[1:end] = [each.weight for each in tokens]
    return Chunk(ids, weights)
