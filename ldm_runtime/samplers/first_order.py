"""First-order samplers: one denoiser call, one straight step."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from ldm_runtime.samplers.contract import (
    Denoise,
    Latents,
    NoiseSampler,
    SamplerRecord,
    ancestral_step,
)


def ddim(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """First-order steps, of which a share `eta` is fresh noise.

    With eta 0 this is Euler's method on the probability-flow equation, with eta 1 ancestral
    sampling: DDIM, Euler and Euler ancestral are one function in these coordinates.

    Source: Song et al. 2021 (arXiv:2010.02502), equations 12 and 16, divided by sqrt(a_prev);
    k-diffusion's `sample_euler_ancestral`.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(latents, sigma)
        latents = ancestral_step(latents, x0, sigma, sigma_next, eta, noise_sampler)
        yield latents


def euler(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Euler's method on the probability-flow equation: `ddim` without noise.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1 without the correction.
    """
    return ddim(denoise, latents, sigmas, eta=0.0, noise_sampler=noise_sampler)


def ddpm(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Ancestral sampling with the posterior's own variance, beta-tilde: `ddim` with eta 1.

    Source: Ho et al. 2020 (arXiv:2006.11239), equations 6 and 7, over the timesteps visited;
    CompVis' `p_sample_loop`, which visits all.
    """
    return ddim(denoise, latents, sigmas, eta=1.0, noise_sampler=noise_sampler)


def slope_at(denoise: Denoise, latents: Latents, sigma: float) -> Latents:
    """Return d latents / d sigma of the probability-flow equation, which is the predicted noise.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1, line 4.
    """
    return (latents - denoise(latents, sigma)) / sigma


RECORDS = {
    "ddpm": SamplerRecord(
        function=ddpm,
        source="Ho et al. 2020 (arXiv:2006.11239), equations 6 and 7; CompVis, p_sample_loop",
        default_eta=1.0,
    ),
    "ddim": SamplerRecord(
        function=ddim,
        source="Song et al. 2021 (arXiv:2010.02502); CompVis' DDIMSampler",
        final_sigma="smallest",
        uses_eta=True,
    ),
    "euler": SamplerRecord(
        function=euler, source="Karras et al. 2022 (arXiv:2206.00364), algorithm 1"
    ),
    "euler_ancestral": SamplerRecord(
        function=ddim,
        source="k-diffusion, sample_euler_ancestral",
        default_eta=1.0,
        uses_eta=True,
    ),
}
