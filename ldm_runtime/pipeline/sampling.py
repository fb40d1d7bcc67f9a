"""The sampling loop: from a request and its conditioning to latents, step by step."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.backends.contract import Runner, Tensors, bind_constants
from ldm_runtime.conditioning import Conditioning
from ldm_runtime.errors import BackendError
from ldm_runtime.latents.init_image import Start
from ldm_runtime.noise import NOISES, NoiseGenerator
from ldm_runtime.noise.brownian import BrownianPath
from ldm_runtime.pipeline.denoiser import GuidedDenoiser
from ldm_runtime.pipeline.masked_denoiser import MaskedDenoiser
from ldm_runtime.pipeline.refined_denoiser import RefinedDenoiser
from ldm_runtime.pipeline.scheduled_denoiser import ScheduledDenoiser, StepNumber
from ldm_runtime.requests.request import CUSTOM
from ldm_runtime.requests.resolution import sampler_of, sigma_table
from ldm_runtime.requests.resolved import (
    PartlyDenoised,
    Refiner,
    ResolvedRequest,
    SeededNoise,
)
from ldm_runtime.requests.sizes import latent_size
from ldm_runtime.samplers import Denoise, NoiseSampler
from ldm_runtime.schedules import SigmaTable, earlier_sigma, initial_scale, timestep_at
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.tasks import runs_in_patches
from ldm_runtime.tiling.patches import over_patches

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Step:
    """One finished sampler step of one batch.

    Attributes:
        index: Number of the step, from 1.
        total: Number of steps of a batch.
        sigma: Noise level after the step.
        latents: (B, C, h, w) in the UNet's scale: clean latents plus sigma times noise, divided by
            sqrt(1 + sigma^2). A copy for the caller.
        x0: The last prediction of the clean latents, (B, C, h, w); a copy for the caller.
        images: Indices of the images in the request.
        previews: Small images of x0, if the stream was asked for them.
    """

    index: int
    total: int
    sigma: float
    latents: Float32Array
    x0: Float32Array
    images: range
    previews: tuple[Image.Image, ...] = ()

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.latents.shape))
        first, last = self.images[0], self.images[-1]
        images = f"image {first}" if first == last else f"images {first} to {last}"
        return f"Step({self.index} of {self.total}, {images}, sigma {self.sigma:.4g}, {shape})"


@dataclass(frozen=True, kw_only=True, eq=False)
class Expert:
    """A model that makes some of the steps of a request.

    Attributes:
        open_unet: Returns its UNet.
        conditioning: The conditions of the request, encoded for that.
        spec: The model.
    """

    open_unet: Callable[[], Runner]
    conditioning: Conditioning
    spec: ModelSpec


def sample_latents(  # noqa: PLR0913  (the parts of a run)
    engine: Runner,
    conditioning: Conditioning,
    request: ResolvedRequest,
    spec: ModelSpec,
    images: range | None = None,
    start: Start | None = None,
    *,
    refiner: Expert | None = None,
) -> Iterator[Step]:
    """Yield the latents of some images after each step of a request's first pass, as one batch.

    The last step's latents are the ones to decode.

    Args:
        engine: The UNet.
        conditioning: From `conditioning.encode_conditioning`.
        request: The request.
        spec: The model.
        images: Indices of the images; None is all of them.
        start: Initial latents; None is noise.
        refiner: What makes the last steps, if the request has a refiner.

    Raises:
        BackendError: The latents became NaN or infinite.
    """
    images = range(request.num_images) if images is None else images
    steps = request.passes[0].steps
    sigmas = request.sigmas[steps.start :]
    noise, noise_sampler = _noise(request, spec, images)
    table = _table(spec, request)
    base = Expert(open_unet=lambda: engine, conditioning=conditioning, spec=spec)
    number = StepNumber(request.passes[0].first_step)
    denoise = _denoiser(base, request, images, table, number)
    if refiner is not None and isinstance(request.refiner, Refiner):
        denoise = RefinedDenoiser(
            denoise,
            lambda: _denoiser(refiner, request, images, _table(refiner.spec, request), number),
            first_timestep=timestep_at(table, request.refiner.start),
            training_sigmas=table,
        )
    latents = _first_latents(noise, sigmas, request, start)
    if start is not None and start.mask is not None:
        denoise = MaskedDenoiser(denoise=denoise, init=start.latents, noise=noise, mask=start.mask)
    seen = _RecordingDenoiser(denoise)
    sampler = sampler_of(request).of(partial(earlier_sigma, table))(
        seen, latents, sigmas, eta=request.eta, noise_sampler=noise_sampler
    )
    # A run that stops early is the beginning of a whole one: samplers treat their last step apart.
    made = zip(sigmas[1 : len(steps) + 1], islice(sampler, len(steps)), strict=True)
    for index, (sigma, after) in enumerate(made, start=1):
        number.now += 1
        if not np.isfinite(after).all():
            raise BackendError(
                f"the latents hold NaN or infinity after step {index} of {len(steps)}; "
                "lower guidance_scale, or take another sampler; run `ldm verify` if that fails"
            )
        yield Step(
            index=index,
            total=len(steps),
            sigma=sigma,
            latents=after / math.hypot(1.0, sigma),
            x0=seen.last(),
            images=images,
        )


def batches(num_images: int, batch_size: int) -> Iterator[range]:
    """Split the images of a request into consecutive ranges of at most `batch_size`."""
    for start in range(0, num_images, batch_size):
        yield range(start, min(start + batch_size, num_images))


def slerp(low: Float32Array, high: Float32Array, share: float) -> Float32Array:
    """Spherical interpolation from `low` to `high`: mixed noise that keeps its norm.

    Source: Shoemake 1985 (doi:10.1145/325165.325242), with whole arrays as vectors.
    """
    norms = float(np.linalg.norm(low)) * float(np.linalg.norm(high))
    angle = math.acos(max(-1.0, min(1.0, float(np.sum(low * high, dtype=np.float64)) / norms)))
    if math.sin(angle) < 1e-6:
        return (1 - share) * low + share * high
    parts = (
        math.sin((1 - share) * angle) / math.sin(angle),
        math.sin(share * angle) / math.sin(angle),
    )
    return parts[0] * low + parts[1] * high


def _first_latents(
    noise: Float32Array, sigmas: Sequence[float], request: ResolvedRequest, start: Start | None
) -> Float32Array:
    """Return the latents at the first of `sigmas`."""
    if isinstance(request.first_noise, PartlyDenoised):
        return noise * math.hypot(1.0, sigmas[0])
    is_custom = request.schedule == CUSTOM
    scale = sigmas[0] if is_custom else initial_scale(sigmas, request.schedule)
    if start is None:
        return noise * scale
    noisy = start.latents + sigmas[0] * noise
    if start.mask is None or request.passes[0].steps.start > 0:
        return noisy
    # At full strength nothing of the masked region is kept, not even its mean.
    return start.mask * (noise * scale) + (1 - start.mask) * noisy


def _noise(
    request: ResolvedRequest, spec: ModelSpec, images: range
) -> tuple[Float32Array, NoiseSampler]:
    """Return the first noise of a batch and its noise sampler, every image with its own seed."""
    shape = (1, spec.autoencoder.embed_dim, *latent_size(request, spec))
    alone = [request.of_image(index) for index in images]
    generators = [NOISES[request.noise](each.seed) for each in alone]
    first = np.concatenate(
        [
            _first_noise(each, generator, shape)
            for each, generator in zip(alone, generators, strict=True)
        ]
    )
    if sampler_of(request).noise == "brownian":
        paths = [BrownianPath(each.seed, shape) for each in alone]
        return first, lambda *stretch: np.concatenate([path(*stretch) for path in paths])
    return first, lambda *_: np.concatenate([generator.randn(shape) for generator in generators])


def _first_noise(
    request: ResolvedRequest, generator: NoiseGenerator, shape: tuple[int, ...]
) -> Float32Array:
    if not isinstance(request.first_noise, SeededNoise):
        return request.first_noise.latents.values
    noise = generator.randn(shape)
    if not request.is_variation:
        return noise
    other = NOISES[request.noise](request.variation_seed).randn(shape)
    return slerp(noise, other, request.variation_strength)


class _RecordingDenoiser:
    """A denoiser that keeps its last prediction, for `Step.x0`."""

    def __init__(self, denoise: Denoise) -> None:
        self._denoise = denoise
        self._x0: Float32Array | None = None

    def __call__(self, latents: Float32Array, sigma: float) -> Float32Array:
        self._x0 = self._denoise(latents, sigma)
        return self._x0

    def last(self) -> Float32Array:
        """Return the prediction of the last call."""
        assert self._x0 is not None, "every sampler calls the denoiser before it yields"
        return self._x0


class _UNet:
    """The UNet as a `Network`: context is bound once, channels are concatenated at every call.

    Without guidance the context has the conditional rows, the last, and so have the others.
    """

    def __init__(self, engine: Runner, conditioning: Conditioning, *, in_patches: bool) -> None:
        self._engine = engine
        self._concat = conditioning.concat
        self._rows: dict[str, npt.NDArray[Any] | None] = {
            "vector": conditioning.vector,
            "guidance": conditioning.guidance,
            "class_labels": conditioning.class_labels,
        }
        self._in_patches = in_patches
        self._bound: list[tuple[Float32Array, Runner]] = []

    def __call__(
        self, latents: Float32Array, timesteps: Float32Array, context: Float32Array | None
    ) -> Float32Array:
        runner = self._engine if context is None else self._runner(context)

        def predict(part: Float32Array) -> Float32Array:
            inputs: Tensors = {"latents": part, "timesteps": timesteps}
            return runner.run(inputs)["prediction"]

        joined = self._joined(latents)
        return over_patches(predict, joined) if self._in_patches else predict(joined)

    def _joined(self, latents: Float32Array) -> Float32Array:
        """Concatenate the conditioning channels to every sample of the latents."""
        if self._concat is None:
            return latents
        return np.concatenate([latents, self._concat[-len(latents) :]], axis=1)

    def _runner(self, context: Float32Array) -> Runner:
        for known, runner in self._bound:
            if known is context:
                return runner
        constants: dict[str, npt.NDArray[Any]] = {"context": context}
        for name, rows in self._rows.items():
            if rows is not None:
                constants[name] = rows[-len(context) :]
        runner = bind_constants(self._engine, constants)
        self._bound.append((context, runner))
        return runner


def _table(spec: ModelSpec, request: ResolvedRequest) -> SigmaTable:
    return sigma_table(spec, zero_terminal_snr=request.zero_terminal_snr)


def _denoiser(
    expert: Expert, request: ResolvedRequest, images: range, table: SigmaTable, step: StepNumber
) -> Denoise:
    """Return the denoiser of a model for a batch of images."""
    spec, unet = expert.spec, expert.open_unet()

    def denoiser_of(wanted: Conditioning) -> Denoise:
        conditioning = wanted.of_images(images)
        return GuidedDenoiser(
            network=_UNet(unet, conditioning, in_patches=runs_in_patches(spec)),
            training_sigmas=table,
            context=conditioning.context,
            guidance_scale=request.classifier_free_scale,
            image_guidance_scale=request.image_guidance_scale,
            guidance_rescale=request.guidance_rescale,
            guidance_interval=request.guidance_interval,
            prediction_type=spec.prediction_type,
            edm=spec.edm,
        )

    if not expert.conditioning.edits:
        return denoiser_of(expert.conditioning)
    return ScheduledDenoiser(step=step, conditioning=expert.conditioning, denoiser_of=denoiser_of)
