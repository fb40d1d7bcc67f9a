"""Micro-conditioning of a request: numbers about the image that the UNets of SDXL take.

Source: Podell et al. 2023 (arXiv:2307.01952), section 2.2; the defaults are those of
`StableDiffusionXLPipeline` and `StableDiffusionXLImg2ImgPipeline` in diffusers 0.42.1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from ldm_runtime.errors import RequestError
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.specs.micro_conditioning import MicroConditioningKind, micro_conditioning_kind
from ldm_runtime.specs.model import ModelSpec

_FIELDS: Mapping[MicroConditioningKind | None, tuple[str, ...]] = MappingProxyType(
    {
        "target size": ("original_size", "crop_top_left", "target_size"),
        "aesthetic score": (
            *("original_size", "crop_top_left"),
            *("aesthetic_score", "negative_aesthetic_score"),
        ),
        None: (),
    }
)


@dataclass(frozen=True, kw_only=True)
class MicroConditioning:
    """Numbers about the image of a request; a model takes those of its kind, or none.

    Attributes:
        original_size: Height and width that the image had before it was resized.
        crop_top_left: Top and left of the part that was cut out of the resized image.
        target_size: Height and width of that part.
        aesthetic_score: How much people like the image.
        negative_aesthetic_score: The same of an image to steer away from.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int]
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5

    def numbers(self, kind: MicroConditioningKind, *, negative: bool) -> tuple[float, ...]:
        """Return the numbers that a UNet takes with the prompt, or with the negative prompt."""
        common = *self.original_size, *self.crop_top_left
        if kind == "target size":
            return *common, *self.target_size
        return *common, self.negative_aesthetic_score if negative else self.aesthetic_score

    def changed_fields(self, size: tuple[int, int]) -> dict[str, object]:
        """Return the fields that an image of a height and width would not have by default."""
        default = _default(size)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(default, name)}


def micro_conditioning_of(request: GenerationRequest, size: tuple[int, int]) -> MicroConditioning:
    """Return the micro-conditioning of a request, whose images have a height and width.

    What it leaves open is that of an image that was neither resized nor cropped.
    """
    return replace(_default(size), **_given(request))


def check_micro_conditioning(request: GenerationRequest, specs: Sequence[ModelSpec]) -> None:
    """Check that a request has micro-conditioning only where a UNet of its models takes it.

    Raises:
        RequestError: None takes it.
    """
    taken = [name for spec in specs for name in _FIELDS[micro_conditioning_kind(spec)]]
    taken = list(dict.fromkeys(taken))
    others = f"which takes {', '.join(taken)}" if taken else "whose UNet takes no sizes of images"
    for name in _given(request):
        if name not in taken:
            raise RequestError(name, f"means nothing to this bundle, {others}; leave it out")


def _default(size: tuple[int, int]) -> MicroConditioning:
    return MicroConditioning(original_size=size, target_size=size)


def _given(request: GenerationRequest) -> dict[str, Any]:
    values = {field.name: getattr(request, field.name) for field in fields(MicroConditioning)}
    return {name: value for name, value in values.items() if value is not None}
