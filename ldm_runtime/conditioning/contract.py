"""Conditioning of the UNet, and the interface of the conditioners that encode it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends.contract import Runner
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.text import Tokenizer

Float32Array = npt.NDArray[np.float32]
#: Returns a network of the bundle by the name of its component.
OpenNetwork = Callable[[str], Runner]


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioning:
    """Inputs of the UNet in addition to latents and timesteps, for one image.

    Attributes:
        context: Keys and values of cross-attention: (2, T, D), unconditional first, with guidance,
            or (1, T, D) without, or a row for each of `ResolvedRequest.guidance.samples`; None for
            a model without cross-attention.
        vector: Added to the time embedding, with rows like the context; None for a model without.
        class_labels: Class (1,) int64 for all samples, likewise; None for a model without.
        guidance: Features of the guidance scale, (1, G); None for a model without.
        concat: Channels concatenated to the latents: (1, c, h, w) for all samples, or with rows
            like the context; None for a model without.
    """

    context: Float32Array | None = None
    vector: Float32Array | None = None
    class_labels: npt.NDArray[np.int64] | None = None
    guidance: Float32Array | None = None
    concat: Float32Array | None = None


Encode = Callable[[OpenNetwork, Tokenizer | None, ResolvedRequest, ModelSpec], Conditioning]


class Conditioner(NamedTuple):
    """Conditioner of a task: it turns requests into conditioning.

    Attributes:
        encode: Takes networks by name, the bundle's tokenizer, a resolved request and the model.
        others: The components it needs in addition to the model's conditioners.
    """

    encode: Encode
    others: tuple[str, ...] = ()
