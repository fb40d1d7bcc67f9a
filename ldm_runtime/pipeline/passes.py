"""Sampling passes of a request, one after the other, with encoding and decoding around them.

A `PassRun` is a generator: it yields the passes it needs and is sent their final latents. Its
caller decides how passes are run: one request after the other, or several sharing UNet calls.
Models that only encode and decode have no passes.
"""

import collections.abc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.backends.contract import Runner, Tensors
from ldm_runtime.conditioning import (
    Conditioning,
    OpenNetwork,
    encode_conditioning,
    with_micro_conditioning,
)
from ldm_runtime.latents.codec import decode_latents
from ldm_runtime.latents.init_image import InitImage, Start, hires_start, init_image, start_from
from ldm_runtime.pipeline.open_model import OpenModel
from ldm_runtime.pipeline.sampling import Expert
from ldm_runtime.requests.resolved import Refiner, ResolvedRequest, SeededNoise
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.tasks import task_record
from ldm_runtime.text import Tokenizer

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """One run of a sampler over some images of a request.

    Attributes:
        request: The request; for a second pass, with the size and the steps of that pass.
        conditioning: From `conditioning.encode_conditioning`, with micro-conditioning of that size.
        images: Indices of the images.
        start: Initial latents; None is noise.
        refiner: What makes the last steps; None for a request without a refiner.
        steps_before: Steps of earlier passes.
        total_steps: Steps of all passes.
    """

    request: ResolvedRequest
    conditioning: Conditioning
    images: range
    start: Start | None
    refiner: Expert | None
    steps_before: int
    total_steps: int


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratedImages:
    """Some finished images of a request, and the latents they were decoded from."""

    images: list[Image.Image]
    latents: Float32Array


PassRun = collections.abc.Generator[Pass, Float32Array, GeneratedImages]


@dataclass(kw_only=True, eq=False)
class Timings:
    """Seconds spent in each network, with the code around it."""

    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, network: str) -> Iterator[None]:
        """Count the time until the end of the block."""
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self.seconds[network] = self.seconds.get(network, 0.0) + spent

    def timed(self, network: OpenNetwork) -> OpenNetwork:
        """Return networks whose runs are timed under their names."""
        return lambda name: _TimedRunner(timings=self, name=name, runner=network(name))

    def finish(self) -> dict[str, float]:
        """Return all seconds, and the "total" since the start."""
        return {**self.seconds, "total": time.perf_counter() - self.started}


@dataclass(frozen=True, kw_only=True, eq=False)
class _TimedRunner:
    timings: Timings
    name: str
    runner: Runner

    def run(self, inputs: Tensors) -> Tensors:
        with self.timings.of(self.name):
            return self.runner.run(inputs)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePasses:
    """Passes of one resolved request, which generate its images.

    Attributes:
        network: Returns the networks of the bundle by name.
        request: The request.
        spec: The model.
        conditioning: The conditions of the request, encoded for the UNet.
        init: The init image, whose known area is restored at the end; None for super-resolution.
        start: Initial latents: those of the init image, or None for noise. For an autoencoder task
            they are also the result.
        refiner: What makes the last steps; None for a request without a refiner.
        timings: Seconds per network.
    """

    network: OpenNetwork
    request: ResolvedRequest
    spec: ModelSpec
    conditioning: Conditioning
    init: InitImage | None
    start: Start | None
    refiner: Expert | None
    timings: Timings

    def run(self, images: range) -> PassRun:
        """Generate some of the images."""
        if not task_record(self.spec).samples:
            assert self.start is not None, "an autoencoder task has an image to encode"
            latents = self.start.latents
            return GeneratedImages(images=self._decode(latents, self.request), latents=latents)
        latents = yield self._pass(0, self.request, images, self.start)
        decoded = self._decode(latents, self.request)
        for number, more in enumerate(self.request.passes[1:], start=1):
            large = replace(self.request, height=more.height, width=more.width, passes=(more,))
            large = replace(large, first_noise=SeededNoise())
            with self.timings.of("vae_encoder"):
                start = hires_start(self.network("vae_encoder"), decoded, more, self.spec)
            latents = yield self._pass(number, large, images, start)
            decoded = self._decode(latents, large)
        if self.init is not None:
            decoded = [self.init.finish(image) for image in decoded]
        return GeneratedImages(images=decoded, latents=latents)

    def _pass(
        self, number: int, request: ResolvedRequest, images: range, start: Start | None
    ) -> Pass:
        steps = [len(each.steps) for each in self.request.passes]
        return Pass(
            request=request,
            conditioning=with_micro_conditioning(self.conditioning, request, self.spec),
            images=images,
            start=start,
            refiner=None if self.refiner is None else _told(self.refiner, request),
            steps_before=sum(steps[:number]),
            total_steps=sum(steps),
        )

    def _decode(self, latents: Float32Array, request: ResolvedRequest) -> list[Image.Image]:
        """Return the images of latents, cropped to the requested size."""
        name = self.spec.decoders[request.decoder]
        with self.timings.of(name):
            decoded = decode_latents(
                self.network(name), latents, self.spec, request.tile_size, request.decoder
            )
            size = request.width, request.height
            return [each if each.size == size else each.crop((0, 0, *size)) for each in decoded]


def open_passes(
    network: OpenNetwork,
    tokenizer: Tokenizer | None,
    request: ResolvedRequest,
    spec: ModelSpec,
    refiner: OpenModel | None = None,
) -> ImagePasses:
    """Encode the conditions and the image of a resolved request, once for all its images.

    Args:
        network: Returns the networks of the bundle by name; called only for those that it needs.
        tokenizer: The bundle's, if it has one.
        request: The request.
        spec: The model.
        refiner: The model that makes the last steps of a request that has a refiner.

    Raises:
        RequestError: The model cannot take the conditions of the request.
    """
    timings = Timings()
    conditioning = encode_conditioning(timings.timed(network), tokenizer, request, spec)
    task = task_record(spec)
    init = init_image(request, spec) if task.fits_image else None
    start = None
    if init is not None and (task.image == "start" or not task.samples):
        with timings.of("vae_encoder"):
            start = start_from(network("vae_encoder"), init, request, spec)
    return ImagePasses(
        network=network,
        request=request,
        spec=spec,
        conditioning=conditioning,
        init=init,
        start=start,
        refiner=None if refiner is None else _expert(refiner, request, timings),
        timings=timings,
    )


def _expert(refiner: OpenModel, request: ResolvedRequest, timings: Timings) -> Expert | None:
    """Encode the conditions of a request for its refiner, unless that has nothing to do."""
    if not isinstance(request.refiner, Refiner) or request.refiner.start == 1:
        return None
    network = timings.timed(refiner.network)
    return Expert(
        open_unet=lambda: refiner.network("unet"),
        conditioning=encode_conditioning(network, refiner.tokenizer, request, refiner.spec),
        spec=refiner.spec,
    )


def _told(expert: Expert, request: ResolvedRequest) -> Expert:
    """Return a model with the micro-conditioning of the first pass of a request."""
    told = with_micro_conditioning(expert.conditioning, request, expert.spec)
    return replace(expert, conditioning=told)
