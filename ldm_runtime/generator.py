"""Opens a bundle and turns requests into images: the sum of the other rooms.

Every phase is a function of its own over anything with `run` (`conditioning.encode_prompts`,
`sampling.sample_latents`, `images.decode_latents`), so that one network at a time can be in memory
and the reference images of an export come out of the very loop that draws the deployed ones.
"""

import collections.abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.backends import (
    Engine,
    EngineSource,
    Runner,
    RunOptions,
    Shared,
    checked_file,
    choose_backend,
    get_backend,
)
from ldm_runtime.batching import in_order, run_together
from ldm_runtime.conditioning import open_tokenizer
from ldm_runtime.deadline import Deadline
from ldm_runtime.drawing import Drawer, Drawing, Drawn, Networks, Pass, Timings, open_drawer
from ldm_runtime.errors import BundleError
from ldm_runtime.manifest import MANIFEST_NAME, PreviewRecord, load_manifest, sha256_of
from ldm_runtime.previews import preview_image
from ldm_runtime.request import GenerationRequest, parse_request, request_to_json
from ldm_runtime.resolution import resolve
from ldm_runtime.sampling import Step, batches, sample_latents

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The pictures of a request.

    Attributes:
        images: In order; image i came from seed + i.
        request: The request with nothing left open: what was drawn.
        latents: (N, C, h, w) in the UNet's scale, as they were decoded.
        timings: Seconds in "text_encoder", "unet", "vae_decoder" and, if a picture was given or
            drawn over, "vae_encoder", each with what surrounds it, and "total" from the first to
            the last, a stream's consumer included. With `run_many` a request's time includes its
            waiting for others.
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

        return {
            "request": request_to_json(self.request.of_image(index)),
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
            default of 1 bounds memory, costs a CPU little, and makes every picture independent of
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
        self._source = partial(
            EngineSource,
            bundle=self.bundle,
            manifest=self.manifest,
            threads=threads,
            check_hashes=check_hashes,
            options=options or RunOptions(),
            shared=Shared(),
        )
        self._engines = ExitStack()
        self._image_encoder: Engine | None = None
        self._opening = Lock()
        with ExitStack() as opened:
            opened.callback(self._engines.close)
            self._networks = Networks(
                text_encoder=self._open_engine("text_encoder"),
                unet=self._open_engine("unet"),
                vae_decoder=self._open_engine("vae_decoder"),
                vae_encoder=self._open_image_encoder,
            )
            opened.pop_all()

    def __call__(self, prompt: str, **fields: Any) -> Result:  # noqa: ANN401  (checked one by one)
        """Draw what the fields of a `GenerationRequest` say.

        Raises:
            RequestError: A field is unknown, of the wrong type or out of range.
        """
        return self.generate(parse_request({"prompt": prompt, **fields}))

    def generate(
        self, request: GenerationRequest, *, deadline_seconds: float | None = None
    ) -> Result:
        """Draw a request.

        Args:
            request: What to draw.
            deadline_seconds: How long it may take.

        Raises:
            RequestError: The model cannot do what the request asks for.
            DeadlineError: It takes longer than it may.
        """
        for event in self.stream(request, deadline_seconds=deadline_seconds):
            if isinstance(event, Result):
                return event
        raise AssertionError("a stream ends with its result")

    def stream(
        self,
        request: GenerationRequest,
        *,
        previews: bool = False,
        deadline_seconds: float | None = None,
    ) -> collections.abc.Generator[Step | Result, None, None]:
        """Draw a request and yield a `Step` after each step, then the `Result`.

        Nothing runs between two items, so closing the stream cancels the rest.

        Args:
            request: What to draw.
            previews: Whether steps carry small pictures of what is being drawn.
            deadline_seconds: How long it may take from the first item on.

        Raises:
            RequestError: At once, if the model cannot do what the request asks for.
            BundleError: At once, if there should be previews and the bundle was exported without.
            DeadlineError: Between two steps, when time is up.
        """
        record = self._preview_record() if previews else None
        return self._draw(resolve(request, self.spec), record, Deadline(deadline_seconds))

    def run_many(
        self, requests: Iterable[GenerationRequest], *, max_batch: int = 4
    ) -> Iterator[Result]:
        """Draw several requests at once and yield their results in order.

        Requests share calls of the UNet, whatever their prompts, seeds, samplers and guidance,
        where their pictures have the same size. On the CPU every result is what `generate` returns
        at a `batch_size` of 1, bit for bit; there, what needs a single row of the UNet (guidance
        off) is not shared.

        Args:
            requests: What to draw.
            max_batch: Most images in one call of the UNet; with guidance it sees twice as many.

        Raises:
            RequestError: At once, if the model cannot do what one of them asks for.
        """
        _check_positive("max_batch", max_batch)
        resolved = [resolve(request, self.spec) for request in requests]
        return self._draw_together(resolved, max_batch)

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

    def _open_engine(self, name: str) -> Engine:
        source = self._source(component=self.manifest.component(name))
        return self._engines.enter_context(get_backend(self.backend).open_engine(source))

    def _open_image_encoder(self) -> Engine:
        """Return the encoder of images, which the first request with a picture opens."""
        with self._opening:
            if self._image_encoder is None:
                self._image_encoder = self._open_engine("vae_encoder")
            return self._image_encoder

    def _preview_record(self) -> PreviewRecord:
        if self.manifest.preview is None:
            raise BundleError(f"{self.bundle} was exported without previews; export it again")
        return self.manifest.preview

    def _draw(
        self, request: GenerationRequest, preview: PreviewRecord | None, deadline: Deadline
    ) -> collections.abc.Generator[Step | Result, None, None]:
        deadline.start()
        drawer = open_drawer(self._networks, self._tokenizer, request, self.spec)
        drawn = []
        for images in batches(request.num_images, self._batch_size):
            drawing = self._run_passes(drawer.draw(images), self._networks.unet, drawer.timings)
            while not isinstance(event := next(drawing), Drawn):
                deadline.check(event)
                yield _for_caller(event, preview)
            drawn.append(event)
        yield self._result(drawer, drawn)

    def _draw_together(
        self, requests: Sequence[GenerationRequest], max_batch: int
    ) -> Iterator[Result]:
        drawers: dict[int, Drawer] = {}

        def draw(number: int, image: int, unet: Runner) -> Iterator[Drawn]:
            if number not in drawers:  # loops take turns, so that nobody else is opening it
                request = requests[number]
                drawers[number] = open_drawer(self._networks, self._tokenizer, request, self.spec)
            drawing = drawers[number].draw(range(image, image + 1))
            for event in self._run_passes(drawing, unet, drawers[number].timings):
                if isinstance(event, Drawn):
                    yield event

        loops = (
            partial(draw, number, image)
            for number, request in enumerate(requests)
            for image in range(request.num_images)
        )
        drawn = in_order(
            run_together(
                loops, self._networks.unet, max_rows=2 * max_batch, min_rows=self._min_shared_rows
            )
        )
        with closing(drawn):
            for number, request in enumerate(requests):
                images = [next(drawn) for _ in range(request.num_images)]
                yield self._result(drawers.pop(number), images)

    @property
    def _min_shared_rows(self) -> int:
        """Rows from which on a row has the same bits in any company; see `run_together`."""
        return int(getattr(get_backend(self.backend), "MIN_SHARED_ROWS", 1))

    def _run_passes(
        self, drawing: Drawing, unet: Runner, timings: Timings
    ) -> Iterator[Step | Drawn]:
        """Run the passes of a drawing one after the other; what was drawn comes last."""
        wanted = next(drawing)
        while True:
            steps = self._sample(wanted, unet)
            while True:
                with timings.of("unet"):
                    step = next(steps, None)
                if step is None:
                    break
                last = step
                yield step
            try:
                wanted = drawing.send(last.latents)
            except StopIteration as end:
                yield end.value
                return

    def _sample(self, wanted: Pass, unet: Runner) -> Iterator[Step]:
        for step in sample_latents(
            unet, wanted.context, wanted.request, self.spec, wanted.images, wanted.start
        ):
            index = wanted.steps_before + step.index
            yield replace(step, index=index, total=wanted.total_steps)

    def _result(self, drawer: Drawer, drawn: Sequence[Drawn]) -> Result:
        return Result(
            images=[image for each in drawn for image in each.images],
            request=drawer.request,
            latents=np.concatenate([each.latents for each in drawn]),
            timings=drawer.timings.finish(),
            bundle_sha256=self._sha256,
        )


def _for_caller(step: Step, preview: PreviewRecord | None) -> Step:
    """Return a step that the caller may do with as it likes."""
    pictures = () if preview is None else tuple(preview_image(step.x0, preview))
    return replace(step, latents=step.latents.copy(), x0=step.x0.copy(), previews=pictures)


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
