"""Samplers of the reverse stochastic equation, which take their noise from a Brownian path.

With eta 1 they follow the stochastic equation that reverses the adding of noise, with eta 0 the
probability-flow equation, and between them a mixture. A step that adds no noise samples none.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from ldm_runtime.samplers.contract import (
    Denoise,
    Latents,
    NoiseSampler,
    SamplerRecord,
    ancestral_step,
)
from ldm_runtime.samplers.exponential import (
    History,
    exponential_step,
    middle_of_step,
    passing_over_repeats,
    width_of,
)


@passing_over_repeats
def dpmpp_2m_sde(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Second-order steps from one denoiser call each, by extrapolating x0 in log sigma.

    The first step, and one to sigma 0 (infinitely far in log sigma), are first order.

    Source: k-diffusion's `sample_dpmpp_2m_sde`, solver type "midpoint"; with eta 1, Lu et al. 2022
    (arXiv:2211.01095), SDE-DPM-Solver++(2M).
    """
    history: History = ()
    for sigma, sigma_next in pairwise(sigmas):
        x0 = target = denoise(latents, sigma)
        width = width_of(sigma, sigma_next)
        if history and sigma_next > 0:
            target = middle_of_step(x0, history, width)
        latents = exponential_step(latents, target, sigma, sigma_next, eta, noise_sampler)
        history = ((x0, width),)
        yield latents


@passing_over_repeats
def dpmpp_3m_sde(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Steps from one denoiser call each, with the slope and curvature of x0 from three calls.

    The first step, and one to sigma 0, are first order. With eta 0 the order is 2, not 3: the
    curvature's coefficient, here and in multistep DPM-Solver++ of order 3, is half that of Taylor.

    Source: k-diffusion's `sample_dpmpp_3m_sde`.
    """
    history: History = ()
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(latents, sigma)
        latents = exponential_step(latents, x0, sigma, sigma_next, eta, noise_sampler)
        width = width_of(sigma, sigma_next)
        if history and sigma_next > 0:
            latents = latents + _change_by_bending(x0, history, width, eta)
        history = ((x0, width), *history[:1])
        yield latents


def _change_by_bending(x0: Latents, history: History, width: float, eta: float) -> Latents:
    """Change that the slope and the curvature of x0 over log sigma add to a step of `width`."""
    decay = width * (1 + eta)
    phi_2 = 1 + math.expm1(-decay) / decay
    phi_3 = phi_2 / decay - 0.5
    earlier_x0, earlier_width = history[0]
    slope: Latents = width / earlier_width * (x0 - earlier_x0)
    if len(history) == 1:
        return phi_2 * slope
    earliest_x0, earliest_width = history[1]
    earlier_slope: Latents = width / earliest_width * (earlier_x0 - earliest_x0)
    curvature: Latents = width / (earlier_width + earliest_width) * (slope - earlier_slope)
    slope_here: Latents = slope + earlier_width / width * curvature
    return phi_2 * slope_here - phi_3 * curvature


def dpmpp_sde(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Second-order steps by way of the middle in log sigma; two denoiser calls per step.

    A step to sigma 0 takes one call. The noise up to the middle and that of the whole step come
    from stretches of the path that overlap. With eta 0 this is DPM-Solver++(2S).

    Source: k-diffusion's `sample_dpmpp_sde` with r = 1/2.
    """
    for sigma, sigma_next in pairwise(sigmas):
        target = denoise(latents, sigma)
        if sigma_next > 0:
            middle = math.sqrt(sigma * sigma_next)
            guess = ancestral_step(latents, target, sigma, middle, eta, noise_sampler)
            target = denoise(guess, middle)
        latents = ancestral_step(latents, target, sigma, sigma_next, eta, noise_sampler)
        yield latents


RECORDS = {
    "dpmpp_sde": SamplerRecord(
        function=dpmpp_sde,
        source="k-diffusion, sample_dpmpp_sde",
        order=2,
        schedule="karras",
        default_eta=1.0,
        uses_eta=True,
        noise="brownian",
        calls_per_step=2,
    ),
    "dpmpp_2m_sde": SamplerRecord(
        function=dpmpp_2m_sde,
        source="k-diffusion, sample_dpmpp_2m_sde; Lu et al. 2022 (arXiv:2211.01095)",
        order=2,
        schedule="karras",
        default_eta=1.0,
        uses_eta=True,
        noise="brownian",
    ),
    "dpmpp_3m_sde": SamplerRecord(
        function=dpmpp_3m_sde,
        source="k-diffusion, sample_dpmpp_3m_sde",
        order=2,
        schedule="karras",
        default_eta=1.0,
        uses_eta=True,
        noise="brownian",
    ),
}
