"""Features of micro-conditioning, the numbers about an image in the vector of SDXL's UNets."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ldm_runtime.conditioning.contract import Conditioning, Float32Array
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.specs.micro_conditioning import (
    NUM_FEATURES,
    MicroConditioningKind,
    micro_conditioning_kind,
    pooled_length,
)
from ldm_runtime.specs.model import ModelSpec

_LONGEST_PERIOD = 10_000


def embed_micro_conditioning(request: ResolvedRequest, kind: MicroConditioningKind) -> Float32Array:
    """Return features of the numbers that a UNet takes, one row for each half of guidance.

    They are those of the request's first pass.

    Returns:
        (2, V), of the unconditional half first, or (1, V) without guidance; V is 256 times the
        count of numbers.
    """
    halves = (True, False) if request.is_guided else (False,)
    told = request.passes[0].micro_conditioning
    numbers = [told.numbers(kind, negative=half) for half in halves]
    return np.stack([sinusoidal_features(row) for row in numbers])


def with_micro_conditioning(
    conditioning: Conditioning, request: ResolvedRequest, spec: ModelSpec
) -> Conditioning:
    """Return conditioning of the same prompts for a request whose images have another size.

    No network runs: the vector keeps its pooled prompts, and has the features of the numbers that
    the request's first pass has. Of two and more samples, all but the last are unconditional ones.
    Conditioning of a model without such numbers stays as it is.

    Args:
        conditioning: The conditioning.
        request: The request.
        spec: The model.
    """
    kind = micro_conditioning_kind(spec)
    if kind is None:
        return conditioning
    features, pooled = embed_micro_conditioning(request, kind), pooled_length(spec)

    def told(each: Conditioning) -> Conditioning:
        assert each.vector is not None, "a model with micro-conditioning has a vector"
        rows = features[[0] * (len(each.vector) - 1) + [-1]]
        return replace(each, vector=np.concatenate([each.vector[:, :pooled], rows], axis=1))

    return conditioning.changed(told)


def sinusoidal_features(numbers: Sequence[float], count: int = NUM_FEATURES) -> Float32Array:
    """Return `count` features of each of N numbers, cosines before sines: (N * count,).

    They are those of a UNet's timesteps; `count` is even.
    """
    half = count // 2
    exponents = -math.log(_LONGEST_PERIOD) * np.arange(half, dtype=np.float32) / half
    angles = np.array(numbers, dtype=np.float32)[:, None] * np.exp(exponents, dtype=np.float32)
    features: Float32Array = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return features.reshape(-1)
