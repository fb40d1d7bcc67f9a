"""Second-order samplers with two denoiser calls per step: at its start, and at its end or half-way.

A step to sigma 0 makes one call and ends at the predicted x0.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

from ldm_runtime.samplers.contract import Denoise, Latents, NoiseSampler, SamplerRecord, split_step
from ldm_runtime.samplers.first_order import slope_at


def heun(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Straight steps along the mean of the slopes at both ends.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1; k-diffusion's `sample_heun`
    without churn.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(latents, sigma)
        end = x0 + sigma_next / sigma * (latents - x0)
        if sigma_next > 0:
            slope = (latents - x0) / sigma + slope_at(denoise, end, sigma_next)
            end = latents + (sigma_next - sigma) / 2 * slope
        latents = end
        yield latents


def dpm2_ancestral(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Straight steps along the slope half-way in log sigma, of which a share `eta` is noise.

    Source: k-diffusion's `sample_dpm_2_ancestral`, after DPM-Solver-2 of Lu et al. 2022
    (arXiv:2206.00927), algorithm 1.
    """
    return _ancestral(partial(_dpm2_step, denoise), latents, sigmas, eta, noise_sampler)


def dpm2(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """`dpm2_ancestral` without noise. Source: k-diffusion's `sample_dpm_2` without churn."""
    return dpm2_ancestral(denoise, latents, sigmas, eta=0.0, noise_sampler=noise_sampler)


def dpmpp_2s_ancestral(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Steps towards the x0 predicted half-way in log sigma, of which a share `eta` is noise.

    Source: Lu et al. 2022 (arXiv:2211.01095), algorithm 1, DPM-Solver++(2S) with r 1/2 and
    alpha 1; k-diffusion's `sample_dpmpp_2s_ancestral`.
    """
    return _ancestral(partial(_dpmpp_2s_step, denoise), latents, sigmas, eta, noise_sampler)


def _dpm2_step(denoise: Denoise, latents: Latents, sigma: float, sigma_next: float) -> Latents:
    if sigma_next == 0:
        return denoise(latents, sigma)
    middle, halfway = _halfway(denoise, latents, sigma, sigma_next)
    return latents + (sigma_next - sigma) * slope_at(denoise, halfway, middle)


def _dpmpp_2s_step(denoise: Denoise, latents: Latents, sigma: float, sigma_next: float) -> Latents:
    if sigma_next == 0:
        return denoise(latents, sigma)
    middle, halfway = _halfway(denoise, latents, sigma, sigma_next)
    x0 = denoise(halfway, middle)
    return x0 + sigma_next / sigma * (latents - x0)


def _halfway(
    denoise: Denoise, latents: Latents, sigma: float, sigma_next: float
) -> tuple[float, Latents]:
    """Return the sigma half-way in log sigma, and the latents there after an Euler step."""
    middle = math.sqrt(sigma * sigma_next)
    x0 = denoise(latents, sigma)
    return middle, x0 + middle / sigma * (latents - x0)


def _ancestral(
    step: Callable[[Latents, float, float], Latents],
    latents: Latents,
    sigmas: Sequence[float],
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Step below each next sigma and return to it with noise."""
    for sigma, sigma_next in pairwise(sigmas):
        sigma_down, sigma_up = split_step(sigma, sigma_next, eta)
        latents = step(latents, sigma, sigma_down)
        if sigma_up > 0:
            latents = latents + sigma_up * noise_sampler(sigma, sigma_next)
        yield latents


RECORDS = {
    "heun": SamplerRecord(
        function=heun,
        source="Karras et al. 2022 (arXiv:2206.00364), algorithm 1; k-diffusion, sample_heun",
        order=2,
        calls_per_step=2,
    ),
    "dpm2": SamplerRecord(
        function=dpm2,
        source="Lu et al. 2022 (arXiv:2206.00927), algorithm 1; k-diffusion, sample_dpm_2",
        order=2,
        calls_per_step=2,
    ),
    "dpm2_ancestral": SamplerRecord(
        function=dpm2_ancestral,
        source="k-diffusion, sample_dpm_2_ancestral",
        order=2,
        default_eta=1.0,
        uses_eta=True,
        calls_per_step=2,
    ),
    "dpmpp_2s_ancestral": SamplerRecord(
        function=dpmpp_2s_ancestral,
        source="Lu et al. 2022 (arXiv:2211.01095), algorithm 1; k-diffusion, "
        "sample_dpmpp_2s_ancestral",
        order=2,
        default_eta=1.0,
        uses_eta=True,
        calls_per_step=2,
    ),
}
