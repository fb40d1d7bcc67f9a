"""A class label as context: the learned row of its class."""

import numpy as np

from ldm_runtime.conditioning.contract import Conditioning, OpenNetwork
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.networks import ClassEmbedderSpec
from ldm_runtime.text import Tokenizer


def encode_class_label(
    network: OpenNetwork, _tokenizer: Tokenizer | None, request: GenerationRequest, spec: ModelSpec
) -> Conditioning:
    """Return context (2, 1, D), the null class first, or (1, 1, D) without guidance.

    See `ldm_runtime.conditioning.encode_conditioning`.
    """
    assert request.class_label is not None, "the request is not resolved"
    labels = [request.class_label]
    if request.guidance_scale != 1:
        null_class = spec.network(ClassEmbedderSpec).null_class
        assert null_class is not None, "the request is not resolved"
        labels.insert(0, null_class)
    tokens = np.array(labels, dtype=np.int64)
    return Conditioning(context=network("class_embedder").run({"class_labels": tokens})["context"])
