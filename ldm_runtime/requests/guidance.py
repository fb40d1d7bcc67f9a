"""Guidance of a request: the samples that an image asks of the UNet, and the scales between them.

The samples are a chain, each of which sees more of the request than the one before it, and guidance
extrapolates along every link: the prediction is p0 + s1 * (p1 - p0) + s2 * (p2 - p1).

Sources: classifier-free guidance is Ho and Salimans 2022 (arXiv:2207.12598), equation 6 with
w = guidance_scale - 1; with an image and an instruction, Brooks et al. 2023 (arXiv:2211.09800),
equation 3.
"""

from dataclasses import dataclass
from typing import Literal

#: What a sample of the UNet sees of a request: nothing, only what is concatenated to the latents
#: (if anything is), or everything.
Seen = Literal["nothing", "concat", "everything"]

_CHAIN: tuple[Seen, ...] = ("nothing", "concat", "everything")


@dataclass(frozen=True, kw_only=True)
class GuidanceChain:
    """The samples that one image asks of the UNet, as far as they weigh something.

    Attributes:
        samples: What each of them sees; the last one everything.
        scales: Guidance scale between each sample and the next; none without guidance.
    """

    samples: tuple[Seen, ...]
    scales: tuple[float, ...]


def guidance_chain(guidance_scale: float, image_guidance_scale: float) -> GuidanceChain:
    """Return the samples and scales of a request.

    Args:
        guidance_scale: Scale from what is concatenated alone to everything; 1 is none.
        image_guidance_scale: Scale from nothing to what is concatenated; 1 is none, as in every
            model whose null condition keeps what is concatenated.
    """
    # The prediction is also a weighted sum, in which sample k weighs scales[k] - scales[k + 1].
    scales = (1.0, image_guidance_scale, guidance_scale)
    last = len(_CHAIN) - 1
    kept = [k for k in range(len(_CHAIN)) if k == last or scales[k] != scales[k + 1]]
    return GuidanceChain(
        samples=tuple(_CHAIN[k] for k in kept), scales=tuple(scales[k] for k in kept[1:])
    )
