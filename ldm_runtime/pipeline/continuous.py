"""Continuous batching: requests come and go between any two calls of the UNet they share."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import TypeAlias

from ldm_runtime.bundle.manifest import PreviewRecord
from ldm_runtime.closing import Closing
from ldm_runtime.pipeline.batching import LoopEnd, LoopItem, LoopScheduler, Share
from ldm_runtime.pipeline.deadline import Deadline
from ldm_runtime.pipeline.image_pipeline import ImagePipeline, for_caller
from ldm_runtime.pipeline.passes import GeneratedImages
from ldm_runtime.pipeline.request_run import RequestRun
from ldm_runtime.pipeline.results import Result
from ldm_runtime.pipeline.sampling import Step
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.specs.tasks import samples_per_image

_LOGGER = logging.getLogger(__name__)

#: A finished step of one image; the end of a request; or the error that ended it.
BatchEvent: TypeAlias = Step | Result | Exception
#: A request, with its defaults filled in or not.
AnyRequest: TypeAlias = GenerationRequest | ResolvedRequest
_LoopEvent: TypeAlias = LoopItem[Step | GeneratedImages] | LoopEnd


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How requests share calls of the UNet.

    Attributes:
        max_shared: Most images in a shared call.
        max_begun: Most images that have begun and not ended; more wait for the end of others.
        min_samples: Fewest samples of a request in a shared call.
        takes_turns: Whether images that have no room in the same call take turns; else the earliest
            is served first.
    """

    max_shared: int
    max_begun: int
    min_samples: int
    takes_turns: bool


class ContinuousBatch(Closing):
    """Requests that share calls of one model's UNet, while others are added and cancelled.

    Any requests do: prompts, seeds, steps, samplers and guidance may differ. Those that have begun
    and have no room in the same call, as for another image size, take turns with calls of their
    own, so none of them waits for the end of another, unless networks take turns in memory. On the
    CPU every result is what `Generator.generate` returns, bit for bit.

    A request that fails ends with its error and leaves the others alone. When a shared call of the
    UNet fails, as for want of memory, its images are computed one by one.

    It is used by one thread, and nothing runs between two calls of `advance`.

    Args:
        pipeline: The pipeline of the model.
        resolve: Fills in the defaults of a request, for the model.
        preview: Returns how steps get small images.
        sharing: How requests share calls.

    Attributes:
        max_begun: Most images that have begun and not ended.
    """

    def __init__(
        self,
        pipeline: ImagePipeline,
        *,
        resolve: Callable[[AnyRequest], ResolvedRequest],
        preview: Callable[[], PreviewRecord],
        sharing: Sharing,
    ) -> None:
        self._pipeline, self._resolve, self._preview = pipeline, resolve, preview
        self.max_begun = sharing.max_begun
        samples = samples_per_image(pipeline.model.spec, "unet")
        self._scheduler: LoopScheduler[Step | GeneratedImages] = LoopScheduler(
            max_samples=samples * sharing.max_shared,
            min_samples=sharing.min_samples,
            max_begun=samples * sharing.max_begun,
            takes_turns=sharing.takes_turns,
        )
        self._requests: dict[int, _Request] = {}
        self._images: dict[int, _Image] = {}
        self._queue: deque[_Image] = deque()
        self._request_numbers, self._image_numbers = count(), count()
        self._calls = self._called_images = 0

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def has_room(self) -> bool:
        """Whether an image that is added now would begin with the next call of `advance`."""
        return not self._queue and self._scheduler.has_room

    def add(
        self,
        request: AnyRequest,
        *,
        previews: bool = False,
        deadline_seconds: float | None = None,
        adapters: Mapping[str, float] = MappingProxyType({}),
    ) -> int:
        """Add a request, whose images are begun by the next calls of `advance`.

        Args:
            request: The request.
            previews: Whether steps carry small images of the predicted x0.
            deadline_seconds: How long it may take from its first call of a network on, waiting for
                the others included.
            adapters: Scales of the generator's live adapters, by name; the others are left out.

        Returns:
            The number of the request, which its events have.

        Raises:
            RequestError: A field is wrong, or the model cannot do what the request asks for; or the
                generator has no live adapters, one is unknown, a scale is not a finite number, or
                they do not go together.
            BundleError: There should be previews, and the bundle was exported without.
        """
        request = self._resolve(request)
        preview = self._preview() if previews else None
        run = self._pipeline.run_of(request, Deadline(deadline_seconds), adapters)
        number = next(self._request_numbers)
        self._requests[number] = _Request(run=run, preview=preview)
        self._queue.extend(
            _Image(request=number, index=index) for index in range(request.num_images)
        )
        return number

    def cancel(self, number: int) -> None:
        """Stop a request, which then has no more events; one that has ended is left alone."""
        if self._requests.pop(number, None) is None:
            return
        self._queue = deque(each for each in self._queue if each.request != number)
        for loop, image in list(self._images.items()):
            if image.request == number:
                del self._images[loop]
                self._scheduler.stop(loop)

    def advance(self) -> list[tuple[int, BatchEvent]]:
        """Begin images as far as there is room, call the UNet once, and return what happened.

        Returns:
            Events with the numbers of their requests, in the order that they happened.
        """
        return list(self._events())

    def take_calls(self) -> tuple[int, int]:
        """Return the calls of the UNet since this was last asked, and the images in them.

        An image counts as often as it was in a call, so that their ratio is the mean batch.
        """
        taken = self._calls, self._called_images
        self._calls = self._called_images = 0
        return taken

    def close(self) -> None:
        """Stop all requests. Closing twice is harmless."""
        for number in list(self._requests):
            self.cancel(number)
        self._scheduler.close()

    def _events(self) -> Iterator[tuple[int, BatchEvent]]:
        while self._queue and self._scheduler.has_room:
            image, loop = self._queue.popleft(), next(self._image_numbers)
            self._images[loop] = image
            steps = partial(self._requests[image.request].steps, image.index)
            for event in self._scheduler.begin(loop, steps):
                yield from self._after(loop, event)
        if self._scheduler.is_waiting:
            for loop, event in self._call(self._scheduler.next_call()):
                yield from self._after(loop, event)

    def _call(self, chosen: list[int]) -> Iterator[tuple[int, _LoopEvent]]:
        """Call the UNet for some images at once; one by one if that fails."""
        try:
            yield from self._scheduler.call(chosen)
            self._calls += 1
            self._called_images += len(chosen)
        except Exception as error:  # noqa: BLE001  (the request's caller gets it)
            if len(chosen) == 1:
                self._scheduler.stop(chosen[0])
                yield chosen[0], LoopEnd(error=error)
                return
            _LOGGER.warning("%d images are computed one by one: %s", len(chosen), error)
            for loop in chosen:
                if loop in self._images:  # else the failure of another image has ended its request
                    yield from self._call([loop])

    def _after(self, loop: int, event: _LoopEvent) -> Iterator[tuple[int, BatchEvent]]:
        """Note an event of an image, and yield what the request's caller is to know."""
        image = self._images[loop]
        if isinstance(event, LoopEnd):
            del self._images[loop]
            if event.error is None:
                return
            if not isinstance(event.error, Exception):
                raise event.error
            self.cancel(image.request)
            yield image.request, event.error
            return
        request = self._requests[image.request]
        if isinstance(event.item, Step):
            yield image.request, for_caller(event.item, request.preview)
            return
        request.generated[image.index] = event.item
        if len(request.generated) == request.run.request.num_images:
            del self._requests[image.request]
            generated = [images for _, images in sorted(request.generated.items())]
            yield image.request, request.run.result(generated)


@dataclass(frozen=True, kw_only=True)
class _Image:
    """One image of a request: the numbers of both."""

    request: int
    index: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Request:
    run: RequestRun
    preview: PreviewRecord | None
    generated: dict[int, GeneratedImages] = field(default_factory=dict)

    def steps(self, image: int, share: Share) -> Iterator[Step | GeneratedImages]:
        return self.run.images(range(image, image + 1), share)
