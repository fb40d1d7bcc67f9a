"""A denoiser of two experts: one model for the high noise levels, its refiner for the low ones."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ldm_runtime.samplers import Denoise
from ldm_runtime.schedules import SigmaTable, timestep_of

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RefinedDenoiser:
    """A denoiser that asks the refiner at the noise levels that are left to it.

    The sampler sees one denoiser, so that it goes on as before: its noise, and what it remembers of
    earlier steps, are those of a run of one model. Both must have the same latents and the same
    training schedule.

    Source: Balaji et al. 2022 (arXiv:2211.01324), section 4, two experts; Podell et al. 2023
    (arXiv:2307.01952), section 2.5. diffusers makes two runs, of which the second forgets the steps
    of the first.

    Attributes:
        base: The denoiser of the base model.
        open_refiner: Returns that of the refiner, when it is first needed.
        first_timestep: The training timestep below which the refiner takes over.
        training_sigmas: Noise level of every training timestep.
    """

    base: Denoise
    open_refiner: Callable[[], Denoise]
    first_timestep: int
    training_sigmas: SigmaTable

    def __call__(self, latents: Float32Array, sigma: float) -> Float32Array:
        """Predict x0 from `latents` (B, C, h, w) at noise level `sigma`."""
        if timestep_of(sigma, self.training_sigmas) >= self.first_timestep:
            return self.base(latents, sigma)
        return self._refiner(latents, sigma)

    @cached_property
    def _refiner(self) -> Denoise:
        return self.open_refiner()
