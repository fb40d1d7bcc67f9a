"""The pipeline of a bundle: resolved requests become results, one by one or sharing calls."""

import collections.abc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ldm_runtime.backends.contract import Runner
from ldm_runtime.bundle.manifest import PreviewRecord
from ldm_runtime.conditioning import used_inversions
from ldm_runtime.latents.previews import preview_image
from ldm_runtime.pipeline.batching import SharedRunner, in_order, run_together
from ldm_runtime.pipeline.deadline import Deadline
from ldm_runtime.pipeline.feature_reuse import open_unet
from ldm_runtime.pipeline.open_model import OpenModel
from ldm_runtime.pipeline.passes import (
    GeneratedImages,
    ImagePasses,
    Pass,
    PassRun,
    Timings,
    open_passes,
)
from ldm_runtime.pipeline.results import Result
from ldm_runtime.pipeline.sampling import Step, batches, sample_latents
from ldm_runtime.requests.advice import advice
from ldm_runtime.requests.resolved import ResolvedRequest

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePipeline:
    """Runs the requests of one model; it holds no state between them.

    Attributes:
        model: The model.
        refiner: The model that makes the last steps, if there is one.
    """

    model: OpenModel
    refiner: OpenModel | None = None

    def stream(
        self,
        request: ResolvedRequest,
        preview: PreviewRecord | None,
        deadline: Deadline,
        *,
        batch_size: int,
    ) -> collections.abc.Generator[Step | Result, None, None]:
        """Yield a `Step` after each step of a request, then its `Result`.

        Args:
            request: The request.
            preview: How steps get small images; None is without.
            deadline: Started with the first item.
            batch_size: Images that are sampled together.

        Raises:
            DeadlineError: Between two steps, when time is up.
        """
        deadline.start()
        passes = self._open_passes(request)
        generated = []
        for images in batches(request.num_images, batch_size):
            pass_run = self._run_passes(passes.run(images), _unshared, passes.timings)
            while not isinstance(event := next(pass_run), GeneratedImages):
                deadline.check(event)
                yield _for_caller(event, preview)
            generated.append(event)
        yield self._result(passes, generated)

    def together(
        self,
        requests: Sequence[ResolvedRequest],
        deadlines: Sequence[Deadline],
        *,
        max_samples: int,
        min_samples: int,
    ) -> Iterator[Result]:
        """Yield the results of requests that share calls of the UNet, in order.

        Args:
            requests: The requests.
            deadlines: One for each, started when its first network is called.
            max_samples: Most samples in a shared call, see `run_together`.
            min_samples: Fewest samples of a request in a shared call.

        Raises:
            DeadlineError: Between two steps, when the time of a request is up.
        """
        all_passes: dict[int, ImagePasses] = {}

        def generate_image(
            number: int, image: int, unet: SharedRunner
        ) -> Iterator[GeneratedImages]:
            if number not in all_passes:  # loops take turns: no other is opening it
                deadlines[number].start()
                all_passes[number] = self._open_passes(requests[number])
            pass_run = all_passes[number].run(range(image, image + 1))
            for event in self._run_passes(pass_run, unet.over, all_passes[number].timings):
                if isinstance(event, GeneratedImages):
                    yield event
                else:
                    deadlines[number].check(event)

        loops = (
            partial(generate_image, number, image)
            for number, request in enumerate(requests)
            for image in range(request.num_images)
        )
        unet = self.model.network("unet")
        shared = run_together(loops, unet, max_samples=max_samples, min_samples=min_samples)
        with closing(in_order(shared)) as generated:
            for number, request in enumerate(requests):
                images = [next(generated) for _ in range(request.num_images)]
                yield self._result(all_passes.pop(number), images)

    def _open_passes(self, request: ResolvedRequest) -> ImagePasses:
        model = self.model
        for sentence in advice(request, model.spec):
            _LOGGER.warning("%s", sentence)
        return open_passes(model.network, model.tokenizer, request, model.spec, self.refiner)

    def _run_passes(
        self, pass_run: PassRun, shared: Callable[[Runner], Runner], timings: Timings
    ) -> Iterator[Step | GeneratedImages]:
        """Run the passes of an image one after the other; the generated images come last.

        Args:
            pass_run: The passes.
            shared: Returns a UNet as the passes are to see it.
            timings: Counts the seconds of the UNets.
        """
        advance: Callable[[], Pass] = partial(next, pass_run)
        while True:
            try:
                wanted = advance()
            except StopIteration as end:
                yield end.value
                return
            steps = self._sample(wanted, shared)
            while True:
                with timings.of("unet"):
                    step = next(steps, None)
                if step is None:
                    break
                last = step
                yield step
            advance = partial(pass_run.send, last.latents)

    def _sample(self, wanted: Pass, shared: Callable[[Runner], Runner]) -> Iterator[Step]:
        reuse, refiner = wanted.request.reuse, wanted.refiner
        unet = open_unet(self.model, reuse, shared)
        if refiner is not None and self.refiner is not None:
            refiner = replace(refiner, open_unet=partial(open_unet, self.refiner, reuse, shared))
        for step in sample_latents(
            *(unet, wanted.conditioning, wanted.request, self.model.spec),
            images=wanted.images,
            start=wanted.start,
            refiner=refiner,
        ):
            index = wanted.steps_before + step.index
            yield replace(step, index=index, total=wanted.total_steps)

    def _result(self, passes: ImagePasses, generated: Sequence[GeneratedImages]) -> Result:
        return Result(
            images=[image for each in generated for image in each.images],
            request=passes.request,
            latents=np.concatenate([each.latents for each in generated]),
            timings=passes.timings.finish(),
            bundle_sha256=self.model.origin.bundle_sha256,
            build=self.model.origin.build,
            refiner=None if passes.refiner is None or self.refiner is None else self.refiner.origin,
            textual_inversions=used_inversions(self.model.tokenizer, passes.request),
        )


def _unshared(unet: Runner) -> Runner:
    return unet


def _for_caller(step: Step, preview: PreviewRecord | None) -> Step:
    """Return a copy of a step, which the caller may change."""
    images = () if preview is None else tuple(preview_image(step.x0, preview))
    return replace(step, latents=step.latents.copy(), x0=step.x0.copy(), previews=images)
