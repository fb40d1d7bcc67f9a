"""Feature reuse of a request: which calls compute the whole UNet, and whether the bundle can."""

from collections.abc import Sequence

from ldm_runtime.errors import RequestError
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolved import (
    NoReuse,
    Reuse,
    ReuseByChange,
    ReuseByInterval,
    SamplingPass,
)
from ldm_runtime.requests.sizes import latents_covering
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.tasks import runs_in_patches
from ldm_runtime.tiling.patches import PATCH


def reuse_of(
    request: GenerationRequest,
    passes: Sequence[SamplingPass],
    spec: ModelSpec,
    refiner: ModelSpec | None,
) -> Reuse:
    """Return the rule of feature reuse of a request.

    Args:
        request: The request.
        passes: Its passes.
        spec: The model.
        refiner: The model that makes the last steps, if there is one.

    Raises:
        RequestError: A model has no graph of the outermost blocks, or sees the image in patches,
            whose features are not kept.
    """
    if request.reuse is None:
        return NoReuse()
    _check_graph("this bundle", spec)
    if refiner is not None and request.refiner_start != 1:
        _check_graph("the refiner", refiner)
    for each in passes:
        height, width = latents_covering((each.height, each.width), spec)
        if runs_in_patches(spec) and max(height, width) > PATCH:
            side = PATCH * spec.autoencoder.factor
            raise RequestError(
                "reuse",
                f"does not go with results beyond {side}x{side} pixels, which this model makes in "
                "patches; leave it out, or give a smaller image",
            )
    kind, _, number = request.reuse.partition(":")
    if kind == "deep":
        return ReuseByInterval(interval=int(number))
    return ReuseByChange(threshold=float(number))


def _check_graph(owner: str, spec: ModelSpec) -> None:
    if spec.unet is None or spec.unet.shallow_blocks is None:
        raise RequestError(
            "reuse",
            f"needs a graph of the UNet's outermost blocks, which {owner} lacks; export its "
            "checkpoint again with --reuse",
        )
