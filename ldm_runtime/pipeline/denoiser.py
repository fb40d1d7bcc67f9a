"""Denoisers from networks: input scaling, timestep, guidance and prediction type.

Samplers only see `denoise(latents, sigma) -> x0`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ldm_runtime.requests.guidance import GuidanceChain, guidance_chain
from ldm_runtime.schedules import edm_timestep, timestep_of
from ldm_runtime.specs.model import EdmSpec, PredictionType, sigma_data_of

Float32Array = npt.NDArray[np.float32]
#: Maps (latents, timesteps, context) to the prediction; latents have unit variance here.
Network = Callable[[Float32Array, Float32Array, Float32Array | None], Float32Array]


def to_x0(
    prediction: Float32Array,
    latents: Float32Array,
    sigma: float,
    prediction_type: PredictionType,
    edm: EdmSpec | None = None,
) -> Float32Array:
    """Return the clean latents that a network's output implies.

    Args:
        prediction: Network output, shaped like `latents`.
        latents: Noisy latents x0 + sigma * noise, shape (B, C, h, w).
        sigma: Noise level of `latents`.
        prediction_type: The quantity that the network was trained to predict.
        edm: Scale of a model of EDM, whose "epsilon" is a network's output F as its source has it,
            and whose "v_prediction" is -F; None for one with a training schedule.

    Source: Salimans and Ho 2022 (arXiv:2202.00512), appendix D, rewritten in sigma; of EDM, Karras
    et al. 2022 (arXiv:2206.00364), equation 7 and table 1, c_skip and c_out.
    """
    match prediction_type:
        case "epsilon" if edm is None:
            return latents - sigma * prediction
        case "epsilon":
            return to_x0(-prediction, latents, sigma, "v_prediction", edm)
        case "v_prediction":
            sigma_data = sigma_data_of(edm)
            norm = math.hypot(sigma_data, sigma)
            c_out = -(sigma_data * sigma / norm)
            return latents / (norm / sigma_data) ** 2 + c_out * prediction
        case "sample":
            return prediction


def rescale_guidance(guided: Float32Array, cond: Float32Array, share: float) -> Float32Array:
    """Give a guided prediction back the contrast of the conditional one, wholly or in part.

    Guidance widens the spread of the prediction, which over-exposes images, most of all in models
    whose schedule ends without any signal.

    Args:
        guided: Prediction after guidance, shape (B, C, h, w).
        cond: The conditional prediction, likewise.
        share: 0 leaves `guided` as it is, 1 gives it the standard deviation of `cond`, image by
            image over channels and pixels; between them the two are mixed.

    Source: Lin et al. 2023 (arXiv:2305.08891), section 3.4.
    """
    ratio = _spread(cond) / _spread(guided)
    return guided * (share * ratio + (1 - share))


@dataclass(frozen=True, kw_only=True)
class GuidedDenoiser:
    """A network as a denoiser, with classifier-free guidance in one batched call.

    Guidance acts on the raw prediction; `requests.guidance` has its equation and sources.

    Attributes:
        network: Maps latents (N, C, h, w) of unit variance, timesteps (N,) and context (N, T, D)
            or None to the prediction, shaped like the latents; all float32. Its context is always
            one and the same array where guidance is on, and one other where it is off.
        training_sigmas: Noise level of every training timestep.
        context: Keys and values of cross-attention, shape (KB, T, D), where K is the number of
            samples that guidance asks for, the unconditional ones first: 2, or 1 without guidance,
            or 3 if an image guides as well. None for a model without context, which cannot be
            guided.
        guidance_scale: 1 is the unguided conditional model, in a call of one sample per image.
        prediction_type: The quantity that the network was trained to predict.
        edm: Scale of a model of EDM, which is told a noise level in place of a timestep; None for a
            model with a training schedule.
        image_guidance_scale: Guidance by an image that only the first of three samples lacks; 1 is
            none.
        guidance_rescale: Share of `rescale_guidance`.
        guidance_interval: Lowest and highest noise level with guidance, both included; outside it
            the model is unguided, in a call of one sample per image. None is everywhere.
            Source: Kynkäänniemi et al. 2024 (arXiv:2404.07724).
    """

    network: Network
    training_sigmas: npt.NDArray[np.float64]
    context: Float32Array | None
    guidance_scale: float
    prediction_type: PredictionType
    edm: EdmSpec | None = None
    image_guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None

    def __call__(self, latents: Float32Array, sigma: float) -> Float32Array:
        """Predict x0 from `latents` (B, C, h, w) at noise level `sigma`.

        Raises:
            ValueError: The context has another batch size than the network's inputs, or there is
                guidance without context.
        """
        self._check_context(len(latents))
        batch = latents / math.hypot(sigma_data_of(self.edm), sigma)
        predict = self._guided if self.is_guided(sigma) else self._conditional
        prediction = predict(batch, self._timestep(sigma))
        return to_x0(prediction, latents, sigma, self.prediction_type, self.edm)

    def is_guided(self, sigma: float) -> bool:
        """Whether guidance is on at a noise level, which multiplies the batch size."""
        low, high = self.guidance_interval or (0.0, math.inf)
        return bool(self._chain.scales) and low <= sigma <= high

    def _timestep(self, sigma: float) -> float:
        if self.edm is None:
            return timestep_of(sigma, self.training_sigmas)
        return edm_timestep(sigma)

    def _guided(self, batch: Float32Array, timestep: float) -> Float32Array:
        count = len(self._chain.samples)
        joined = self._run(np.concatenate([batch] * count), timestep, self.context)
        predictions = np.split(joined, count)
        guided = predictions[0]
        for scale, (less, more) in zip(self._chain.scales, pairwise(predictions), strict=True):
            guided = guided + scale * (more - less)
        if self.guidance_rescale == 0:
            return guided
        return rescale_guidance(guided, predictions[-1], self.guidance_rescale)

    def _conditional(self, batch: Float32Array, timestep: float) -> Float32Array:
        return self._run(batch, timestep, self._conditional_context)

    def _run(
        self, batch: Float32Array, timestep: float, context: Float32Array | None
    ) -> Float32Array:
        return self.network(batch, np.full(len(batch), timestep, dtype=np.float32), context)

    @cached_property
    def _conditional_context(self) -> Float32Array | None:
        if self.context is None or not self._chain.scales:
            return self.context
        return np.split(self.context, len(self._chain.samples))[-1]

    @cached_property
    def _chain(self) -> GuidanceChain:
        return guidance_chain(self.guidance_scale, self.image_guidance_scale)

    def _check_context(self, images: int) -> None:
        if self.context is None:
            if self._chain.scales:
                raise ValueError(
                    f"guidance scale {self.guidance_scale} needs a context to steer away from, "
                    "and there is none; make it 1"
                )
            return
        expected = len(self._chain.samples) * images
        if len(self.context) != expected:
            raise ValueError(
                f"context has batch size {len(self.context)}, but {images} latents at guidance "
                f"scale {self.guidance_scale} need {expected}"
            )


def _spread(predictions: Float32Array) -> Float32Array:
    """Standard deviation of each image: (B, 1, 1, 1)."""
    spread: Float32Array = predictions.std(axis=(1, 2, 3), keepdims=True)
    return spread
