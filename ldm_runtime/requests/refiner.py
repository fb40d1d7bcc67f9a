"""The refiner of a request: a second model, which makes the last steps."""

import math
from collections.abc import Sequence

from ldm_runtime.errors import BundleError, RequestError
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolved import NoRefiner, Refiner, SamplingPass
from ldm_runtime.requests.sizes import latents_covering
from ldm_runtime.specs.model import ModelSpec, latent_step
from ldm_runtime.specs.tasks import embeds_guidance

#: Tasks whose requests have all that a text-to-image model needs, and are guided like its own.
_REFINED = ("text-to-image", "text-inpainting")
#: Default share of the noise schedule that is the base model's: diffusers' documentation of SDXL.
REFINER_START = 0.8


def refiner_of(
    request: GenerationRequest,
    passes: Sequence[SamplingPass],
    spec: ModelSpec,
    refiner: ModelSpec | None,
) -> NoRefiner | Refiner:
    """Return where the refiner takes over in a request.

    Args:
        request: The request.
        passes: Its passes.
        spec: The model.
        refiner: The model that refines, if there is one; see `check_refiner`.

    Raises:
        RequestError: There is no refiner, or it cannot take images of this size.
    """
    if refiner is None:
        if request.refiner_start is None:
            return NoRefiner()
        raise RequestError(
            "refiner_start",
            "means nothing without a refiner; give --refiner, or refiner to Generator(…)",
        )
    start = REFINER_START if request.refiner_start is None else request.refiner_start
    if start < 1:
        for each in passes:
            _check_size(each, spec, refiner)
    return Refiner(start=start)


def check_refiner(spec: ModelSpec, refiner: ModelSpec) -> None:
    """Check that a model can make the last steps of another's requests.

    Raises:
        BundleError: It takes other requests or guidance otherwise, or has other latents or another
            noise schedule.
    """
    if refiner.task != "text-to-image" or spec.task not in _REFINED:
        raise BundleError(
            f"a refiner is text-to-image, and refines {' and '.join(_REFINED)}; these bundles are "
            f"{refiner.task} and {spec.task}"
        )
    _check_guidance(spec, refiner)
    for what, ours, other in (
        ("latent channels", spec.autoencoder.embed_dim, refiner.autoencoder.embed_dim),
        ("pixels per latent pixel", spec.autoencoder.factor, refiner.autoencoder.factor),
        (
            "as the scale factor of latents",
            spec.autoencoder.latent_scale_factor,
            refiner.autoencoder.latent_scale_factor,
        ),
        (
            "as the means of latents",
            spec.autoencoder.latents_mean,
            refiner.autoencoder.latents_mean,
        ),
        (
            "as the standard deviations of latents",
            spec.autoencoder.latents_std,
            refiner.autoencoder.latents_std,
        ),
    ):
        if ours != other:
            raise BundleError(
                f"the refiner has {other} {what}, and the bundle {ours}; give one of the same "
                "latents"
            )
    if spec.edm != refiner.edm or not _are_close(spec.alphas_cumprod, refiner.alphas_cumprod):
        raise BundleError(
            "the refiner was trained with another noise schedule than the bundle; give one with "
            "the same"
        )


def _check_guidance(spec: ModelSpec, refiner: ModelSpec) -> None:
    """Check that a request asks as many samples of both UNets, or it would guide but one."""
    if embeds_guidance(spec) == embeds_guidance(refiner):
        return
    pair = ("the refiner", "the bundle")
    takes, lacks = pair if embeds_guidance(refiner) else pair[::-1]
    raise BundleError(
        f"the UNet of {takes} takes the guidance scale as an input, and that of {lacks} does not; "
        "give a refiner that is guided like the bundle"
    )


def _are_close(ours: Sequence[float], others: Sequence[float]) -> bool:
    """Return whether two schedules are the same, whatever their numbers were rounded to."""
    return len(ours) == len(others) and all(
        math.isclose(our, other, rel_tol=1e-3) for our, other in zip(ours, others, strict=True)
    )


def _check_size(each: SamplingPass, spec: ModelSpec, refiner: ModelSpec) -> None:
    step, factor = latent_step(refiner), spec.autoencoder.factor
    latents = latents_covering((each.height, each.width), spec)
    for name, side in zip(("height", "width"), latents, strict=True):
        if side % step:
            raise RequestError(
                name,
                f"{side * factor} is not a multiple of {step * factor}, as the refiner takes them; "
                "change it, or make refiner_start 1",
            )
