"""Embeddings of texts or images as context, such as CLIP's of retrieved neighbours."""

import numpy as np

from ldm_runtime.conditioning.contract import Conditioning, OpenNetwork
from ldm_runtime.requests.resolved import EmbeddingsCondition, ResolvedRequest
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.text import Tokenizer


def encode_embeddings(
    _network: OpenNetwork, _tokenizer: Tokenizer | None, request: ResolvedRequest, _: ModelSpec
) -> Conditioning:
    """Return context (2, k, D), zeros first, or (1, k, D) without guidance: vectors of norm 1.

    A vector of zeros has no direction and stays zero. Source: Blattmann et al. 2022
    (arXiv:2204.11824), and `knn2img.py` of CompVis/latent-diffusion for the zeros.

    See `ldm_runtime.conditioning.encode_conditioning`.
    """
    embeddings = request.condition_as(EmbeddingsCondition).embeddings.values
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    context = (embeddings / np.where(norms > 0, norms, 1.0)).astype(np.float32)[None]
    if request.is_guided:
        context = np.concatenate([np.zeros_like(context), context])
    return Conditioning(context=context)
