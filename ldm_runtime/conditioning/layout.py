"""A layout of labelled boxes as context: three tokens per box, encoded like a text."""

import numpy as np

from ldm_runtime.conditioning.contract import Conditioning, OpenNetwork
from ldm_runtime.inputs.layouts import layout_tokens
from ldm_runtime.requests.resolved import LayoutCondition, ResolvedRequest
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.networks import TextEncoderSpec
from ldm_runtime.text import Tokenizer


def encode_layout(
    network: OpenNetwork, _tokenizer: Tokenizer | None, request: ResolvedRequest, spec: ModelSpec
) -> Conditioning:
    """Return context (2, T, D), the layout without objects first, or (1, T, D) without guidance.

    See `ldm_runtime.conditioning.encode_conditioning`.
    """
    encoder = spec.network(TextEncoderSpec)
    layouts = [request.condition_as(LayoutCondition).objects]
    if request.is_guided:
        layouts.insert(0, ())
    tokens = np.stack([layout_tokens(each, encoder) for each in layouts])
    return Conditioning(context=network("text_encoder").run({"tokens": tokens})["context"])
