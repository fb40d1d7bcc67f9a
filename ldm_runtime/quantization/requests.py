"""Requests in which 8 bits are measured: like the golden ones, with other seeds and sizes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ldm_runtime.diagnostics.golden_outputs import GoldenOutput
from ldm_runtime.errors import RequestError
from ldm_runtime.requests.checks import check_positive
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.tasks import takes_prompts, task_record

_LOGGER = logging.getLogger(__name__)

#: Fields of a golden request that say what its images show.
_CONDITIONS = (
    *("prompt", "negative_prompt", "class_label", "layout", "segmentation", "embeddings"),
    *("depth_map", "image", "mask_image", "outpaint", "noise_level"),
)
#: Fields whose values have the size of the images, as `image` has of most tasks.
_MAPS = ("segmentation", "depth_map")
#: The first seed; golden requests have seeds from 0.
_FIRST_SEED = 1000


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Requests of one image each.

    Attributes:
        measured: Those in which the ranges of activations are measured.
        compared: Others, whose images are compared.
    """

    measured: tuple[ResolvedRequest, ...]
    compared: tuple[ResolvedRequest, ...]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Which requests 8 bits are measured in.

    Attributes:
        measured: Images in which ranges are measured, at least 1.
        compared: Images that are compared, in addition to the golden ones, at least 1.
        prompts: Prompts, taken in turn; none are those of the golden requests.
        steps: Steps of each; None is the model's default.
    """

    measured: int = 4
    compared: int = 2
    prompts: tuple[str, ...] = ()
    steps: int | None = None


def make_samples(
    goldens: Sequence[GoldenOutput], spec: ModelSpec, options: SampleOptions
) -> Samples:
    """Return requests that ask for what golden requests ask for, as users would.

    Sampler, steps and guidance are the model's defaults, and the size is where no image or map of
    the golden request has one.

    Raises:
        RequestError: A prompt or the number of steps is not one that the model takes, or there are
            prompts for a model that takes none.
        ValueError: No image is to be measured or compared.
    """
    check_positive("measured", options.measured)
    check_positive("compared", options.compared)
    if options.prompts and not takes_prompts(spec):
        raise RequestError("prompts", f"a model of the task {spec.task!r} has none; leave them out")
    count = options.measured + options.compared
    if len(options.prompts) > count:
        _LOGGER.warning(
            "%d prompts are for %d images, so that the last ones are not used; ask for more images",
            len(options.prompts),
            count,
        )
    all_requests = tuple(
        _sample(goldens[index % len(goldens)].request, index, spec, options)
        for index in range(count)
    )
    return Samples(
        measured=all_requests[: options.measured], compared=all_requests[options.measured :]
    )


def _sample(
    golden: ResolvedRequest, index: int, spec: ModelSpec, options: SampleOptions
) -> ResolvedRequest:
    request = golden.as_request()
    fields = {name: getattr(request, name) for name in _CONDITIONS}
    has_map = any(fields[name] is not None for name in _MAPS)
    if has_map or (fields["image"] is not None and task_record(spec).fits_image):
        fields |= {"height": request.height, "width": request.width}
    if options.prompts and fields["prompt"] is not None:
        fields["prompt"] = options.prompts[index % len(options.prompts)]
    fields |= {"num_inference_steps": options.steps, "seed": _FIRST_SEED + index}
    return resolve(GenerationRequest(**fields), spec)
