"""The passes of a request: how large the images of each are, and which steps it makes."""

from typing import TypeVar

from ldm_runtime.errors import RequestError
from ldm_runtime.requests.micro_conditioning import micro_conditioning_of
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolved import NoImage, RequestImage, SamplingPass, WholeImage
from ldm_runtime.requests.sizes import Size, hires_size
from ldm_runtime.schedules import SigmaTable, steps_until
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.tasks import task_record

#: Default `strength` without and with a mask, and that of the second pass at high resolution: the
#: share of an image that is forgotten.
IMAGE_STRENGTH, MASK_STRENGTH, HIRES_STRENGTH = 0.8, 1.0, 0.6

_T = TypeVar("_T")


def sampling_passes(
    request: GenerationRequest,
    image: RequestImage,
    size: Size,
    sigmas: tuple[float, ...],
    table: SigmaTable,
    spec: ModelSpec,
) -> tuple[SamplingPass, ...]:
    """Return the passes of a request that samples, each with at least one step.

    Args:
        request: The request.
        image: Its image.
        size: Height and width of its images.
        sigmas: Noise levels from first to last.
        table: The model's training sigmas.
        spec: The model.

    Raises:
        RequestError: A pass would make no step, or too large images.
    """
    strength, total = 1.0, len(sigmas) - 1
    if not isinstance(image, NoImage) and task_record(spec).image == "start":
        default = IMAGE_STRENGTH if isinstance(image, WholeImage) else MASK_STRENGTH
        strength = _first(request.strength, default)
    steps = _within_schedule(last_steps(total, strength), request, sigmas, table)
    first = SamplingPass(
        height=size[0],
        width=size[1],
        strength=strength,
        steps=steps,
        first_step=1 if request.denoising_start is None else steps.start + 1,
        scale=1.0,
        micro_conditioning=micro_conditioning_of(request, size),
    )
    if request.hires_scale is None:
        return (first,)
    strength = _first(request.hires_strength, HIRES_STRENGTH)
    steps = last_steps(total, strength, "hires_strength")
    height, width = hires_size(size, request.hires_scale, spec)
    second = SamplingPass(
        height=height,
        width=width,
        strength=strength,
        steps=steps,
        first_step=total + 1,
        scale=request.hires_scale,
        micro_conditioning=micro_conditioning_of(request, (height, width)),
    )
    return first, second


def last_steps(total: int, strength: float, field: str = "strength") -> range:
    """Return the indices of the last steps: as many as diffusers' pipelines make.

    Raises:
        RequestError: That is less than one step.
    """
    kept = min(int(total * strength), total)
    if kept == 0:
        raise RequestError(
            field, f"{strength:g} of {total} steps is less than one; raise it or the steps"
        )
    return range(total - kept, total)


def _within_schedule(
    steps: range, request: GenerationRequest, sigmas: tuple[float, ...], table: SigmaTable
) -> range:
    """Return the steps between `denoising_start` and `denoising_end`."""
    start, end = request.denoising_start, request.denoising_end
    first = steps.start if start is None else steps_until(table, start, sigmas)
    last = steps.stop if end is None else steps_until(table, end, sigmas)
    if first < last:
        return range(first, last)
    if start is None:
        raise RequestError(
            "denoising_end", f"{end:g} of the noise schedule leaves no step to make; raise it"
        )
    raise RequestError(
        "denoising_start",
        f"after {start:g} of the noise schedule there is no step to make; lower it",
    )


def _first(value: _T | None, default: _T) -> _T:
    return default if value is None else value
