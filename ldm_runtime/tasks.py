"""What each task takes: the one table that says which fields of a request go with which model."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Literal

from ldm_runtime.errors import RequestError
from ldm_runtime.manifest import ModelSpec, Task
from ldm_runtime.request import GenerationRequest

_ANY = frozenset({"height", "width", "seed"})
_TILES = frozenset({"tile_size"})
_SAMPLING = frozenset(
    {
        *("num_inference_steps", "sampler", "schedule", "sigmas", "eta", "zero_terminal_snr"),
        *("guidance_scale", "guidance_rescale", "guidance_interval"),
        *("noise", "variation_seed", "variation_strength", "num_images"),
    }
)
_PROMPTS = frozenset({"prompt", "negative_prompt", "plain_prompt"})
_START = frozenset({"image", "strength", "mask_image", "outpaint"})
_HIRES = frozenset({"hires_scale", "hires_strength"})
#: What every model can do that samples from noise and decodes at any size.
_DRAWING = _SAMPLING | _START | _HIRES | _TILES


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """What a task needs, permits and makes of a request.

    Attributes:
        needs: What a request must have: of each group of fields one.
        permits: Other fields that mean something to it, besides those that every task has.
        image: What `image` is: where sampling starts, or what the result is made from.
        size: Where height and width come from: "open" is the image's or else the model's default,
            "segmentation" the map's; "enlarged" is the image's times the factor of the autoencoder,
            and nothing else.
        has_null: Whether there is a condition that says nothing, which guidance steers away from:
            the empty prompt, the layout without objects, embeddings of zeros, the null class.
    """

    needs: tuple[tuple[str, ...], ...]
    permits: frozenset[str]
    image: Literal["start", "condition"] = "start"
    size: Literal["open", "segmentation", "enlarged"] = "open"
    has_null: bool = False

    @property
    def takes(self) -> frozenset[str]:
        """Every field that means something to the task."""
        return _ANY | self.permits | {name for group in self.needs for name in group}

    @property
    def samples(self) -> bool:
        """Whether a picture is sampled, and not only encoded and decoded."""
        return "sampler" in self.permits


TASKS: Mapping[Task, TaskRecord] = MappingProxyType(
    {
        "unconditional": TaskRecord(needs=(), permits=_DRAWING),
        "class-to-image": TaskRecord(needs=(("class_label",),), permits=_DRAWING, has_null=True),
        "text-to-image": TaskRecord(
            needs=(("prompt",),), permits=_DRAWING | _PROMPTS, has_null=True
        ),
        "layout-to-image": TaskRecord(needs=(("layout",),), permits=_DRAWING, has_null=True),
        # No second pass: the map would have to be encoded again at its size.
        "semantic-synthesis": TaskRecord(
            needs=(("segmentation",),), permits=_SAMPLING | _START | _TILES, size="segmentation"
        ),
        # No tiles: large pictures are decoded in patches, as the reference does (`patches.py`).
        "super-resolution": TaskRecord(
            needs=(("image",),), permits=_SAMPLING, image="condition", size="enlarged"
        ),
        "inpainting": TaskRecord(
            needs=(("image",), ("mask_image", "outpaint")),
            permits=_SAMPLING | _TILES,
            image="condition",
        ),
        "retrieval": TaskRecord(needs=(("embeddings",),), permits=_DRAWING, has_null=True),
        "first-stage": TaskRecord(needs=(("image",),), permits=_TILES, image="condition"),
    }
)

#: How Python and JSON spell a field in the sentence that says it is missing.
FIELDS: Mapping[str, str] = MappingProxyType(
    {field.name: field.name for field in fields(GenerationRequest)}
)


def task_record(spec: ModelSpec) -> TaskRecord:
    """Return the row of a model's task."""
    return TASKS[spec.task]


def can_guide(spec: ModelSpec) -> bool:
    """Return whether a model has a null condition, which guidance needs."""
    embedder = spec.class_embedder
    return task_record(spec).has_null and (embedder is None or embedder.null_class is not None)


def check_needs(
    request: GenerationRequest, spec: ModelSpec, spelling: Mapping[str, str] = FIELDS
) -> None:
    """Check that a request has what a model's task needs.

    Args:
        request: What to draw.
        spec: The model.
        spelling: What to call each field in the message, such as the flag that sets it.

    Raises:
        RequestError: Something is missing; the sentence names all that is.
    """
    missing = [
        group
        for group in task_record(spec).needs
        if all(getattr(request, name) is None for name in group)
    ]
    if missing:
        wanted = " and ".join(" or ".join(spelling[name] for name in group) for group in missing)
        raise RequestError(missing[0][0], f"this bundle is {spec.task}: give {wanted}")


def check_foreign(request: GenerationRequest, spec: ModelSpec) -> None:
    """Check that a request has nothing that a model's task makes nothing of.

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

    Raises:
        RequestError: It does elsewhere.
    """
    if can_guide(spec):
        return
    asked = {
        "guidance_scale": request.guidance_scale not in (None, 1.0),
        "guidance_rescale": request.guidance_rescale != 0,
        "guidance_interval": request.guidance_interval is not None,
    }
    for name in asked:
        if asked[name]:
            raise RequestError(
                name,
                f"is {getattr(request, name)}, but this bundle ({spec.task}) has no null "
                "condition to steer away from; leave it out",
            )
