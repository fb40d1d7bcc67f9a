"""What conditions a network, and what it takes to find out."""

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
    """What the UNet is fed besides latents and timesteps, for one image.

    Attributes:
        context: What cross-attention attends to: (2, T, D), unconditional first, with guidance, or
            (1, T, D) without; None for a model without cross-attention.
        concat: What lies behind the latents, channel by channel: (1, c, h, w), or None. Guidance
            has it in both halves.
    """

    context: Float32Array | None = None
    concat: Float32Array | None = None


Encode = Callable[[OpenNetwork, Tokenizer | None, ResolvedRequest, ModelSpec], Conditioning]


class Conditioner(NamedTuple):
    """How the requests of a task become conditioning.

    Attributes:
        encode: Takes networks by name, the bundle's tokenizer, a resolved request and the model.
        others: The components it asks for besides the model's conditioners.
    """

    encode: Encode
    others: tuple[str, ...] = ()
