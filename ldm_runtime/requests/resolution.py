"""Resolution of a request for one model: every field filled in, and the noise levels it visits."""

import secrets
from dataclasses import dataclass
from typing import TypeVar

from ldm_runtime.errors import BundleError, RequestError
from ldm_runtime.requests.conditions import check_condition, condition_of
from ldm_runtime.requests.depth import depth_of
from ldm_runtime.requests.edm import check_schedule, check_timesteps, default_schedule
from ldm_runtime.requests.micro_conditioning import check_micro_conditioning
from ldm_runtime.requests.preset_fields import with_preset_fields
from ldm_runtime.requests.refiner import refiner_of
from ldm_runtime.requests.request import CUSTOM, MAX_IMAGES, GenerationRequest
from ldm_runtime.requests.resolved import (
    EVERY_SIGMA,
    NO_BLUR,
    FirstNoise,
    GivenNoise,
    MaskedImage,
    NoImage,
    OutpaintedImage,
    PartlyDenoised,
    RequestImage,
    ResolvedRequest,
    SamplingPass,
    SeededNoise,
    WholeImage,
)
from ldm_runtime.requests.reuse import reuse_of
from ldm_runtime.requests.sampling_passes import sampling_passes
from ldm_runtime.requests.scheduled_prompts import check_prompts
from ldm_runtime.requests.sizes import Size, image_size, latents_covering, tile_size
from ldm_runtime.requests.task_checks import (
    check_decoder,
    check_guidance,
    check_needs,
    check_unknown,
)
from ldm_runtime.samplers import SAMPLERS, SamplerRecord
from ldm_runtime.schedules import (
    SigmaTable,
    custom_sigmas,
    edm_sigmas,
    rescale_zero_terminal_snr,
    sampling_sigmas,
    training_sigmas,
)
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.tasks import can_guide, embeds_guidance, task_record

#: Default `image_guidance_scale` of models that edit images: that of both InstructPix2Pix models.
IMAGE_GUIDANCE_SCALE = 1.5

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class _Sampling:
    """The part of a resolved request that says how to sample; empty for an autoencoder alone."""

    sampler: str = ""
    num_inference_steps: int = 0
    schedule: str = ""
    sigmas: tuple[float, ...] = ()
    eta: float = 0.0
    guidance_scale: float = 1.0
    image_guidance_scale: float = 1.0


def resolve(
    request: GenerationRequest | ResolvedRequest, spec: ModelSpec, refiner: ModelSpec | None = None
) -> ResolvedRequest:
    """Return a request with everything filled in that it leaves to a model, and checked.

    Resolving a resolved request changes nothing. A model that only encodes and decodes samples no
    noise: an open seed becomes 0.

    Args:
        request: The request.
        spec: The model.
        refiner: The model that makes the last steps, if there is one; see `refiner.check_refiner`.

    Raises:
        RequestError: The model cannot do what the request asks for.
        BundleError: The model has no training schedule.
    """
    if isinstance(request, ResolvedRequest):
        request = request.as_request()
    check_needs(request, spec)
    check_unknown(request, spec)
    request = with_preset_fields(request, spec)
    condition, image = condition_of(request, spec), _image_of(request)
    depth = depth_of(request, spec)
    models = [spec] if refiner is None else [spec, refiner]
    for each in models:
        check_condition(condition, each)
    check_micro_conditioning(request, models)
    check_decoder(request, spec)
    _check_combinations(request, spec)
    size = image_size(request, image, condition, spec)
    samples = task_record(spec).samples
    if samples:
        check_guidance(request, spec)
    sampling = _sampling(request, spec) if samples else _Sampling()
    passes = _passes(request, image, size, sampling, spec) if samples else ()
    seed = _first(request.seed, _random_seed() if samples else 0)
    resolved = ResolvedRequest(
        task=spec.task,
        condition=condition,
        depth=depth,
        source_image=image,
        noise_level=_noise_level(request, spec),
        height=size[0],
        width=size[1],
        num_images=request.num_images,
        num_inference_steps=sampling.num_inference_steps,
        sampler=sampling.sampler,
        schedule=sampling.schedule,
        sigmas=sampling.sigmas,
        eta=sampling.eta,
        zero_terminal_snr=request.zero_terminal_snr,
        guidance_scale=sampling.guidance_scale,
        embeds_guidance=embeds_guidance(spec),
        image_guidance_scale=sampling.image_guidance_scale,
        guidance_rescale=request.guidance_rescale,
        guidance_interval=_first(request.guidance_interval, EVERY_SIGMA),
        seed=seed,
        noise=request.noise,
        variation_seed=_variation_seed(request, seed),
        variation_strength=request.variation_strength,
        first_noise=_first_noise(request, size, spec),
        denoising_end=_first(request.denoising_end, 1.0),
        refiner=refiner_of(request, passes, spec, refiner),
        reuse=reuse_of(request, passes, spec, refiner),
        passes=passes,
        decoder=request.decoder,
        tile_size=tile_size(request, _last_size(passes, size), spec),
    )
    check_prompts(resolved)
    return resolved


def _noise_level(request: GenerationRequest, spec: ModelSpec) -> int:
    default, highest = task_record(spec).noise_level
    if spec.noise_augmentation is not None:
        highest = min(highest, len(spec.noise_augmentation.alphas_cumprod) - 1)
    level = _first(request.noise_level, default)
    if level > highest:
        raise RequestError(
            "noise_level", f"is {level}, but this bundle knows 0 to {highest}; lower it"
        )
    return level


def check_defaults(spec: ModelSpec) -> None:
    """Check that a model's sampling defaults go together: a request without fields has them.

    Raises:
        RequestError: There is no such sampler, schedule or number of steps, or guidance without a
            null condition.
    """
    if task_record(spec).samples:
        request = GenerationRequest(guidance_scale=spec.defaults.guidance_scale)
        check_guidance(request, spec)
        _sampling(request, spec)


def sampler_of(request: ResolvedRequest) -> SamplerRecord:
    """Return the sampler of a request."""
    return SAMPLERS[request.sampler]


def sigma_table(spec: ModelSpec, *, zero_terminal_snr: bool) -> SigmaTable:
    """Return the noise level of every training timestep, or those of EDM in place of them.

    Args:
        spec: The model.
        zero_terminal_snr: Whether the schedule is rescaled to end in pure noise.

    Raises:
        BundleError: The model has no schedule.
    """
    if spec.edm is not None:
        return edm_sigmas(spec.edm.sigma_min, spec.edm.sigma_max)
    try:
        if zero_terminal_snr:
            return training_sigmas(rescale_zero_terminal_snr(spec.alphas_cumprod))
        return training_sigmas(spec.alphas_cumprod)
    except ValueError as error:
        raise BundleError(f"{error}; export the bundle again") from error


def _image_of(request: GenerationRequest) -> RequestImage:
    if request.image is None:
        return NoImage()
    if request.outpaint is not None:
        return OutpaintedImage(image=request.image, margins=request.outpaint)
    if request.mask_image is not None:
        blur = _first(request.mask_blur, NO_BLUR)
        return MaskedImage(image=request.image, mask=request.mask_image, blur=blur)
    return WholeImage(image=request.image)


def _check_combinations(request: GenerationRequest, spec: ModelSpec) -> None:
    """Check fields that mean something only together with another field."""
    for name in ("strength", "mask_image", "outpaint"):
        if getattr(request, name) is not None and request.image is None:
            raise RequestError(name, "means nothing without an image; give image, or leave it out")
    _check_mask(request)
    if request.hires_strength is not None and request.hires_scale is None:
        raise RequestError("hires_strength", "means nothing without hires_scale; give that too")
    if request.hires_scale is not None and (request.mask_image or request.outpaint):
        raise RequestError("hires_scale", "does not go with mask_image or outpaint; generate twice")
    if request.outpaint is not None and request.mask_image is not None:
        raise RequestError("outpaint", "does not go with mask_image; generate twice")
    if request.latents is not None and request.is_variation:
        raise RequestError("variation_strength", "does not go with latents; leave one of them out")
    _check_denoising(request, spec)
    if request.variation_seed is not None and not request.is_variation:
        raise RequestError("variation_seed", "changes nothing at variation_strength 0; raise that")


def _check_denoising(request: GenerationRequest, spec: ModelSpec) -> None:
    """A run that goes on from another starts where that stopped, and one that stops is not done."""
    if request.denoising_start is not None:
        if request.latents is None:
            raise RequestError(
                "denoising_start",
                "means nothing without latents; give those of a run with denoising_end",
            )
        if request.image is not None and task_record(spec).image == "start":
            raise RequestError("denoising_start", "does not go with image; leave one of them out")
    if request.denoising_end is not None and request.hires_scale is not None:
        raise RequestError("denoising_end", "does not go with hires_scale; leave one of them out")


def _check_mask(request: GenerationRequest) -> None:
    """A mask of another size would not line up with the image, and no mask cannot be blurred."""
    if request.mask_blur is not None and request.mask_image is None:
        raise RequestError("mask_blur", "means nothing without mask_image; give that too")
    if request.image is None or request.mask_image is None:
        return
    (width, height), image = request.mask_image.size, request.image.size
    if (width, height) != image:
        raise RequestError(
            "mask_image",
            f"has {width}x{height} pixels, but the image has {image[0]}x{image[1]}; "
            "give a mask of the image's size",
        )


def _sampling(request: GenerationRequest, spec: ModelSpec) -> _Sampling:
    """Fill in what the model's defaults and the sampler's record say."""
    defaults = spec.defaults
    name = _first(request.sampler, defaults.sampler)
    check_timesteps(request, name, spec)
    record = SAMPLERS[name]
    is_default = record.uses_eta and name == defaults.sampler
    eta = _first(request.eta, defaults.eta if is_default else record.default_eta)
    if not record.uses_eta and eta != record.default_eta:
        users = ", ".join(name for name, each in SAMPLERS.items() if each.uses_eta)
        raise RequestError(
            "eta",
            f"sampler {name!r} has none, got {eta}; leave it out or choose one of {users}",
        )
    scale = defaults.guidance_scale if can_guide(spec) or embeds_guidance(spec) else 1.0
    image_scale = IMAGE_GUIDANCE_SCALE if task_record(spec).guides_by_image else 1.0
    schedule, steps, sigmas = _sigmas(request, record, spec)
    return _Sampling(
        sampler=name,
        num_inference_steps=steps,
        schedule=schedule,
        sigmas=sigmas,
        eta=eta,
        guidance_scale=_first(request.guidance_scale, scale),
        image_guidance_scale=_first(request.image_guidance_scale, image_scale),
    )


def _sigmas(
    request: GenerationRequest, record: SamplerRecord, spec: ModelSpec
) -> tuple[str, int, tuple[float, ...]]:
    """Return the schedule of a request, the steps asked of it, and its noise levels."""
    table = sigma_table(spec, zero_terminal_snr=request.zero_terminal_snr)
    if request.sigmas is not None:
        listed = _custom_sigmas(request, request.sigmas)
        return CUSTOM, len(listed) - 1, listed
    if request.schedule == CUSTOM:
        raise RequestError("schedule", f"{CUSTOM!r} means those in sigmas; give sigmas")
    schedule = _first(request.schedule, default_schedule(record, spec))
    check_schedule(schedule, spec)
    steps = _first(request.num_inference_steps, spec.defaults.num_inference_steps)
    try:
        sigmas = sampling_sigmas(table, steps, schedule, record.final_sigma)
    except ValueError as error:
        raise RequestError("num_inference_steps", str(error)) from error
    return schedule, steps, tuple(sigmas)


def _custom_sigmas(request: GenerationRequest, listed: tuple[float, ...]) -> tuple[float, ...]:
    """Check a list of noise levels, and the fields that it replaces."""
    if request.schedule not in (None, CUSTOM):
        raise RequestError("schedule", "does not go with sigmas; leave one of them out")
    try:
        sigmas = tuple(custom_sigmas(listed))
    except ValueError as error:
        raise RequestError("sigmas", str(error)) from error
    steps = len(sigmas) - 1
    if request.num_inference_steps not in (None, steps):
        raise RequestError(
            "num_inference_steps",
            f"is {request.num_inference_steps}, but sigmas lists {steps}; leave it out",
        )
    return sigmas


def _passes(
    request: GenerationRequest,
    image: RequestImage,
    size: Size,
    sampling: _Sampling,
    spec: ModelSpec,
) -> tuple[SamplingPass, ...]:
    table = sigma_table(spec, zero_terminal_snr=request.zero_terminal_snr)
    return sampling_passes(request, image, size, sampling.sigmas, table, spec)


def _first_noise(request: GenerationRequest, size: Size, spec: ModelSpec) -> FirstNoise:
    """Return the noise to start from, checked against the latents that are sampled."""
    if request.latents is None:
        return SeededNoise()
    found = request.latents.values.shape
    wanted = request.num_images, spec.autoencoder.embed_dim, *latents_covering(size, spec)
    if found[0] != wanted[0]:
        raise RequestError(
            "latents", f"are {found[0]}, but num_images is {wanted[0]}; give one for each image"
        )
    if found != wanted:
        has, takes = ("x".join(map(str, shape)) for shape in (found, wanted))
        raise RequestError(
            "latents", f"have shape {has}; {size[1]}x{size[0]} pixels of this model take {takes}"
        )
    if request.denoising_start is None:
        return GivenNoise(latents=request.latents)
    return PartlyDenoised(latents=request.latents, denoising_start=request.denoising_start)


def _last_size(passes: tuple[SamplingPass, ...], size: Size) -> Size:
    return (passes[-1].height, passes[-1].width) if passes else size


def _variation_seed(request: GenerationRequest, seed: int) -> int:
    if request.variation_strength == 0:
        return seed
    return _first(request.variation_seed, _random_seed())


def _random_seed() -> int:
    # 32 bits, because torch's generator uses no more; short enough to read out.
    return secrets.randbelow(2**32 - MAX_IMAGES)


def _first(value: _T | None, default: _T) -> _T:
    return default if value is None else value
