"""A class label as context: the learned embedding of its class."""

import numpy as np

from ldm_runtime.conditioning.contract import Conditioning, OpenNetwork
from ldm_runtime.requests.resolved import ClassCondition, ResolvedRequest
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.networks import ClassEmbedderSpec
from ldm_runtime.text import Tokenizer


def encode_class_label(
    network: OpenNetwork, _tokenizer: Tokenizer | None, request: ResolvedRequest, spec: ModelSpec
) -> Conditioning:
    """Return context (2, 1, D), the null class first, or (1, 1, D) without guidance.

    See `ldm_runtime.conditioning.encode_conditioning`.
    """
    labels = [request.condition_as(ClassCondition).label]
    if request.is_guided:
        null_class = spec.network(ClassEmbedderSpec).null_class
        assert null_class is not None, "only a model with a null class is guided"
        labels.insert(0, null_class)
    tokens = np.array(labels, dtype=np.int64)
    return Conditioning(context=network("class_embedder").run({"class_labels": tokens})["context"])
