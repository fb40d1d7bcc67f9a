"""DPM-Solver and DPM-Solver++: exponential integrators in the logarithm of sigma."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from ldm_runtime.samplers.contract import Denoise, Draw, Latents, SamplerRecord


def dpmpp_2m(
    denoise: Denoise, latents: Latents, sigmas: Sequence[float], *, eta: float, draw: Draw
) -> Iterator[Latents]:
    """Second-order steps from one denoiser call each, by extrapolating x0 in log sigma.

    The first step, and one to sigma 0 (infinitely far in log sigma), are first order.

    Source: Lu et al. 2022 (arXiv:2211.01095), algorithm 2, DPM-Solver++(2M), with alpha 1;
    k-diffusion's `sample_dpmpp_2m`.
    """
    previous_x0: Latents | None = None
    previous_width = 0.0
    for sigma, sigma_next in pairwise(sigmas):
        x0 = target = denoise(latents, sigma)
        width = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        if previous_x0 is not None and sigma_next > 0:
            target = x0 + width / (2 * previous_width) * (x0 - previous_x0)
        latents = target + sigma_next / sigma * (latents - target)
        previous_x0, previous_width = x0, width
        yield latents


RECORDS = {
    "dpmpp_2m": SamplerRecord(
        function=dpmpp_2m,
        source="Lu et al. 2022 (arXiv:2211.01095), algorithm 2; k-diffusion, sample_dpmpp_2m",
        order=2,
    ),
}
