"""Samplers of distilled models that predict where a whole trajectory ends: one call, one jump."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

from ldm_runtime.samplers.contract import (
    ByTimestep,
    Denoise,
    EarlierSigma,
    Latents,
    NoiseSampler,
    Sampler,
    SamplerRecord,
)


def lcm(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Jump to x0 and add fresh noise in every step: for latent consistency models.

    The scalings c_skip and c_out, which make a network a consistency function, are part of that
    function and so of `denoise`. They differ from 0 and 1 by less than 1e-5 at the timesteps
    that these models are distilled at.

    Source: Luo et al. 2023 (arXiv:2310.04378), multistep sampling, divided by alpha; the
    `sample_lcm` that programs built on k-diffusion share.
    """
    for sigma, sigma_next in pairwise(sigmas):
        latents = denoise(latents, sigma)
        if sigma_next > 0:
            latents = latents + sigma_next * noise_sampler(sigma, sigma_next)
        yield latents


def tcd(earlier_sigma: EarlierSigma) -> Sampler:
    """Return strategic stochastic sampling for trajectory consistency models.

    Each step goes straight to the sigma at 1 - eta of the next timestep, and back up to the next
    sigma with fresh noise; eta is the gamma of the paper. With eta 0 this is `ddim` without noise,
    and with eta 1 it is `lcm` but for the smallest training sigma, at which its jumps end.

    Source: Zheng et al. 2024 (arXiv:2402.19159), algorithm 4, divided by alpha; diffusers'
    `TCDScheduler`.
    """
    return partial(_tcd, earlier_sigma)


def _tcd(
    earlier_sigma: EarlierSigma,
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    for sigma, sigma_next in pairwise(sigmas):
        sigma_down = sigma_next
        if eta > 0:
            sigma_down = min(sigma_next, earlier_sigma(sigma_next, 1 - eta))
        x0 = denoise(latents, sigma)
        latents = x0 + sigma_down / sigma * (latents - x0)
        sigma_up = math.sqrt(sigma_next**2 - sigma_down**2)
        if sigma_up > 0:
            latents = latents + sigma_up * noise_sampler(sigma, sigma_next)
        yield latents


RECORDS = {
    "lcm": SamplerRecord(
        function=lcm,
        source="Luo et al. 2023 (arXiv:2310.04378), multistep sampling",
        schedule="trailing",
        default_eta=1.0,
    ),
    "tcd": SamplerRecord(
        function=ByTimestep(tcd),
        source="Zheng et al. 2024 (arXiv:2402.19159), strategic stochastic sampling",
        schedule="consistency",
        final_sigma="smallest",
        default_eta=0.3,
        uses_eta=True,
    ),
}
