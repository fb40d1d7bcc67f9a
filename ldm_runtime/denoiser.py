"""From a network to a denoiser: input scaling, timestep, guidance and prediction type.

Samplers see `denoise(latents, sigma) -> x0` and none of what this module hides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ldm_runtime.manifest import PredictionType

Float32Array = npt.NDArray[np.float32]
#: Maps (latents, timesteps, context) to the prediction; latents have unit variance here.
Network = Callable[[Float32Array, Float32Array, Float32Array], Float32Array]


def to_x0(
    prediction: Float32Array,
    latents: Float32Array,
    sigma: float,
    prediction_type: PredictionType,
) -> Float32Array:
    """Return the clean latents that a network's output implies.

    Args:
        prediction: Network output, shaped like `latents`.
        latents: Noisy latents x0 + sigma * noise, shape (B, C, h, w).
        sigma: Noise level of `latents`.
        prediction_type: What the network was trained to output.

    Source: Salimans and Ho 2022 (arXiv:2202.00512), appendix D, rewritten in sigma.
    """
    match prediction_type:
        case "epsilon":
            return latents - sigma * prediction
        case "v_prediction":
            norm = math.hypot(1.0, sigma)
            return latents / norm**2 - sigma / norm * prediction
        case "sample":
            return prediction


def timestep_of(sigma: float, training_sigmas: npt.NDArray[np.float64]) -> float:
    """Return the training timestep of a noise level.

    A whole number for the values of `training_sigmas`, which increase; interpolated in log sigma
    between them; the first or last outside them. Source: k-diffusion's `sigma_to_t`.
    """
    above = int(np.searchsorted(training_sigmas, sigma))
    if above == len(training_sigmas):
        return float(above - 1)
    if above == 0 or training_sigmas[above] == sigma:
        return float(above)
    low, high = float(training_sigmas[above - 1]), float(training_sigmas[above])
    return above - 1 + math.log(sigma / low) / math.log(high / low)


@dataclass(frozen=True, kw_only=True)
class GuidedDenoiser:
    """A network as a denoiser, with classifier-free guidance in one batched call.

    Source: Ho and Salimans 2022 (arXiv:2207.12598), equation 6 with w = guidance_scale - 1,
    on the raw prediction.

    Attributes:
        network: Maps latents (N, C, h, w) of unit variance, timesteps (N,) and context (N, T, D)
            to the prediction, shaped like the latents; all float32.
        training_sigmas: Noise level of every training timestep.
        context: Text conditioning, shape (B, T, D) if `guidance_scale` is 1 and else (2B, T, D),
            the unconditional half first.
        guidance_scale: 1 is the plain conditional model, in a call of half the size.
        prediction_type: What the network was trained to output.
    """

    network: Network
    training_sigmas: npt.NDArray[np.float64]
    context: Float32Array
    guidance_scale: float
    prediction_type: PredictionType

    def __call__(self, latents: Float32Array, sigma: float) -> Float32Array:
        """Predict x0 from `latents` (B, C, h, w) at noise level `sigma`.

        Raises:
            ValueError: The context has another number of rows than the network's batch.
        """
        batch = latents / math.hypot(1.0, sigma)
        if self._is_guided:
            batch = np.concatenate([batch, batch])
        self._check_context(len(latents), len(batch))
        timesteps = np.full(len(batch), timestep_of(sigma, self.training_sigmas), dtype=np.float32)
        prediction = self.network(batch, timesteps, self.context)
        if self._is_guided:
            uncond, cond = np.split(prediction, 2)
            prediction = uncond + self.guidance_scale * (cond - uncond)
        return to_x0(prediction, latents, sigma, self.prediction_type)

    @property
    def _is_guided(self) -> bool:
        return self.guidance_scale != 1

    def _check_context(self, images: int, rows: int) -> None:
        if len(self.context) != rows:
            raise ValueError(
                f"context has {len(self.context)} rows, but {images} latents at guidance scale "
                f"{self.guidance_scale} need {rows}"
            )
