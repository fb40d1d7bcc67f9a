"""The sampling loop: from a request and its context to latents, a step at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends import Runner, bind_constants
from ldm_runtime.denoiser import GuidedDenoiser
from ldm_runtime.errors import BackendError
from ldm_runtime.manifest import ModelSpec
from ldm_runtime.noise import TorchCpuGenerator
from ldm_runtime.request import GenerationRequest, sigmas_of
from ldm_runtime.samplers import SAMPLERS, Draw
from ldm_runtime.schedules import initial_scale, training_sigmas

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One sampler step of one batch, just done.

    Attributes:
        index: Which step, from 1.
        total: Steps of a batch.
        sigma: Noise level that is left.
        latents: (B, C, h, w) in the UNet's scale: clean latents plus sigma times noise, divided by
            sqrt(1 + sigma^2). The caller's own copy.
        images: Which images of the request these are.
    """

    index: int
    total: int
    sigma: float
    latents: Float32Array
    images: range


def sample_latents(
    engine: Runner,
    context: Float32Array,
    request: GenerationRequest,
    spec: ModelSpec,
    images: range | None = None,
) -> Iterator[Step]:
    """Yield the latents of some images of a request after each step, as one batch.

    The last step's latents are the ones to decode.

    Args:
        engine: The UNet.
        context: From `conditioning.encode_prompts`.
        request: A resolved request.
        spec: The model.
        images: Which images; None is all of them.

    Raises:
        BackendError: The network produced NaN or infinity.
    """
    images = range(request.num_images) if images is None else images
    sigmas = sigmas_of(request, spec)
    assert request.eta is not None, "the request is not resolved"
    draw = _noise(request, spec, images)
    sampler = SAMPLERS[str(request.sampler)].function(
        _denoiser(engine, context, request, spec, len(images)),
        draw(math.inf, sigmas[0]) * initial_scale(sigmas, str(request.schedule)),
        sigmas,
        eta=request.eta,
        draw=draw,
    )
    for index, (sigma, latents) in enumerate(zip(sigmas[1:], sampler, strict=True), start=1):
        if not np.isfinite(latents).all():
            raise BackendError(
                f"the UNet produced NaN or infinity in step {index} of {len(sigmas) - 1}; "
                "run `ldm verify`, and export with --weights-dtype fp32 if that fails"
            )
        yield Step(
            index=index,
            total=len(sigmas) - 1,
            sigma=sigma,
            latents=latents / math.hypot(1.0, sigma),
            images=images,
        )


def batches(num_images: int, batch_size: int) -> Iterator[range]:
    """Split the images of a request into consecutive ranges of at most `batch_size`."""
    for start in range(0, num_images, batch_size):
        yield range(start, min(start + batch_size, num_images))


def _noise(request: GenerationRequest, spec: ModelSpec, images: range) -> Draw:
    """Return what draws a batch of noise, every image from a generator of its own."""
    assert request.seed is not None, "the request is not resolved"
    assert request.height is not None, "the request is not resolved"
    assert request.width is not None, "the request is not resolved"
    factor = spec.autoencoder.factor
    shape = (1, spec.unet.out_channels, request.height // factor, request.width // factor)
    generators = [TorchCpuGenerator(request.seed + i) for i in images]
    return lambda *_: np.concatenate([generator.randn(shape) for generator in generators])


def _denoiser(
    engine: Runner,
    context: Float32Array,
    request: GenerationRequest,
    spec: ModelSpec,
    batch_size: int,
) -> GuidedDenoiser:
    assert request.guidance_scale is not None, "the request is not resolved"
    context = np.repeat(context, batch_size, axis=0)
    unet = bind_constants(engine, {"context": context})

    def network(
        latents: Float32Array, timesteps: Float32Array, _bound: Float32Array
    ) -> Float32Array:
        return unet.run({"latents": latents, "timesteps": timesteps})["prediction"]

    return GuidedDenoiser(
        network=network,
        training_sigmas=training_sigmas(spec.alphas_cumprod),
        context=context,
        guidance_scale=request.guidance_scale,
        prediction_type=spec.prediction_type,
    )
