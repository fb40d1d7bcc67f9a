"""From the fields that a client sends to a request that is checked and within the limits."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ldm_runtime.conditioning import most_chunks
from ldm_runtime.errors import LdmError
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.requests.preset_fields import with_preset_fields
from ldm_runtime.requests.remote_fields import parse_remote_request
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.resolved import (
    EmbeddingsCondition,
    MaskedImage,
    NoCondition,
    NoDepth,
    NoImage,
    ResolvedRequest,
    SeededNoise,
    SegmentationCondition,
)
from ldm_runtime.requests.scheduled_prompts import count_characters
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.tasks import task_record
from ldm_serve.errors import ServeError, from_runtime, invalid
from ldm_serve.served_models import ServedModel
from ldm_serve.settings import Limits

_NO_PIXELS = InputImage(np.zeros((1, 1, 3), np.uint8))


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A request that the model can do and the server allows.

    Attributes:
        model: The model.
        request: The request with everything filled in.
        fields: The fields as they came, with the seeds that were chosen: they decide every byte
            of the images.
    """

    model: ServedModel
    request: ResolvedRequest
    fields: dict[str, Any]


def check_request(fields: Mapping[str, Any], model: ServedModel, limits: Limits) -> Checked:
    """Check the fields of a request, fill in its seed, and compare it with the limits.

    Images are decoded here, within the bounds of `ldm_runtime.inputs.reading`. No file is read and
    no address is fetched. What makes it long to look further is compared with the limits first.

    Args:
        fields: Fields of a `GenerationRequest`; images and maps are `data:` URLs.
        model: The model.
        limits: The limits.

    Raises:
        ServeError: A field is unknown, of the wrong type or out of range; the model cannot do what
            the request asks for; or it is beyond a limit.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    for name in ("prompt", "negative_prompt"):
        text = given.get(name)
        if isinstance(text, str) and len(text) > limits.max_prompt_characters:
            most = limits.max_prompt_characters
            raise invalid(name, f"{name}: has {len(text)} characters; at most {most} are read")
    try:
        asked = parse_remote_request(given)
        _check_asked(asked, model.spec, limits)
        request = resolve(asked, model.spec)
    except LdmError as error:
        raise from_runtime(error) from error
    _check_limits(request, limits)
    _check_texts(request, model.spec, limits)
    seeds = {"seed": request.seed}
    if request.is_variation:
        seeds["variation_seed"] = request.variation_seed
    return Checked(model=model, request=request, fields={**given, **seeds})


def without_inputs(checked: Checked) -> Checked:
    """Return a request without the images and arrays that it has brought, which workers read again.

    A photograph is a hundred times as large as its file, and requests and results wait for long.
    """
    request = checked.request
    image, condition = request.source_image, request.condition
    if not isinstance(image, NoImage):
        image = replace(image, image=_NO_PIXELS)
    if isinstance(image, MaskedImage):
        image = replace(image, mask=_NO_PIXELS)
    if isinstance(condition, SegmentationCondition | EmbeddingsCondition):
        condition = NoCondition()
    request = replace(
        request,
        source_image=image,
        condition=condition,
        depth=NoDepth(),
        first_noise=SeededNoise(),
    )
    return replace(checked, request=request, fields={})


def cost(request: ResolvedRequest) -> float:
    """Return the cost of a request in megapixel steps: a sampler step of a million pixels is 1.

    A guided step counts once per sample of the UNet. A model that only encodes and decodes takes
    one step.
    """
    passes = [(each.width * each.height, len(each.steps)) for each in request.passes]
    steps = sum(pixels * count for pixels, count in passes) or request.width * request.height
    samples = len(request.guidance.scales) + 1
    return steps * samples * request.num_images / 1e6


def _check_asked(request: GenerationRequest, spec: ModelSpec, limits: Limits) -> None:
    """Compare with the limits what a request says itself, before its prompts are read step by step.

    Raises:
        RequestError: Its preset is for other models, or a prompt cannot be read.
        ServeError: It is beyond a limit.
    """
    pixels = (request.width or 0) * (request.height or 0)
    steps = _asked_steps(request, spec)
    _check_counts(request.num_images, pixels, steps, limits)
    characters = count_characters(request, max(1, steps))
    most, total = limits.max_changing_characters, sum(characters.values())
    if total > most:
        field = max(characters, key=lambda name: characters[name])
        found = f"{total} characters in all texts of prompts that change between steps"
        raise _beyond(field, found, f"{most}; change them in fewer steps, or shorten them")


def _asked_steps(request: GenerationRequest, spec: ModelSpec) -> int:
    """Return the steps of the schedule that a request asks for, or its preset or the model."""
    if request.sigmas is not None:
        return len(request.sigmas) - 1
    steps = with_preset_fields(request, spec).num_inference_steps
    if steps is None and task_record(spec).samples:
        return spec.defaults.num_inference_steps
    return steps or 0


def _check_limits(request: ResolvedRequest, limits: Limits) -> None:
    pixels = max([request.width * request.height, *(p.width * p.height for p in request.passes)])
    steps = sum(len(each.steps) for each in request.passes)
    _check_counts(request.num_images, pixels, steps, limits)
    if cost(request) > limits.max_cost:
        raise _beyond(
            "num_inference_steps",
            f"a cost of {cost(request):.0f} megapixel steps",
            f"{limits.max_cost:g}; ask for fewer steps or images, or smaller ones",
        )


def _check_counts(images: int, pixels: int, steps: int, limits: Limits) -> None:
    if images > limits.max_images:
        raise _beyond("num_images", f"{images} images", f"{limits.max_images}")
    if pixels > limits.max_pixels:
        raise _beyond("width", f"{pixels} pixels in an image", f"{limits.max_pixels}")
    if steps > limits.max_steps:
        raise _beyond("num_inference_steps", f"{steps} steps", f"{limits.max_steps}")


def _check_texts(request: ResolvedRequest, spec: ModelSpec, limits: Limits) -> None:
    chunks, most = most_chunks(request, spec), limits.max_text_chunks
    if chunks > most:
        fix = "change the prompts in fewer steps, or shorten them"
        raise _beyond("prompt", f"about {chunks} chunks of text", f"{most}; {fix}")


def _beyond(field: str, found: str, limit: str) -> ServeError:
    return invalid(field, f"{field}: {found} is beyond this server's limit of {limit}", "limit")
