"""Features of the guidance scale, for UNets that take it as an input: latent consistency models."""

import math

import numpy as np
import numpy.typing as npt

from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.specs.model import ModelSpec

Float32Array = npt.NDArray[np.float32]

_LONGEST_PERIOD = 10_000
_SCALE = 1000  # brings scales to the range of timesteps, whose features these are


def embed_guidance(request: ResolvedRequest, spec: ModelSpec) -> Float32Array | None:
    """Return features (1, G) of a request's guidance scale, or None for a UNet without."""
    if spec.unet is None or spec.unet.guidance_dim is None:
        return None
    return guidance_features(request.guidance_scale, spec.unet.guidance_dim)


def guidance_features(guidance_scale: float, count: int) -> Float32Array:
    """Return the features (1, count) of a guidance scale, sines before cosines.

    They are of w = guidance_scale - 1, and 0 for the unguided model's scale of 1. The longest
    period belongs to the last sine and the last cosine, unlike in those of timesteps; of an odd
    number of features the last is zero.

    Source: Luo et al. 2023 (arXiv:2310.04378), section 4.2, as `get_guidance_scale_embedding` of
    its code (a9ad795) and of diffusers, which computes in float32.
    """
    half = count // 2
    exponents = np.arange(half, dtype=np.float32) * np.float32(
        -math.log(_LONGEST_PERIOD) / (half - 1)
    )
    angles = np.float32(guidance_scale - 1) * np.float32(_SCALE) * np.exp(exponents)
    features = np.zeros((1, count), dtype=np.float32)
    features[0, : 2 * half] = np.concatenate([np.sin(angles), np.cos(angles)])
    return features
