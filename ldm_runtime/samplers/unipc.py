"""UniPC: a predictor in log sigma whose result the next denoiser call corrects."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from ldm_runtime.samplers.contract import Denoise, Latents, NoiseSampler, SamplerRecord
from ldm_runtime.samplers.exponential import (
    History,
    exponential_step,
    middle_of_step,
    passing_over_repeats,
    width_of,
)


@passing_over_repeats
def unipc(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Second-order predictor and corrector with one denoiser call for both.

    The prediction of x0 at the end of a step first corrects that step and then predicts the next,
    so what is yielded is not yet corrected. The first and the last step are predicted in first
    order, the last is not corrected. The predictor alone is `dpmpp_2m`.

    Source: Zhao et al. 2023 (arXiv:2302.04867), UniPC-2 with B_2(h) = e^h - 1 and x0 prediction,
    algorithms 1 and 2; its repository and diffusers, "bh2" with `lower_order_final`.
    """
    history: History = ()
    start, last = latents, len(sigmas) - 2
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(latents, sigma)
        if history:
            target = _corrected_target(x0, history)
            start = exponential_step(start, target, sigmas[index - 1], sigma, 0.0, noise_sampler)
        width = width_of(sigma, sigma_next)
        target = middle_of_step(x0, history, width) if history and index < last else x0
        latents = exponential_step(start, target, sigma, sigma_next, 0.0, noise_sampler)
        history = ((x0, width), *history[:1])
        yield latents


def _corrected_target(end_x0: Latents, history: History) -> Latents:
    """The x0 to step to over the last step, from the predictions before, at and after its start."""
    x0, width = history[0]
    if len(history) == 1:
        return x0 + 0.5 * (end_x0 - x0)
    earlier_x0, earlier_width = history[1]
    earlier_weight, end_weight = _corrector_weights(width, earlier_width)
    before: Latents = earlier_weight * (x0 - earlier_x0)
    after: Latents = end_weight * (end_x0 - x0)
    return x0 + before + after


def _corrector_weights(width: float, earlier_width: float) -> tuple[float, float]:
    """Solve the two equations that make the corrector exact for x0 linear and quadratic in lambda.

    Source: the paper's R(h) rho = B(h)^-1 phi(h) of order 2, with r_1 = -earlier_width / width and
    r_2 = 1.
    """
    reach, ratio = -math.expm1(-width), -earlier_width / width
    linear = 1 / reach - 1 / width
    quadratic = 1 / reach - 2 * linear / width
    earlier = (linear - quadratic) / (1 - ratio)
    return -earlier / ratio, linear - earlier


RECORDS = {
    "unipc": SamplerRecord(
        function=unipc, source="Zhao et al. 2023 (arXiv:2302.04867), UniPC-2, B_2(h)", order=2
    ),
}
