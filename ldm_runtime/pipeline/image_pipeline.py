"""The pipeline of a bundle: resolved requests become results, one by one or sharing calls."""

import collections.abc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

from ldm_runtime.bundle.manifest import PreviewRecord
from ldm_runtime.latents.previews import preview_image
from ldm_runtime.pipeline.batching import SharedRunner, in_order, run_together
from ldm_runtime.pipeline.deadline import Deadline
from ldm_runtime.pipeline.live_adapters import with_live_adapters
from ldm_runtime.pipeline.open_model import OpenModel
from ldm_runtime.pipeline.passes import GeneratedImages
from ldm_runtime.pipeline.request_run import RequestRun
from ldm_runtime.pipeline.results import Result
from ldm_runtime.pipeline.sampling import Step, batches
from ldm_runtime.requests.resolved import ResolvedRequest


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePipeline:
    """Runs the requests of one model; it holds no state between them.

    Attributes:
        model: The model.
        refiner: The model that makes the last steps, if there is one.
    """

    model: OpenModel
    refiner: OpenModel | None = None

    def run_of(
        self,
        request: ResolvedRequest,
        deadline: Deadline,
        adapters: Mapping[str, float] = MappingProxyType({}),
    ) -> RequestRun:
        """Return the run of a request, which begins when its first image is asked for.

        Args:
            request: The request.
            deadline: Started when a network is first called.
            adapters: Scales of the model's live adapters, by name.

        Raises:
            RequestError: The model has no live adapters, one is unknown, a scale is not a finite
                number, or they do not go together.
        """
        model = with_live_adapters(self.model, adapters)
        return RequestRun(model=model, refiner=self.refiner, request=request, deadline=deadline)

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
        run = self.run_of(request, deadline)
        generated = []
        for images in batches(request.num_images, batch_size):
            for event in run.images(images):
                if isinstance(event, GeneratedImages):
                    generated.append(event)
                else:
                    yield for_caller(event, preview)
        yield run.result(generated)

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
        runs = [self.run_of(*each) for each in zip(requests, deadlines, strict=True)]

        def generate_image(
            run: RequestRun, image: int, unet: SharedRunner
        ) -> Iterator[GeneratedImages]:
            for event in run.images(range(image, image + 1), unet.over):
                if isinstance(event, GeneratedImages):
                    yield event

        loops = (
            partial(generate_image, run, image)
            for run in runs
            for image in range(run.request.num_images)
        )
        unet = self.model.network("unet")
        shared = run_together(loops, unet, max_samples=max_samples, min_samples=min_samples)
        with closing(in_order(shared)) as generated:
            for run in runs:
                yield run.result([next(generated) for _ in range(run.request.num_images)])


def for_caller(step: Step, preview: PreviewRecord | None) -> Step:
    """Return a copy of a step, which the caller may change.

    Args:
        step: The step.
        preview: How it gets small images; None is without.
    """
    images = () if preview is None else tuple(preview_image(step.x0, preview))
    return replace(step, latents=step.latents.copy(), x0=step.x0.copy(), previews=images)
