"""Shared parts of the solvers in log sigma: one exact step, and how x0 changes on the way.

In lambda = -log(sigma) the equation of the latents is linear but for x0, so a step is solved
exactly for an x0 that stays the same or changes as a polynomial. The papers write alpha and sigma
of variance-preserving latents; here latents are divided by alpha, so their alpha is 1 and their
sigma / alpha is our sigma.
"""

import math
from collections.abc import Iterator, Sequence
from functools import wraps
from itertools import pairwise

from ldm_runtime.samplers.contract import Denoise, Latents, NoiseSampler, Sampler

#: The last predictions of x0, newest first, each with the width in lambda of the step it began.
History = Sequence[tuple[Latents, float]]


def width_of(sigma: float, sigma_next: float) -> float:
    """Return how far the step goes in lambda; infinitely far to sigma 0."""
    return math.log(sigma / sigma_next) if sigma_next > 0 else math.inf


def exponential_step(
    latents: Latents,
    target: Latents,
    sigma: float,
    sigma_next: float,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Latents:
    """Step to `sigma_next` as if x0 stayed at `target`, with a share `eta` of fresh noise.

    Source: k-diffusion's `sample_dpmpp_2m_sde`. With eta 0 this is DDIM without noise, with eta 1
    the first-order SDE-DPM-Solver++ of Lu et al. 2022 (arXiv:2211.01095).
    """
    ratio = sigma_next / sigma
    latents = target + ratio ** (1 + eta) * (latents - target)
    sigma_up = sigma_next * math.sqrt(1 - ratio ** (2 * eta))
    return latents + sigma_up * noise_sampler(sigma, sigma_next) if sigma_up > 0 else latents


def middle_of_step(x0: Latents, history: History, width: float) -> Latents:
    """Extrapolate x0 in a straight line over lambda to the middle of a step of `width`."""
    earlier_x0, earlier_width = history[0]
    return x0 + width / (2 * earlier_width) * (x0 - earlier_x0)


def passing_over_repeats(sampler: Sampler) -> Sampler:
    """Yield the latents once more for a sigma that is visited twice, and take no step.

    The schedule `ldm_quadratic` repeats sigmas, and two predictions from one sigma have no slope.
    A run that begins with a repeat asks for a prediction there, which the sampler does not see.
    """

    @wraps(sampler)
    def passing(
        denoise: Denoise,
        latents: Latents,
        sigmas: Sequence[float],
        *,
        eta: float,
        noise_sampler: NoiseSampler,
    ) -> Iterator[Latents]:
        distinct = list(dict.fromkeys(sigmas))
        steps = sampler(denoise, latents, distinct, eta=eta, noise_sampler=noise_sampler)
        if distinct[:2] != list(sigmas[:2]):
            denoise(latents, sigmas[0])
        for sigma, sigma_next in pairwise(sigmas):
            latents = next(steps) if sigma_next < sigma else latents
            yield latents

    return passing
