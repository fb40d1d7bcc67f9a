"""Prompts as context: weights, chunks and padding."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from ldm_runtime.requests.log_records import ABOUT_REQUEST
from ldm_runtime.requests.resolved import PromptCondition, ResolvedRequest
from ldm_runtime.requests.scheduled_prompts import prompt_texts, scheduled_prompts
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
        field: The field of the prompt that it is of, for errors.
        ids: (max_tokens,) int64: start token, text, end token, and `_PADDING`, for which each text
            encoder has a token of its own. Those of learned words follow the vocabulary's.
        weights: (max_tokens,) float32: 1 for all but the text.
    """

    field: str
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
    if tokenizer is None or not isinstance(request.condition, PromptCondition):
        return {}
    if not tokenizer.learned_words:  # spares every other request a second look at its prompts
        return {}
    found = {token for _, text in prompt_texts(request) for token in tokenizer.token_ids(text)}
    words = tokenizer.learned_words
    ids = learned_ids(words, tokenizer.vocab_size)
    return {
        word.text: word.sha256 for word, each in zip(words, ids, strict=True) if each[0] in found
    }


def most_chunks(request: ResolvedRequest, spec: ModelSpec) -> int:
    """Return about how many chunks a text encoder reads for a request, rather too many.

    No tokenizer is asked: a token is taken to be a byte of the text, and most are more.
    """
    if not isinstance(request.condition, PromptCondition):
        return 0
    texts = {text for each in scheduled_prompts(request) for text in each.texts}
    if request.condition.literal:
        return len(texts)
    room = spec.network(TextEncoderSpec).max_tokens - 2
    longest = max(text.count("BREAK") + len(text.encode()) // room for _, text in texts)
    return len(texts) * min(1 + longest, MAX_CHUNKS)


def encode_text(
    network: OpenNetwork, tokenizer: Tokenizer | None, request: ResolvedRequest, spec: ModelSpec
) -> Conditioning:
    """Return context (2, T, D), of the negative prompt first, or (1, T, D) without guidance.

    T is the text encoder's `max_tokens` times the number of chunks that the longest text takes;
    the others are filled up with empty chunks. Each chunk is encoded alone, then weighted. A
    literal prompt has one chunk without weights; the text that is cut off is logged as a warning.

    Two text encoders encode the same chunks, and their contexts are side by side in D. A model with
    a vector (2, V) gets it from the pooled output of the first chunk and from micro-conditioning.
    Where the model's null prompt is zeros, an empty negative prompt is.

    Of a prompt that changes between steps every text is encoded, once.

    See `ldm_runtime.conditioning.encode_conditioning`.

    Raises:
        RequestError: A prompt takes too many chunks, or its weights are invalid.
    """
    assert tokenizer is not None, "the bundle has no tokenizer"
    condition = request.condition_as(PromptCondition)
    prompts = scheduled_prompts(request)
    texts = tuple(dict.fromkeys(text for each in prompts for text in each.texts))
    max_tokens = spec.network(TextEncoderSpec).max_tokens
    chunks = _chunks_of(tokenizer, texts, max_tokens, literal=condition.literal)
    encoded = [
        _encode(
            network(name),
            chunks,
            partial(_inputs, name, record, tokenizer, condition.clip_skip),
            texts_per_call=len(prompts[0].texts),
        )
        for name, record in spec.networks.items()
        if isinstance(record, TextEncoderSpec)
    ]
    rows = {text: row for row, text in enumerate(texts)}
    found = {
        texts: _conditioning(
            [each.of([rows[text] for text in texts]) for each in encoded],
            request,
            spec,
            has_zeros=spec.null_prompt == "zeros" and ("negative_prompt", "") in texts,
        )
        for texts in dict.fromkeys(each.texts for each in prompts)
    }
    first = found[prompts[0].texts]
    if len(prompts) == 1:
        return first
    return replace(first, edits={each.first_step: found[each.texts] for each in prompts})


@dataclass(frozen=True, kw_only=True, eq=False)
class _Encoded:
    """Texts, encoded by one text encoder.

    Attributes:
        context: (number of texts, T, D).
        pooled: (number of texts, P), or None.
    """

    context: Float32Array
    pooled: Float32Array | None

    def of(self, rows: Sequence[int]) -> "_Encoded":
        """Return some of them."""
        pooled = None if self.pooled is None else self.pooled[rows]
        return _Encoded(context=self.context[rows], pooled=pooled)


def _conditioning(
    encoded: Sequence[_Encoded], request: ResolvedRequest, spec: ModelSpec, *, has_zeros: bool
) -> Conditioning:
    """Return the conditioning of the prompts of a step, each encoded by all text encoders.

    Args:
        encoded: By text encoder; the negative prompt first, if there is guidance.
        request: The request.
        spec: The model.
        has_zeros: Whether the negative prompt is zeros.
    """
    context = np.concatenate([each.context for each in encoded], axis=2)
    vector = _vector(encoded, request, spec)
    if has_zeros:
        context[0] = 0
        if vector is not None:
            vector[0, : pooled_length(spec)] = 0
    return Conditioning(context=context, vector=vector)


def _chunks_of(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], max_tokens: int, *, literal: bool
) -> list[tuple[Chunk, ...]]:
    """Return the chunks of all texts, first the first of each."""
    read = _literal_chunk if literal else _weighted_chunks
    chunks = [read(tokenizer, field, text, max_tokens) for field, text in texts]
    return list(zip_longest(*chunks, fillvalue=_chunk("", (), tokenizer, max_tokens)))


def _encode(
    engine: Runner,
    chunks: Sequence[Sequence[Chunk]],
    inputs: Callable[[npt.NDArray[np.int64]], Tensors],
    *,
    texts_per_call: int,
) -> _Encoded:
    """Encode chunks; one call for each keeps the batch size independent of the prompts' length."""
    parts = []
    for each in chunks:
        ids = np.stack([chunk.ids for chunk in each])
        starts = range(0, len(ids), texts_per_call)
        outputs = [engine.run(inputs(ids[start : start + texts_per_call])) for start in starts]
        parts.append({name: np.concatenate([one[name] for one in outputs]) for name in outputs[0]})
    contexts = [
        np.stack(
            [
                _weighted(chunk, context)
                for chunk, context in zip(each, part["context"], strict=True)
            ]
        )
        for each, part in zip(chunks, parts, strict=True)
    ]
    return _Encoded(context=np.concatenate(contexts, axis=1), pooled=parts[0].get("pooled"))


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


def _weighted(chunk: Chunk, context: Float32Array) -> Float32Array:
    """Multiply a chunk's context (T, D) with its weights (T,), then restore its mean.

    Source: AUTOMATIC1111/stable-diffusion-webui 1.10, "Original" in `modules/sd_emphasis.py`.
    """
    if (chunk.weights == 1).all():
        return context
    weighted = context * chunk.weights[:, None]
    mean = float(weighted.mean(dtype=np.float64))
    if mean == 0:
        raise RequestError(chunk.field, "its weights cancel each other; change one of them")
    return weighted * (float(context.mean(dtype=np.float64)) / mean)


def _literal_chunk(tokenizer: Tokenizer, field: str, text: str, max_tokens: int) -> list[Chunk]:
    encoding = tokenizer.encode(text, max_tokens, pad_token_id=_PADDING)
    if encoding.cut:
        _LOGGER.warning(
            "%s is longer than %d tokens; left out: %r",
            field,
            max_tokens - 2,
            encoding.cut,
            extra=ABOUT_REQUEST,
        )
    return [Chunk(field, np.array(encoding.ids), np.ones(max_tokens, dtype=np.float32))]


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
    return [_chunk(field, chunk, tokenizer, max_tokens) for chunk in chunks]


def _chunk(field: str, tokens: Sequence[Token], tokenizer: Tokenizer, max_tokens: int) -> Chunk:
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
    return Chunk(field, ids, weights)
