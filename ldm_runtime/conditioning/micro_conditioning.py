"""Features of micro-conditioning, the numbers about an image in the vector of SDXL's UNets."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.specs.micro_conditioning import NUM_FEATURES, MicroConditioningKind

Float32Array = npt.NDArray[np.float32]

_LONGEST_PERIOD = 10_000


def embed_micro_conditioning(request: ResolvedRequest, kind: MicroConditioningKind) -> Float32Array:
    """Return features of the numbers that a UNet takes, one row for each half of guidance.

    Returns:
        (2, V), of the unconditional half first, or (1, V) without guidance; V is 256 times the
        count of numbers.
    """
    halves = (True, False) if request.is_guided else (False,)
    numbers = [request.micro_conditioning.numbers(kind, negative=half) for half in halves]
    return np.stack([sinusoidal_features(row) for row in numbers])


def sinusoidal_features(numbers: Sequence[float], count: int = NUM_FEATURES) -> Float32Array:
    """Return `count` features of each of N numbers, cosines before sines: (N * count,).

    They are those of a UNet's timesteps; `count` is even.
    """
    half = count // 2
    exponents = -math.log(_LONGEST_PERIOD) * np.arange(half, dtype=np.float32) / half
    angles = np.array(numbers, dtype=np.float32)[:, None] * np.exp(exponents, dtype=np.float32)
    features: Float32Array = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return features.reshape(-1)
