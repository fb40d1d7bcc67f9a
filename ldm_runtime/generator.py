"""Opens a bundle and turns requests into images: the sum of the other rooms.

Every phase is a function of its own over anything with `run` (`conditioning.encode_prompts`,
`sample_latents`, `images.decode_latents`), so that one network at a time can be in memory and the
reference images of an export come out of the very loop that draws the deployed ones.
"""

import collections.abc
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.backends import (
    EngineSource,
    RunOptions,
    Shared,
    checked_file,
    choose_backend,
    get_backend,
)
from ldm_runtime.conditioning import encode_prompts, open_tokenizer
from ldm_runtime.images import decode_latents
from ldm_runtime.manifest import MANIFEST_NAME, load_manifest, sha256_of
from ldm_runtime.request import GenerationRequest, parse_request, resolve
from ldm_runtime.sampling import Step, batches, sample_latents

Float32Array = npt.NDArray[np.float32]

#: Networks a text-to-image request runs.
TEXT_TO_IMAGE = ("text_encoder", "unet", "vae_decoder")


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The pictures of a request.

    Attributes:
        images: In order; image i came from seed + i.
        request: The request with nothing left open: what was drawn.
        latents: (N, C, h, w) in the UNet's scale, as they were decoded.
        timings: Seconds in "text_encoder", "unet" and "vae_decoder", each with what surrounds it,
            and "total" from the first to the last, a stream's consumer included.
        bundle_sha256: Hash of the bundle's manifest.
    """

    images: list[Image.Image]
    request: GenerationRequest
    latents: Float32Array
    timings: Mapping[str, float]
    bundle_sha256: str

    def metadata(self, index: int) -> dict[str, Any]:
        """Return what to store with image `index`: all that it takes to draw it again, alone."""
        from ldm_runtime import __version__

        assert self.request.seed is not None, "a result's request is resolved"
        alone = replace(self.request, seed=self.request.seed + index, num_images=1)
        return {
            "request": asdict(alone),
            "bundle_sha256": self.bundle_sha256,
            "version": __version__,
        }


class Generator:
    """A bundle, opened: requests in, images out.

    Threads may share one; a request changes nothing in it. The same request gives the same bytes
    from the same bundle, backend and machine, whatever else is being drawn.

    Args:
        bundle: Folder made by `ldm-export`.
        backend: What runs the networks; "auto" takes the best that can run here.
        threads: Threads that compute; None is one a physical core.
        batch_size: Images in one network call; with guidance the UNet sees twice as many. The
            default of 1 bounds memory, costs a CPU nothing, and makes every picture independent of
            how many were asked for to the last bit, which larger batches promise only as far as
            the backend computes rows independently.
        check_hashes: Whether to compare the files with the manifest's hashes, not only sizes.
        options: How the engines run, where the backend has the choice.

    Raises:
        BundleError: The bundle is incomplete or altered.
        BackendError: The backend cannot run here.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        backend: str = "auto",
        threads: int | None = None,
        batch_size: int | None = None,
        check_hashes: bool = True,
        options: RunOptions | None = None,
    ) -> None:
        _check_positive("threads", threads)
        _check_positive("batch_size", batch_size)
        self.bundle = Path(bundle)
        self.manifest = load_manifest(self.bundle)
        self.spec = self.manifest.spec
        self.backend = choose_backend(backend, self.manifest, bundle=self.bundle)
        self._batch_size = batch_size or 1
        self._sha256 = sha256_of(self.bundle / MANIFEST_NAME)
        self._tokenizer = open_tokenizer(
            checked_file(
                self.bundle, self.manifest, self.manifest.tokenizer_file, hashed=check_hashes
            ),
            self.spec,
        )
        source = partial(
            EngineSource,
            bundle=self.bundle,
            manifest=self.manifest,
            threads=threads,
            check_hashes=check_hashes,
            options=options or RunOptions(),
            shared=Shared(),
        )
        open_engine = get_backend(self.backend).open_engine
        with ExitStack() as engines:
            self._text_encoder, self._unet, self._vae_decoder = (
                engines.enter_context(open_engine(source(component=self.manifest.component(name))))
                for name in TEXT_TO_IMAGE
            )
            self._engines = engines.pop_all()

    def __call__(self, prompt: str, **fields: Any) -> Result:  # noqa: ANN401  (checked one by one)
        """Draw what the fields of a `GenerationRequest` say.

        Raises:
            RequestError: A field is unknown, of the wrong type or out of range.
        """
        return self.generate(parse_request({"prompt": prompt, **fields}))

    def generate(self, request: GenerationRequest) -> Result:
        """Draw a request.

        Raises:
            RequestError: The model cannot do what the request asks for.
        """
        for event in self.stream(request):
            if isinstance(event, Result):
                return event
        raise AssertionError("a stream ends with its result")

    def stream(
        self, request: GenerationRequest
    ) -> collections.abc.Generator[Step | Result, None, None]:
        """Draw a request and yield a `Step` after each step, then the `Result`.

        Nothing runs between two items, so closing the stream cancels the rest.

        Raises:
            RequestError: At once, if the model cannot do what the request asks for.
        """
        return self._draw(resolve(request, self.spec))

    def close(self) -> None:
        """Close the networks. Closing twice is harmless."""
        self._engines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _draw(
        self, request: GenerationRequest
    ) -> collections.abc.Generator[Step | Result, None, None]:
        started = time.perf_counter()
        timings = dict.fromkeys(TEXT_TO_IMAGE, 0.0)
        images: list[Image.Image] = []
        latents: list[Float32Array] = []
        with _timed(timings, "text_encoder"):
            context = encode_prompts(self._text_encoder, self._tokenizer, request, self.spec)
        for batch in batches(request.num_images, self._batch_size):
            steps = sample_latents(self._unet, context, request, self.spec, batch)
            for step in _timed_steps(timings, steps):
                yield replace(step, latents=step.latents.copy())
            with _timed(timings, "vae_decoder"):
                images += decode_latents(self._vae_decoder, step.latents, self.spec)
            latents.append(step.latents)
        yield Result(
            images=images,
            request=request,
            latents=np.concatenate(latents),
            timings={**timings, "total": time.perf_counter() - started},
            bundle_sha256=self._sha256,
        )


def _timed_steps(timings: dict[str, float], steps: Iterator[Step]) -> Iterator[Step]:
    """Pass steps on, counting only the time it takes to make them."""
    while True:
        with _timed(timings, "unet"):
            step = next(steps, None)
        if step is None:
            return
        yield step


@contextmanager
def _timed(timings: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[phase] += time.perf_counter() - started


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
