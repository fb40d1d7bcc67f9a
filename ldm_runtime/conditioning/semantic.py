"""A segmentation map concatenated to the latents: a class per pixel, encoded to their size."""

import numpy as np

from ldm_runtime.conditioning.contract import Conditioning, OpenNetwork
from ldm_runtime.requests.resolved import ResolvedRequest, SegmentationCondition
from ldm_runtime.requests.sizes import padded_size
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.text import Tokenizer


def encode_segmentation(
    network: OpenNetwork, _tokenizer: Tokenizer | None, request: ResolvedRequest, spec: ModelSpec
) -> Conditioning:
    """Return concat (1, c, h, w) of a segmentation map, which is resized to the size of the image.

    It is padded to the size of the latents by repeating its right and lower edge.

    See `ldm_runtime.conditioning.encode_conditioning`.
    """
    segmentation = request.condition_as(SegmentationCondition).segmentation
    classes = segmentation.resized(request.width, request.height)
    height, width = padded_size(request, spec)
    missing = (0, height - request.height), (0, width - request.width)
    ids = np.pad(classes.ids, missing, mode="edge")[None].astype(np.int64)
    return Conditioning(concat=network("segmentation_encoder").run({"segmentation": ids})["concat"])
