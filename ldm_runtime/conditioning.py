"""What each task feeds the UNet besides latents: for text, the context."""

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends import Runner
from ldm_runtime.errors import BundleError
from ldm_runtime.manifest import ModelSpec
from ldm_runtime.request import GenerationRequest
from ldm_runtime.tokenizers import ClipTokenizer

_LOGGER = logging.getLogger(__name__)

Float32Array = npt.NDArray[np.float32]


def open_tokenizer(path: Path, spec: ModelSpec) -> ClipTokenizer:
    """Open the tokenizer of a bundle.

    Raises:
        BundleError: The file is missing, malformed or larger than the text encoder's vocabulary.
    """
    try:
        tokenizer = ClipTokenizer.from_file(path)
    except (OSError, ValueError) as error:
        raise BundleError(f"{error}; export the bundle again") from error
    if tokenizer.vocab_size > spec.text_encoder.vocab_size:
        raise BundleError(
            f"{path} has {tokenizer.vocab_size} tokens, the text encoder knows "
            f"{spec.text_encoder.vocab_size}; export with the tokenizer it was trained with"
        )
    return tokenizer


def encode_prompts(
    engine: Runner, tokenizer: ClipTokenizer, request: GenerationRequest, spec: ModelSpec
) -> Float32Array:
    """Return the context of one image: (2, T, D), unconditional first, or (1, T, D) unguided.

    What a prompt has too much is logged as a warning.

    Args:
        engine: The text encoder.
        tokenizer: From `open_tokenizer`.
        request: A resolved request.
        spec: The model.
    """
    texts = {"prompt": request.prompt}
    if request.guidance_scale != 1:
        texts = {"negative_prompt": request.negative_prompt, **texts}
    tokens = np.array(
        [_encode(tokenizer, field, text, spec) for field, text in texts.items()], dtype=np.int64
    )
    context: Float32Array = engine.run({"tokens": tokens})["context"]
    return context


def _encode(tokenizer: ClipTokenizer, field: str, text: str, spec: ModelSpec) -> tuple[int, ...]:
    record = spec.text_encoder
    encoding = tokenizer.encode(text, record.max_tokens, pad_token_id=record.pad_token_id)
    if encoding.cut:
        _LOGGER.warning(
            "%s is longer than %d tokens; left out: %r",
            field,
            record.max_tokens - 2,
            encoding.cut,
        )
    return encoding.ids
