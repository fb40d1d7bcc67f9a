"""Advice on requests that are valid, but will not do what they look like."""

from collections.abc import Iterator

from ldm_runtime.requests.resolved import (
    MaskedImage,
    OutpaintedImage,
    PartlyDenoised,
    PromptCondition,
    ResolvedRequest,
    WholeImage,
)
from ldm_runtime.requests.scheduled_prompts import prompt_texts
from ldm_runtime.requests.sizes import padded_size
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.tasks import task_record
from ldm_runtime.text.prompts import unread_syntax
from ldm_runtime.tiling.tiles import GOOD_TILE

#: Lowest noise level to start from noise at: below it a model expects more image than noise. Of the
#: shapes model, eight images from 0.5 were visibly grainy, and those from 1 were not.
LOWEST_START = 1.0


def advice(request: ResolvedRequest, spec: ModelSpec) -> Iterator[str]:
    """Yield a sentence, with the field and the fix, for each surprise that a request holds."""
    yield from _about_prompts(request)
    yield from _about_steps(request, spec)
    yield from _about_tiles(request, spec)


def _about_prompts(request: ResolvedRequest) -> Iterator[str]:
    condition = request.condition
    if not isinstance(condition, PromptCondition) or condition.literal:
        return
    found = {
        (field, name): example
        for field, text in prompt_texts(request)
        for name, example in unread_syntax(text)
    }
    for (field, name), example in found.items():
        yield f"{field}: {name} such as {example!r} is not read, its characters are; leave it out"


def _about_steps(request: ResolvedRequest, spec: ModelSpec) -> Iterator[str]:
    if not _starts_from_noise(request, spec) or request.sigmas[0] >= LOWEST_START:
        return
    yield (
        f"num_inference_steps: {request.num_inference_steps} of the schedule {request.schedule!r} "
        f"start at sigma {request.sigmas[0]:.3g}, where the model expects an almost finished image "
        "and finds noise; make more steps, or choose the schedule 'trailing'"
    )


def _starts_from_noise(request: ResolvedRequest, spec: ModelSpec) -> bool:
    if isinstance(request.first_noise, PartlyDenoised):
        return False
    match request.source_image:
        case WholeImage() if task_record(spec).image == "start":
            return False
        case MaskedImage() | OutpaintedImage() if task_record(spec).image == "start":
            return request.passes[0].strength == 1
    return bool(request.passes)


def _about_tiles(request: ResolvedRequest, spec: ModelSpec) -> Iterator[str]:
    factor, tile = spec.autoencoder.factor, request.tile_size
    scale = request.passes[-1].scale if request.passes else 1.0
    if 0 < tile < GOOD_TILE * factor and tile < scale * max(padded_size(request, spec)):
        yield (
            f"tile_size: tiles of {tile} pixels see too little to agree with each other; take at "
            f"least {GOOD_TILE * factor}, or 0 for one piece"
        )
