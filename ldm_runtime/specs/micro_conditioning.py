"""Micro-conditioning of a model: the numbers about an image that its UNet takes next to the prompt.

The UNet's vector is the pooled prompt, followed by 256 features of each number. SDXL takes height
and width of the original image, top and left of the crop, and height and width of the target; its
refiner takes an aesthetic score in place of the target.

Source: Podell et al. 2023 (arXiv:2307.01952), sections 2.2 and 2.3, and the configurations of
Stability-AI/generative-models (0ad7de9).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.networks import TextEncoderSpec

#: The last of the numbers, in which the two kinds differ.
MicroConditioningKind = Literal["target size", "aesthetic score"]

#: Features of each number.
NUM_FEATURES = 256
_COUNTS: Mapping[MicroConditioningKind, int] = MappingProxyType(
    {"target size": 6, "aesthetic score": 5}
)


def pooled_length(spec: ModelSpec) -> int:
    """Return the length of the pooled outputs of a model's text encoders, side by side."""
    return sum(
        each.pooled_dim or 0 for each in spec.networks.values() if isinstance(each, TextEncoderSpec)
    )


def vector_lengths(spec: ModelSpec) -> Mapping[MicroConditioningKind, int]:
    """Return the length of a model's vector with either kind of micro-conditioning."""
    pooled = pooled_length(spec)
    return {kind: pooled + count * NUM_FEATURES for kind, count in _COUNTS.items()}


def micro_conditioning_kind(spec: ModelSpec) -> MicroConditioningKind | None:
    """Return the kind that a model's UNet takes, or None if it takes no such numbers."""
    if spec.unet is None or not pooled_length(spec):
        return None
    lengths = vector_lengths(spec).items()
    return next((kind for kind, length in lengths if length == spec.unet.vector_dim), None)
