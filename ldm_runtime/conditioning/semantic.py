"""A semantic map behind the latents: a class for every pixel, brought to their size."""

import numpy as np

from ldm_runtime.conditioning.contract import Conditioning, OpenNetwork
from ldm_runtime.manifest import ModelSpec
from ldm_runtime.request import GenerationRequest
from ldm_runtime.tokenizers import Tokenizer


def encode_segmentation(
    network: OpenNetwork, _tokenizer: Tokenizer | None, request: GenerationRequest, _: ModelSpec
) -> Conditioning:
    """Return concat (1, c, h, w) of a map that is drawn in the size of the picture.

    See `ldm_runtime.conditioning.encode_conditioning`.
    """
    assert request.segmentation is not None, "the request is not resolved"
    assert request.height is not None, "the request is not resolved"
    assert request.width is not None, "the request is not resolved"
    classes = request.segmentation.resized(request.width, request.height)
    ids = classes.ids[None].astype(np.int64)
    return Conditioning(concat=network("rescaler").run({"segmentation": ids})["concat"])
