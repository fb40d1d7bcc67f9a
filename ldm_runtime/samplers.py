"""Samplers: generators that carry noisy latents down a list of sigmas.

Conventions, shared by every sampler in this file:

* latents  (B, C, h, w), scaled so that latents = x0 + sigma * noise.
* sigmas   num_steps + 1 Python floats, strictly decreasing. They end in 0, or above it: then the
           last latents still hold noise of that level.
* denoise  maps (latents, sigma) to the predicted clean latents x0, same shape.
* eta      share of fresh noise in a step, from 0 (none) to 1; unused by samplers without noise.
* draw     returns fresh standard normal noise shaped like latents. It is called once in each step
           that adds noise and never otherwise; nothing else is random.

A sampler yields the latents after each step and keeps no other state, so the caller owns progress
bars, early stopping and timing. Arrays are only added, subtracted, multiplied and divided, never
written to, so float32 and float64 both stay what they are.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Latents = npt.NDArray[np.float32]
Denoise = Callable[[Latents, float], Latents]
Draw = Callable[[], Latents]


class Sampler(Protocol):
    """What every sampler looks like; the module says what the arguments mean."""

    def __call__(
        self,
        denoise: Denoise,
        latents: Latents,
        sigmas: Sequence[float],
        *,
        eta: float,
        draw: Draw,
    ) -> Iterator[Latents]:
        """Yield the latents after each step."""
        ...


def ddim(
    denoise: Denoise, latents: Latents, sigmas: Sequence[float], *, eta: float, draw: Draw
) -> Iterator[Latents]:
    """First-order steps, of which a share `eta` is fresh noise.

    With eta 0 this is Euler's method on the probability-flow equation, with eta 1 ancestral
    sampling: DDIM, Euler and Euler ancestral are one function in these coordinates.

    Source: Song et al. 2021 (arXiv:2010.02502), equations 12 and 16, divided by sqrt(a_prev);
    k-diffusion's `sample_euler_ancestral`.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(latents, sigma)
        sigma_down, sigma_up = _split_step(sigma, sigma_next, eta)
        latents = x0 + sigma_down / sigma * (latents - x0)
        if sigma_up > 0:
            latents = latents + sigma_up * draw()
        yield latents


def euler(
    denoise: Denoise, latents: Latents, sigmas: Sequence[float], *, eta: float, draw: Draw
) -> Iterator[Latents]:
    """Euler's method on the probability-flow equation: `ddim` without noise.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1 without the correction.
    """
    return ddim(denoise, latents, sigmas, eta=0.0, draw=draw)


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


def _split_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Return the sigma to go down to, and that of the noise to add to reach `sigma_next`."""
    sigma_up = eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
    sigma_up = min(sigma_next, sigma_up)  # binds only for eta above 1
    return math.sqrt(sigma_next**2 - sigma_up**2), sigma_up


@dataclass(frozen=True, kw_only=True)
class SamplerRecord:
    """A sampler and how it is used unless a request says otherwise.

    Attributes:
        function: The sampler.
        schedule: Name of its schedule in `ldm_runtime.schedules.SCHEDULES`.
        final_sigma: Where its last step leads, as in `schedules.sampling_sigmas`.
        default_eta: The `eta` it gets.
        uses_eta: Whether `eta` makes a difference to it.
        calls_per_step: Denoiser calls a step.
    """

    function: Sampler
    schedule: str = "leading"
    final_sigma: Literal["zero", "smallest"] = "zero"
    default_eta: float = 0.0
    uses_eta: bool = False
    calls_per_step: int = 1


SAMPLERS: Mapping[str, SamplerRecord] = MappingProxyType(
    {
        "ddim": SamplerRecord(function=ddim, final_sigma="smallest", uses_eta=True),
        "euler": SamplerRecord(function=euler),
        "euler_ancestral": SamplerRecord(function=ddim, default_eta=1.0, uses_eta=True),
        "dpmpp_2m": SamplerRecord(function=dpmpp_2m),
    }
)
