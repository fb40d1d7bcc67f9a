"""What a request means for one model: every field filled in, and the noise levels it visits."""

import secrets
from dataclasses import replace
from typing import TypeVar

from ldm_runtime.errors import BundleError, RequestError
from ldm_runtime.manifest import ModelSpec
from ldm_runtime.pictures import MAX_SIDE
from ldm_runtime.prompts import parse_prompt
from ldm_runtime.request import GIVEN, MAX_IMAGES, GenerationRequest
from ldm_runtime.samplers import SAMPLERS, SamplerRecord
from ldm_runtime.schedules import (
    SigmaTable,
    given_sigmas,
    rescale_zero_terminal_snr,
    sampling_sigmas,
    training_sigmas,
)
from ldm_runtime.tiles import MIN_TILE

#: How much of a picture is forgotten unless a request says so: `strength` without and with a mask,
#: and that of the second pass at high resolution.
IMAGE_STRENGTH, MASK_STRENGTH, HIRES_STRENGTH = 0.8, 1.0, 0.6
#: Pictures of more latent pixels than this are decoded in tiles of so many a side: memory goes with
#: latent pixels, and from this size on tiles are within 48 dB of the whole (`docs/steering.md`).
WHOLE_LATENTS, TILE_LATENTS = 128 * 128, 96

_T = TypeVar("_T")


def resolve(request: GenerationRequest, spec: ModelSpec) -> GenerationRequest:
    """Return `request` with every field filled in and checked against a model.

    Resolving a resolved request changes nothing, and the result is all that decides a picture.

    Raises:
        RequestError: The model cannot do what the request asks for.
    """
    _check_prompts(request)
    _check_company(request)
    request = _with_sigmas(request)
    height, width = _default_size(request, spec)
    defaults = spec.defaults
    request = replace(
        request,
        height=_first(request.height, height),
        width=_first(request.width, width),
        num_inference_steps=_first(request.num_inference_steps, defaults.num_inference_steps),
        guidance_scale=_first(request.guidance_scale, defaults.guidance_scale),
        sampler=_first(request.sampler, defaults.sampler),
        # 32 bits, because torch's generator uses no more; short enough to read out.
        seed=_first(request.seed, _random_seed()),
        strength=request.strength if request.image is None else _strength(request),
    )
    record = sampler_of(request)
    request = replace(
        request,
        schedule=_first(request.schedule, record.schedule),
        eta=_first(request.eta, record.default_eta),
    )
    if request.is_variation:
        request = replace(request, variation_seed=_first(request.variation_seed, _random_seed()))
    if request.hires_scale is not None:
        request = replace(request, hires_strength=_first(request.hires_strength, HIRES_STRENGTH))
    _check_size(request, spec)
    _check_outpaint(request)
    request = _with_tile_size(request, spec)
    _check_eta(request)
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


def size_step(spec: ModelSpec) -> int:
    """Return what height and width are multiples of, in pixels.

    Latents must survive the UNet's halvings, or its skip connections no longer fit.
    """
    return int(spec.autoencoder.factor * 2 ** (len(spec.unet.channel_mult) - 1))


def canvas_size(request: GenerationRequest) -> tuple[int, int]:
    """Return width and height of a request's image with what is added around it."""
    assert request.image is not None, "the request has no image"
    width, height = request.image.size
    left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
    return left + width + right, top + height + bottom


def hires_size(request: GenerationRequest, spec: ModelSpec) -> tuple[int, int]:
    """Return height and width of the second pass of a resolved request, or of the only one."""
    assert request.height is not None, "the request is not resolved"
    assert request.width is not None, "the request is not resolved"
    if request.hires_scale is None:
        return request.height, request.width
    step, scale = size_step(spec), request.hires_scale
    return (round(request.height * scale / step) * step, round(request.width * scale / step) * step)


def _check_prompts(request: GenerationRequest) -> None:
    if request.plain_prompt:
        return
    for name in ("prompt", "negative_prompt"):
        try:
            parse_prompt(getattr(request, name))
        except ValueError as error:
            raise RequestError(name, str(error)) from error


def _check_company(request: GenerationRequest) -> None:
    """Fields that mean something only beside another field."""
    for name in ("strength", "mask_image", "outpaint"):
        if getattr(request, name) is not None and request.image is None:
            raise RequestError(name, "means nothing without an image; give image, or leave it out")
    if request.hires_strength is not None and request.hires_scale is None:
        raise RequestError("hires_strength", "means nothing without hires_scale; give that too")
    if request.hires_scale is not None and (request.mask_image or request.outpaint):
        raise RequestError("hires_scale", "does not go with mask_image or outpaint; draw twice")
    if request.outpaint is not None and request.mask_image is not None:
        raise RequestError("outpaint", "does not go with mask_image; draw twice")
    if request.variation_seed is not None and not request.is_variation:
        raise RequestError("variation_seed", "changes nothing at variation_strength 0; raise that")


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


def _default_size(request: GenerationRequest, spec: ModelSpec) -> tuple[int, int]:
    """Return height and width: the model's, or those of the image, rounded down to what fits."""
    if request.image is None:
        return spec.defaults.height, spec.defaults.width
    width, height = canvas_size(request)
    step = size_step(spec)
    return max(step, height // step * step), max(step, width // step * step)


def _strength(request: GenerationRequest) -> float:
    masked = request.mask_image is not None or request.outpaint is not None
    return _first(request.strength, MASK_STRENGTH if masked else IMAGE_STRENGTH)


def _random_seed() -> int:
    return secrets.randbelow(2**32 - MAX_IMAGES)


def _first(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _check_size(request: GenerationRequest, spec: ModelSpec) -> None:
    step = size_step(spec)
    for name, size in (("height", request.height), ("width", request.width)):
        assert size is not None, "the request is not resolved"
        below = size // step * step
        if size != below:
            nearest = f"{below} and {below + step}" if below else f"{step} and {2 * step}"
            raise RequestError(
                name, f"{size} is not a multiple of {step}; the nearest sizes are {nearest}"
            )
    if max(hires_size(request, spec)) > MAX_SIDE:
        raise RequestError("hires_scale", f"makes more than {MAX_SIDE} pixels a side; lower it")


def _check_outpaint(request: GenerationRequest) -> None:
    """Known pixels are kept as they are, so that a canvas cannot be resized to fit."""
    if request.outpaint is None:
        return
    width, height = canvas_size(request)
    if (width, height) != (request.width, request.height):
        raise RequestError(
            "outpaint",
            f"makes {width}x{height} pixels, but {request.width}x{request.height} can be drawn; "
            "add other margins",
        )


def _with_tile_size(request: GenerationRequest, spec: ModelSpec) -> GenerationRequest:
    height, width = hires_size(request, spec)
    factor, step = spec.autoencoder.factor, size_step(spec)
    is_large = height * width > WHOLE_LATENTS * factor**2
    default = -(-TILE_LATENTS * factor // step) * step if is_large else 0
    tile = _first(request.tile_size, default)
    if tile % step:
        raise RequestError(
            "tile_size", f"{tile} is not a multiple of {step}; take {-(-tile // step) * step}"
        )
    if 0 < tile < MIN_TILE * factor:
        raise RequestError(
            "tile_size", f"{tile} is too small; take 0 or at least {MIN_TILE * factor}"
        )
    return replace(request, tile_size=tile)


def _check_eta(request: GenerationRequest) -> None:
    record = sampler_of(request)
    if not record.uses_eta and request.eta != record.default_eta:
        users = ", ".join(name for name, each in SAMPLERS.items() if each.uses_eta)
        raise RequestError(
            "eta",
            f"sampler {request.sampler!r} has none, got {request.eta}; leave it out or choose "
            f"one of {users}",
        )
