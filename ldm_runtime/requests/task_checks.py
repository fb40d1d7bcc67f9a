"""Checks of a request against the task of a model."""

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType

from ldm_runtime.errors import RequestError
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.tasks import can_guide, embeds_guidance, task_record


def check_needs(
    request: GenerationRequest, spec: ModelSpec, spelling: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Check that a request has what a model's task needs.

    Args:
        request: The request.
        spec: The model.
        spelling: Names of some fields in the message, such as the flag that sets each.

    Raises:
        RequestError: Something is missing; the sentence names all that is.
    """
    missing = [
        group
        for group in task_record(spec).needs
        if all(getattr(request, name) is None for name in group)
    ]
    if missing:
        wanted = " and ".join(
            " or ".join(spelling.get(name, name) for name in group) for group in missing
        )
        raise RequestError(missing[0][0], f"this bundle is {spec.task}: give {wanted}")


def check_unknown(request: GenerationRequest, spec: ModelSpec) -> None:
    """Check that a request has no field that means nothing to a model's task.

    Raises:
        RequestError: A field belongs to other tasks.
    """
    takes = task_record(spec).takes
    for field in fields(request):
        if field.name not in takes and getattr(request, field.name) != field.default:
            raise RequestError(
                field.name, f"means nothing to this bundle, which is {spec.task}; leave it out"
            )


def check_guidance(request: GenerationRequest, spec: ModelSpec) -> None:
    """Check that a request asks for guidance only where there is something to steer away from.

    A UNet that takes the guidance scale as an input needs nothing of the kind for the scale alone.

    Raises:
        RequestError: It does elsewhere.
    """
    if can_guide(spec):
        return
    asked = {
        "guidance_scale": request.guidance_scale not in (None, 1.0) and not embeds_guidance(spec),
        "guidance_rescale": request.guidance_rescale != 0,
        "guidance_interval": request.guidance_interval is not None,
        "negative_prompt": request.negative_prompt != "",
    }
    for name in asked:
        if asked[name]:
            raise RequestError(
                name,
                f"is {getattr(request, name)!r}, but this bundle ({spec.task}) has no null "
                "condition to steer away from; leave it out",
            )


def check_decoder(request: GenerationRequest, spec: ModelSpec) -> None:
    """Check that a bundle has the decoder that a request asks for.

    Raises:
        RequestError: It was exported without.
    """
    if request.decoder not in spec.decoders:
        raise RequestError(
            "decoder",
            f"is {request.decoder}, but this bundle has only {' and '.join(spec.decoders)}; leave "
            "it out, or export the checkpoint again with --tiny-decoder taesd_decoder.safetensors",
        )
