"""DPM-Solver and DPM-Solver++: exponential integrators in the logarithm of sigma."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from ldm_runtime.samplers.contract import Denoise, Latents, NoiseSampler, SamplerRecord
from ldm_runtime.samplers.exponential import passing_over_repeats, width_of
from ldm_runtime.samplers.first_order import slope_at
from ldm_runtime.samplers.stochastic import dpmpp_2m_sde


def dpmpp_2m(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Second-order steps from one denoiser call each: `dpmpp_2m_sde` without noise.

    The first step, and one to sigma 0 (infinitely far in log sigma), are first order. This is also
    what CompVis' and Stability's `DPMSolverSampler` runs (multistep, order 2, x0 prediction) in 15
    steps and more; they end at the smallest training sigma, which they reach by a first-order step
    in runs of fewer than 15 steps (`lower_order_final=True`, CompVis/stable-diffusion 21f890f), and
    this by a second-order one.

    Source: Lu et al. 2022 (arXiv:2211.01095), algorithm 2, DPM-Solver++(2M), with alpha 1;
    k-diffusion's `sample_dpmpp_2m`.
    """
    return dpmpp_2m_sde(denoise, latents, sigmas, eta=0.0, noise_sampler=noise_sampler)


@passing_over_repeats
def dpm_solver(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Steps of order 3, 2 and 1 that share out the sigmas, one denoiser call at each.

    A step of order k goes over k sigmas and is built from their k predictions of the noise; what
    is yielded inside it are its less exact intermediate points. `singlestep_orders` shares out the
    sigmas above 0. A last step to sigma 0 ends at the denoised latents, as LDM's `denoise` does:
    S + 1 steps on "linspace" are LDM's S steps with it.

    A run converges with order 2, and with 3 if it has 2 steps above 0 more than a multiple of 3 (so
    none of first order) and their widths in log sigma change smoothly.

    Source: Lu et al. 2022 (arXiv:2206.00927), algorithms 1 and 2 and DPM-Solver-fast, as CompVis'
    stable-diffusion has them in ldm/models/diffusion/dpm_solver/dpm_solver.py: method "singlestep",
    order 3, noise prediction, solver type "dpm_solver".
    """
    above_zero = [sigma for sigma in sigmas if sigma > 0]
    first = 0
    for order in singlestep_orders(len(above_zero) - 1):
        points = _singlestep(denoise, latents, above_zero[first : first + order + 1])
        for latents in points:
            yield latents
        first += order
    if len(above_zero) < len(sigmas):
        yield denoise(latents, above_zero[-1])


def singlestep_orders(num_calls: int) -> list[int]:
    """Return orders that add up to `num_calls`: as many 3 as leave a 2, a 1, or a 2 and a 1.

    Source: CompVis' `get_orders_for_singlestep_solver`, order 3.
    """
    if num_calls == 0:
        return []
    rest = {0: [2, 1], 1: [1], 2: [2]}[num_calls % 3]
    return [3] * ((num_calls - sum(rest)) // 3) + rest


def _singlestep(denoise: Denoise, latents: Latents, sigmas: Sequence[float]) -> Iterator[Latents]:
    """One step of order len(sigmas) - 1 with its intermediate points."""
    start, order = latents, len(sigmas) - 1
    start_noise, last_width = latents, 0.0  # both set at the first sigma
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        noise = slope_at(denoise, latents, sigma)
        width, drop = width_of(sigmas[0], sigma_next), sigmas[0] - sigma_next
        if index == 0:
            start_noise = noise
            latents = start - drop * noise
        else:
            slope = width / last_width * (noise - start_noise)
            # sigma_next times (e^h - 1) / 2 in a step of order 2, else times (e^h - 1) / h - 1
            weight = drop / 2 if order == 2 else drop / width - sigma_next
            latents = start - drop * start_noise - weight * slope
        last_width = width
        yield latents


RECORDS = {
    "dpmpp_2m": SamplerRecord(
        function=dpmpp_2m,
        source="Lu et al. 2022 (arXiv:2211.01095), algorithm 2; k-diffusion, sample_dpmpp_2m",
        order=2,
    ),
    "dpm_solver": SamplerRecord(
        function=dpm_solver,
        source="Lu et al. 2022 (arXiv:2206.00927), DPM-Solver-fast; CompVis' dpm_solver.py",
        order=2,
        schedule="linspace",
    ),
}
