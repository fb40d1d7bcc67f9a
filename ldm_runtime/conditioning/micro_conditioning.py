"""The vector of SDXL: a pooled prompt and numbers about the image, added to the time embedding.

Source: Podell et al. 2023 (arXiv:2307.01952), sections 2.2 and 2.3, and the configurations of
Stability-AI/generative-models (0ad7de9).
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.networks import TextEncoderSpec

Float32Array = npt.NDArray[np.float32]

_FEATURES = 256  # of each number
_LONGEST_PERIOD = 10_000
#: Aesthetic scores that the refiner is told with the prompt, and with the negative prompt.
_SCORE, _NEGATIVE_SCORE = 6.0, 2.5
#: How many numbers the base model takes, and the refiner.
NUM_SIZES, NUM_SIZES_AND_SCORE = 6, 5


def num_features(count: int) -> int:
    """Return how many features a count of numbers becomes."""
    return count * _FEATURES


def pooled_length(spec: ModelSpec) -> int:
    """Return the length of the pooled outputs of a model's text encoders, side by side."""
    return sum(
        each.pooled_dim or 0 for each in spec.networks.values() if isinstance(each, TextEncoderSpec)
    )


def embed_image_facts(request: ResolvedRequest, spec: ModelSpec) -> Float32Array:
    """Return features of what a request says of its image, one row for each half of guidance.

    The image is said to have the size of the request, uncut. The base model takes height and width
    of the original, top and left of the crop, and height and width of the target; the refiner takes
    an aesthetic score in place of the target.

    Returns:
        (2, V), of the unconditional half first, or (1, V) without guidance; V is 256 times the
        count of numbers.
    """
    assert spec.unet is not None, "only a UNet takes a vector"
    original: tuple[float, ...] = (request.height, request.width, 0, 0)
    if (spec.unet.vector_dim or 0) - pooled_length(spec) == num_features(NUM_SIZES):
        rows = [(*original, request.height, request.width)] * 2
    else:
        rows = [(*original, _NEGATIVE_SCORE), (*original, _SCORE)]
    return np.stack([sinusoidal_features(row) for row in rows[not request.is_guided :]])


def sinusoidal_features(numbers: Sequence[float]) -> Float32Array:
    """Return the features of numbers, 256 of each, cosines before sines: (256 * count,)."""
    half = _FEATURES // 2
    exponents = -math.log(_LONGEST_PERIOD) * np.arange(half, dtype=np.float32) / half
    angles = np.array(numbers, dtype=np.float32)[:, None] * np.exp(exponents, dtype=np.float32)
    features: Float32Array = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return features.reshape(-1)
