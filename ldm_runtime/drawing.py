"""What a request asks of the networks, one sampling pass after the other.

A drawing is a generator: it yields the passes it needs and is sent the latents they end with. Who
drives it decides how passes are run: one request after the other, or several sharing UNet calls.
"""

import collections.abc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.backends import Runner
from ldm_runtime.conditioning import encode_prompts
from ldm_runtime.images import decode_latents
from ldm_runtime.init_image import InitImage, hires_start, init_image, start_from
from ldm_runtime.manifest import ModelSpec
from ldm_runtime.request import GenerationRequest
from ldm_runtime.resolution import hires_size, last_sigmas, sigmas_of, strengths
from ldm_runtime.sampling import Start
from ldm_runtime.tokenizers import ClipTokenizer

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Networks:
    """The networks of a bundle; the encoder of images is opened by who needs it first."""

    text_encoder: Runner
    unet: Runner
    vae_decoder: Runner
    vae_encoder: Callable[[], Runner]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """One run of a sampler over some images of a request.

    Attributes:
        request: What to sample; of a second pass, with its size.
        context: From `conditioning.encode_prompts`.
        images: Which images.
        start: What to start from; None is noise.
        steps_before: Steps of earlier passes.
        total_steps: Steps of all passes.
    """

    request: GenerationRequest
    context: Float32Array
    images: range
    start: Start | None
    steps_before: int
    total_steps: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """Some finished images of a request, and the latents they were decoded from."""

    images: list[Image.Image]
    latents: Float32Array


Drawing = collections.abc.Generator[Pass, Float32Array, Drawn]


@dataclass(kw_only=True, eq=False)
class Timings:
    """Seconds spent on each network, with what surrounds it."""

    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, network: str) -> Iterator[None]:
        """Count the time until the end of the block."""
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self.seconds[network] = self.seconds.get(network, 0.0) + spent

    def finish(self) -> dict[str, float]:
        """Return them all, and the "total" since the beginning."""
        return {**self.seconds, "total": time.perf_counter() - self.started}


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawer:
    """Draws one resolved request.

    Attributes:
        networks: What runs.
        request: What to draw.
        spec: The model.
        context: Of its prompts.
        init: The picture it starts from, if any.
        start: What sampling starts from: that picture's latents, or None for noise.
        timings: Where the time goes.
    """

    networks: Networks
    request: GenerationRequest
    spec: ModelSpec
    context: Float32Array
    init: InitImage | None
    start: Start | None
    timings: Timings

    def draw(self, images: range) -> Drawing:
        """Draw some of the images."""
        latents = yield self._pass(self.request, images, self.start, "strength")
        pictures = self._decode(latents)
        if self.request.hires_scale is not None:
            height, width = hires_size(self.request, self.spec)
            large = replace(self.request, height=height, width=width)
            with self.timings.of("vae_encoder"):
                start = hires_start(self.networks.vae_encoder(), pictures, large, self.spec)
            latents = yield self._pass(large, images, start, "hires_strength")
            pictures = self._decode(latents)
        if self.init is not None:
            pictures = [self.init.finish(picture) for picture in pictures]
        return Drawn(images=pictures, latents=latents)

    def _pass(
        self, request: GenerationRequest, images: range, start: Start | None, field_name: str
    ) -> Pass:
        sigmas = sigmas_of(self.request, self.spec)
        steps = {
            name: len(last_sigmas(sigmas, strength, name)) - 1
            for name, strength in strengths(self.request).items()
        }
        return Pass(
            request=request,
            context=self.context,
            images=images,
            start=start,
            steps_before=steps["strength"] if field_name == "hires_strength" else 0,
            total_steps=sum(steps.values()),
        )

    def _decode(self, latents: Float32Array) -> list[Image.Image]:
        with self.timings.of("vae_decoder"):
            return decode_latents(
                self.networks.vae_decoder, latents, self.spec, int(self.request.tile_size or 0)
            )


def open_drawer(
    networks: Networks, tokenizer: ClipTokenizer, request: GenerationRequest, spec: ModelSpec
) -> Drawer:
    """Encode the prompts and the picture of a resolved request, once for all its images."""
    timings = Timings()
    with timings.of("text_encoder"):
        context = encode_prompts(networks.text_encoder, tokenizer, request, spec)
    init, start = init_image(request), None
    if init is not None:
        with timings.of("vae_encoder"):
            start = start_from(networks.vae_encoder(), init, request, spec)
    return Drawer(
        networks=networks,
        request=request,
        spec=spec,
        context=context,
        init=init,
        start=start,
        timings=timings,
    )
