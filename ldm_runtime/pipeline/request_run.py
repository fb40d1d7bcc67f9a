"""The run of one request: its images are generated in any order, in any company."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from ldm_runtime.backends.contract import Runner
from ldm_runtime.conditioning import used_inversions
from ldm_runtime.pipeline.deadline import Deadline
from ldm_runtime.pipeline.feature_reuse import open_unet
from ldm_runtime.pipeline.live_adapters import BranchedRunner
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
from ldm_runtime.pipeline.sampling import Step, sample_latents
from ldm_runtime.requests.advice import advice
from ldm_runtime.requests.log_records import ABOUT_REQUEST
from ldm_runtime.requests.resolved import ResolvedRequest

_LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class RequestRun:
    """A request while its images are generated; used by one thread at a time.

    Attributes:
        model: The model.
        refiner: The model that makes the last steps, if there is one.
        request: The request.
        deadline: Started when a network is first called.
    """

    model: OpenModel
    refiner: OpenModel | None
    request: ResolvedRequest
    deadline: Deadline
    _passes: ImagePasses | None = field(default=None, init=False)

    def images(
        self, images: range, share: Callable[[Runner], Runner] = lambda unet: unet
    ) -> Iterator[Step | GeneratedImages]:
        """Generate some images as one batch: yield a `Step` after each step, then the images.

        Conditions are encoded once for all images of the request.

        Args:
            images: Their indices.
            share: Returns a UNet as this batch is to see it.

        Raises:
            DeadlineError: Between two steps, when time is up.
        """
        passes = self._open_passes()
        for event in self._run_passes(passes.run(images), share, passes.timings):
            if isinstance(event, Step):
                self.deadline.check(event)
            yield event

    def result(self, generated: Sequence[GeneratedImages]) -> Result:
        """Return the result of all batches, in the order of the images, which ends the run."""
        passes = self._open_passes()
        self._passes = None
        return Result(
            images=[image for each in generated for image in each.images],
            request=passes.request,
            latents=np.concatenate([each.latents for each in generated]),
            timings=passes.timings.finish(),
            bundle_sha256=self.model.origin.bundle_sha256,
            build=self.model.origin.build,
            refiner=None if passes.refiner is None or self.refiner is None else self.refiner.origin,
            textual_inversions=used_inversions(self.model.tokenizer, passes.request),
            adapters=self.model.origin.adapters,
        )

    def _open_passes(self) -> ImagePasses:
        """Encode the conditions, once."""
        if self._passes is None:
            self.deadline.start()
            model = self.model
            for sentence in advice(self.request, model.spec):
                _LOGGER.warning("%s", sentence, extra=ABOUT_REQUEST)
            self._passes = open_passes(
                model.network, model.tokenizer, self.request, model.spec, self.refiner
            )
        return self._passes

    def _run_passes(
        self, pass_run: PassRun, share: Callable[[Runner], Runner], timings: Timings
    ) -> Iterator[Step | GeneratedImages]:
        """Run the passes of a batch one after the other; the generated images come last.

        Args:
            pass_run: The passes.
            share: Returns a UNet as the passes are to see it.
            timings: Counts the seconds of the UNets.
        """
        advance: Callable[[], Pass] = partial(next, pass_run)
        while True:
            try:
                wanted = advance()
            except StopIteration as end:
                yield end.value
                return
            steps = self._sample(wanted, share)
            while True:
                with timings.of("unet"):
                    step = next(steps, None)
                if step is None:
                    break
                last = step
                yield step
            advance = partial(pass_run.send, last.latents)

    def _sample(self, wanted: Pass, share: Callable[[Runner], Runner]) -> Iterator[Step]:
        reuse, refiner = wanted.request.reuse, wanted.refiner
        unet = open_unet(self.model, reuse, partial(_shared, share))
        if refiner is not None and self.refiner is not None:
            refiner = replace(refiner, open_unet=partial(open_unet, self.refiner, reuse, share))
        for step in sample_latents(
            *(unet, wanted.conditioning, wanted.request, self.model.spec),
            images=wanted.images,
            start=wanted.start,
            refiner=refiner,
        ):
            index = wanted.steps_before + step.index
            yield replace(step, index=index, total=wanted.total_steps)


def _shared(share: Callable[[Runner], Runner], unet: Runner) -> Runner:
    """Return a UNet whose calls are shared; its branches keep the matrices of this request."""
    return unet.shared(share) if isinstance(unet, BranchedRunner) else share(unet)
