"""The interface of samplers, and the steps they share.

Conventions of every sampler in this package:

* latents  (B, C, h, w), scaled so that latents = x0 + sigma * noise.
* sigmas   num_steps + 1 Python floats, strictly decreasing. They end in 0, or above it: then the
           last latents still hold noise of that level.
* denoise  maps (latents, sigma) to the predicted clean latents x0, same shape.
* eta      share of fresh noise in a step, from 0 (none) to 1; unused by samplers without noise.
* noise_sampler  maps (sigma, sigma_next) to the standard normal noise of the stretch from one level
           down to another, shaped like latents. Nothing else is random. A sampler whose record says
           "fresh" calls it once in each step that adds noise and never otherwise; one that says
           "brownian" gets increments of a Brownian path over sigma, divided by the root of the
           stretch's length, and may ask for stretches that overlap.

A sampler whose steps go by training timesteps is made for a model first: see `ByTimestep`.

A sampler calls `denoise` before it first yields, so that there is a prediction to show after every
step. It yields the latents after each step and keeps no other state, so the caller owns progress
bars, early stopping and timing. Arrays are only added, subtracted, multiplied and divided, never
written to, so float32 and float64 both stay what they are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Latents = npt.NDArray[np.float32]
Denoise = Callable[[Latents, float], Latents]
NoiseSampler = Callable[[float, float], Latents]
#: Maps (sigma, share) to the sigma at that share, 0 to 1, of sigma's training timestep.
EarlierSigma = Callable[[float, float], float]


class Sampler(Protocol):
    """A sampler; the module says what the arguments mean."""

    def __call__(
        self,
        denoise: Denoise,
        latents: Latents,
        sigmas: Sequence[float],
        *,
        eta: float,
        noise_sampler: NoiseSampler,
    ) -> Iterator[Latents]:
        """Yield the latents after each step."""
        ...


@dataclass(frozen=True)
class ByTimestep:
    """A sampler that needs more of a model's training schedule than the sigmas of a run.

    Attributes:
        make: Returns the sampler from a function that says which sigma has an earlier timestep.
    """

    make: Callable[[EarlierSigma], Sampler]


@dataclass(frozen=True, kw_only=True)
class SamplerRecord:
    """A sampler and how it is used unless a request says otherwise.

    Attributes:
        function: The sampler; `of` returns the one of a model.
        source: The paper or program it follows, in one line.
        order: Order of convergence of a whole run without noise, its start included.
        schedule: Name of its schedule in `ldm_runtime.schedules.SCHEDULES`.
        final_sigma: Where its last step leads, as in `schedules.sampling_sigmas`.
        default_eta: The `eta` it gets; 1 without `uses_eta` is a sampler that always adds noise.
        uses_eta: Whether `eta` makes a difference to it.
        noise: Noise that it asks for: independent, or increments of a Brownian path.
        calls_per_step: Denoiser calls of a step in the middle of a run.
    """

    function: Sampler | ByTimestep
    source: str
    order: int = 1
    schedule: str = "leading"
    final_sigma: Literal["zero", "smallest"] = "zero"
    default_eta: float = 0.0
    uses_eta: bool = False
    noise: Literal["fresh", "brownian"] = "fresh"
    calls_per_step: int = 1

    @property
    def goes_by_timestep(self) -> bool:
        """Whether it needs a model's training timesteps, which those of EDM have not."""
        return isinstance(self.function, ByTimestep)

    def of(self, earlier_sigma: EarlierSigma) -> Sampler:
        """Return the sampler of a model whose training schedule `earlier_sigma` knows."""
        if isinstance(self.function, ByTimestep):
            return self.function.make(earlier_sigma)
        return self.function


def split_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Return the sigma to go down to, and that of the noise to add to reach `sigma_next`.

    Source: Song et al. 2021 (arXiv:2010.02502), equation 16, in sigma; k-diffusion's
    `get_ancestral_step`.
    """
    sigma_up = eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
    sigma_up = min(sigma_next, sigma_up)  # binds only for eta above 1
    return math.sqrt(sigma_next**2 - sigma_up**2), sigma_up


def ancestral_step(
    latents: Latents,
    target: Latents,
    sigma: float,
    sigma_next: float,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Latents:
    """Step straight towards the x0 in `target`, below `sigma_next`, and return to it with noise."""
    sigma_down, sigma_up = split_step(sigma, sigma_next, eta)
    latents = target + sigma_down / sigma * (latents - target)
    return latents + sigma_up * noise_sampler(sigma, sigma_next) if sigma_up > 0 else latents
