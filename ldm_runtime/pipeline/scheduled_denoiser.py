"""A denoiser whose conditioning changes between steps: prompts that are edited, or alternate."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ldm_runtime.conditioning import Conditioning
from ldm_runtime.samplers import Denoise

Float32Array = npt.NDArray[np.float32]


@dataclass
class StepNumber:
    """The number of the step that the sampler makes now, as the loop around it counts.

    A denoiser cannot tell from the noise level: a sampler that calls it twice in a step may do so
    at the level at which the next one begins.
    """

    now: int


@dataclass(frozen=True, kw_only=True)
class ScheduledDenoiser:
    """A denoiser that asks one of several by the step, for every call in that step.

    The sampler sees one denoiser, so that it remembers earlier steps across a change of prompts.

    Source: AUTOMATIC1111/stable-diffusion-webui 1.10, `CFGDenoiser` in
    `modules/sd_samplers_cfg_denoiser.py`, which counts calls instead, from 0.

    Attributes:
        step: The step.
        conditioning: The conditioning, with edits.
        denoiser_of: Returns the denoiser of the conditioning of a step, which is made once.
    """

    step: StepNumber
    conditioning: Conditioning
    denoiser_of: Callable[[Conditioning], Denoise]
    _made: dict[int, Denoise] = field(default_factory=dict)

    def __call__(self, latents: Float32Array, sigma: float) -> Float32Array:
        """Predict x0 from `latents` (B, C, h, w) at noise level `sigma`."""
        current = self.conditioning.at(self.step.now)
        if id(current) not in self._made:
            self._made[id(current)] = self.denoiser_of(current)
        return self._made[id(current)](latents, sigma)
