"""What a request means for one model: every field filled in, and the noise levels it visits."""

import secrets
from dataclasses import replace
from typing import TypeVar

from ldm_runtime.errors import BundleError, RequestError
from ldm_runtime.requests.conditions import check_conditions
from ldm_runtime.requests.request import GIVEN, MAX_IMAGES, GenerationRequest
from ldm_runtime.requests.sizes import (
    TILE_LATENTS,
    WHOLE_LATENTS,
    canvas_size,
    hires_size,
    latent_size,
    with_size,
)
from ldm_runtime.requests.task_checks import check_foreign, check_guidance, check_needs
from ldm_runtime.samplers import SAMPLERS, SamplerRecord
from ldm_runtime.schedules import (
    SigmaTable,
    given_sigmas,
    rescale_zero_terminal_snr,
    sampling_sigmas,
    training_sigmas,
)
from ldm_runtime.specs.model import ModelSpec, size_step
from ldm_runtime.specs.tasks import can_guide, task_record

__all__ = [
    "HIRES_STRENGTH",
    "IMAGE_STRENGTH",
    "MASK_STRENGTH",
    "TILE_LATENTS",
    "WHOLE_LATENTS",
    "canvas_size",
    "hires_size",
    "last_sigmas",
    "latent_size",
    "resolve",
    "sampler_of",
    "sigma_table",
    "sigmas_of",
    "size_step",
    "strengths",
]

#: How much of a picture is forgotten unless a request says so: `strength` without and with a mask,
#: and that of the second pass at high resolution.
IMAGE_STRENGTH, MASK_STRENGTH, HIRES_STRENGTH = 0.8, 1.0, 0.6

_T = TypeVar("_T")


def resolve(request: GenerationRequest, spec: ModelSpec) -> GenerationRequest:
    """Return `request` with every field filled in that means something to a model, and checked.

    Resolving a resolved request changes nothing, and the result is all that decides a picture. A
    first stage alone draws nothing at random: its request keeps None in all fields of sampling, and
    an open seed becomes 0.

    Raises:
        RequestError: The model cannot do what the request asks for.
    """
    check_needs(request, spec)
    check_foreign(request, spec)
    check_conditions(request, spec)
    _check_company(request)
    request = with_size(request, spec)
    if not task_record(spec).samples:
        return replace(request, seed=_first(request.seed, 0))
    check_guidance(request, spec)
    request = _with_steering(_with_sampler(_with_sigmas(request), spec), spec)
    for name, strength in strengths(request).items():
        last_sigmas(sigmas_of(request, spec), strength, name)
    return request


def sampler_of(request: GenerationRequest) -> SamplerRecord:
    """Return the sampler of a request that names one."""
    return SAMPLERS[str(request.sampler)]


def strengths(request: GenerationRequest) -> dict[str, float]:
    """Return, by field, the shares of the steps that the passes of a resolved request make."""
    first = {"strength": request.strength or 1.0}
    return (
        first
        if request.hires_strength is None
        else first | {"hires_strength": request.hires_strength}
    )


def sigma_table(request: GenerationRequest, spec: ModelSpec) -> SigmaTable:
    """Return the noise level of every training timestep, as a request sees the model.

    Raises:
        BundleError: The model has no schedule.
    """
    try:
        if request.zero_terminal_snr:
            return training_sigmas(rescale_zero_terminal_snr(spec.alphas_cumprod))
        return training_sigmas(spec.alphas_cumprod)
    except ValueError as error:
        raise BundleError(f"{error}; export the bundle again") from error


def sigmas_of(request: GenerationRequest, spec: ModelSpec) -> list[float]:
    """Return the noise levels that a resolved request visits, if it starts from noise.

    Raises:
        RequestError: The model's schedule has no such steps.
        BundleError: The model has no schedule.
    """
    assert request.num_inference_steps is not None, "the request is not resolved"
    table = sigma_table(request, spec)
    if request.sigmas is not None:
        return list(request.sigmas)
    final = sampler_of(request).final_sigma
    try:
        return sampling_sigmas(table, request.num_inference_steps, str(request.schedule), final)
    except ValueError as error:
        raise RequestError("num_inference_steps", str(error)) from error


def last_sigmas(sigmas: list[float], strength: float, field: str = "strength") -> list[float]:
    """Return the noise levels of the last steps: so many as diffusers' pipelines make.

    Raises:
        RequestError: That is no step.
    """
    steps = len(sigmas) - 1
    kept = min(int(steps * strength), steps)
    if kept == 0:
        raise RequestError(
            field, f"{strength:g} of {steps} steps is less than one; raise it or the steps"
        )
    return sigmas[steps - kept :]


def _check_company(request: GenerationRequest) -> None:
    """Fields that mean something only beside another field."""
    for name in ("strength", "mask_image", "outpaint"):
        if getattr(request, name) is not None and request.image is None:
            raise RequestError(name, "means nothing without an image; give image, or leave it out")
    _check_mask(request)
    if request.hires_strength is not None and request.hires_scale is None:
        raise RequestError("hires_strength", "means nothing without hires_scale; give that too")
    if request.hires_scale is not None and (request.mask_image or request.outpaint):
        raise RequestError("hires_scale", "does not go with mask_image or outpaint; draw twice")
    if request.outpaint is not None and request.mask_image is not None:
        raise RequestError("outpaint", "does not go with mask_image; draw twice")
    if request.variation_seed is not None and not request.is_variation:
        raise RequestError("variation_seed", "changes nothing at variation_strength 0; raise that")


def _check_mask(request: GenerationRequest) -> None:
    """A mask of another size would lie elsewhere than it was drawn."""
    if request.image is None or request.mask_image is None:
        return
    (width, height), image = request.mask_image.size, request.image.size
    if (width, height) != image:
        raise RequestError(
            "mask_image",
            f"has {width}x{height} pixels, but the image has {image[0]}x{image[1]}; "
            "give a mask of the image's size",
        )


def _with_sigmas(request: GenerationRequest) -> GenerationRequest:
    """Check a list of noise levels, and the fields that it replaces."""
    if request.sigmas is None:
        if request.schedule == GIVEN:
            raise RequestError("schedule", f"{GIVEN!r} means those in sigmas; give sigmas")
        return request
    if request.schedule not in (None, GIVEN):
        raise RequestError("schedule", "does not go with sigmas; leave one of them out")
    try:
        sigmas = tuple(given_sigmas(request.sigmas))
    except ValueError as error:
        raise RequestError("sigmas", str(error)) from error
    steps = len(sigmas) - 1
    if request.num_inference_steps not in (None, steps):
        raise RequestError(
            "num_inference_steps",
            f"is {request.num_inference_steps}, but sigmas lists {steps}; leave it out",
        )
    return replace(request, sigmas=sigmas, schedule=GIVEN, num_inference_steps=steps)


def _with_sampler(request: GenerationRequest, spec: ModelSpec) -> GenerationRequest:
    """Fill in what the model's defaults and the sampler's record say."""
    defaults = spec.defaults
    request = replace(
        request,
        num_inference_steps=_first(request.num_inference_steps, defaults.num_inference_steps),
        guidance_scale=_first(
            request.guidance_scale, defaults.guidance_scale if can_guide(spec) else 1.0
        ),
        sampler=_first(request.sampler, defaults.sampler),
    )
    record = sampler_of(request)
    is_default = record.uses_eta and request.sampler == defaults.sampler
    request = replace(
        request,
        schedule=_first(request.schedule, record.schedule),
        eta=_first(request.eta, defaults.eta if is_default else record.default_eta),
    )
    if not record.uses_eta and request.eta != record.default_eta:
        users = ", ".join(name for name, each in SAMPLERS.items() if each.uses_eta)
        raise RequestError(
            "eta",
            f"sampler {request.sampler!r} has none, got {request.eta}; leave it out or choose "
            f"one of {users}",
        )
    return request


def _with_steering(request: GenerationRequest, spec: ModelSpec) -> GenerationRequest:
    """Fill in seeds, and how much of the pictures to start from is forgotten."""
    # 32 bits, because torch's generator uses no more; short enough to read out.
    request = replace(request, seed=_first(request.seed, _random_seed()))
    if request.is_variation:
        request = replace(request, variation_seed=_first(request.variation_seed, _random_seed()))
    if request.image is not None and task_record(spec).image == "start":
        masked = request.mask_image is not None or request.outpaint is not None
        default = MASK_STRENGTH if masked else IMAGE_STRENGTH
        request = replace(request, strength=_first(request.strength, default))
    if request.hires_scale is not None:
        request = replace(request, hires_strength=_first(request.hires_strength, HIRES_STRENGTH))
    return request


def _random_seed() -> int:
    return secrets.randbelow(2**32 - MAX_IMAGES)


def _first(value: _T | None, default: _T) -> _T:
    return default if value is None else value
