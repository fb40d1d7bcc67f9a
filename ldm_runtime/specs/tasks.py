"""The tasks: the one table that says which fields of a request go with which model."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ldm_runtime.specs.components import COMPONENTS
from ldm_runtime.specs.model import ModelSpec, Task
from ldm_runtime.specs.networks import ClassEmbedderSpec

_ANY = frozenset({"height", "width", "seed"})
_DECODING = frozenset({"decoder", "tile_size"})
_SAMPLING = frozenset(
    {
        *(
            "preset",
            "num_inference_steps",
            "sampler",
            "schedule",
            "sigmas",
            "eta",
            "zero_terminal_snr",
        ),
        *("guidance_scale", "guidance_rescale", "guidance_interval"),
        *("noise", "variation_seed", "variation_strength", "latents", "num_images"),
        *("denoising_end", "denoising_start", "reuse"),
    }
)
_PROMPTS = frozenset(
    {
        *("prompt", "negative_prompt", "literal_prompt", "clip_skip"),
        # Of these a model takes those of its micro-conditioning, if it has one.
        *("original_size", "crop_top_left", "target_size"),
        *("aesthetic_score", "negative_aesthetic_score"),
        # A refiner is for prompts.
        "refiner_start",
    }
)
_MASKS = ("mask_image", "outpaint")
_START = frozenset({"image", "strength", "mask_image", "mask_blur", "outpaint"})
_HIRES = frozenset({"hires_scale", "hires_strength"})
_IMAGE_GUIDANCE = "image_guidance_scale"
#: Fields of every model that samples from noise and decodes at any size.
_GENERATION = _SAMPLING | _START | _HIRES | _DECODING


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """Fields that a task needs and permits, and how it takes them.

    Attributes:
        needs: Groups of fields; a request must have one of each.
        permits: Other fields that mean something to it, in addition to those of every task.
        image: Role of `image`: where sampling starts, or a condition of the result, pixel by pixel
            or as the embedding of the whole image, which says nothing of the result's size.
        size: Where height and width come from: "open" is the image's or else the model's default,
            "segmentation" the map's; "enlarged" is the image's times the factor of the autoencoder,
            and nothing else.
        noise_level: Default and highest `noise_level`, where the task takes it.
        has_null: Whether there is a null condition, which guidance steers away from:
            the empty prompt, the layout without objects, embeddings of zeros, the null class.
    """

    needs: tuple[tuple[str, ...], ...]
    permits: frozenset[str]
    image: Literal["start", "condition", "embedding"] = "start"
    size: Literal["open", "segmentation", "enlarged"] = "open"
    noise_level: tuple[int, int] = (0, 0)
    has_null: bool = False

    @property
    def takes(self) -> frozenset[str]:
        """Every field that means something to the task."""
        return _ANY | self.permits | {name for group in self.needs for name in group}

    @property
    def guides_by_image(self) -> bool:
        """Whether guidance also steers away from the prediction without the image."""
        return _IMAGE_GUIDANCE in self.permits

    @property
    def fits_image(self) -> bool:
        """Whether `image` is brought to the size of the result, or gives it that size."""
        return self.size != "enlarged" and self.image != "embedding"

    @property
    def samples(self) -> bool:
        """Whether an image is sampled, and not only encoded and decoded."""
        return "sampler" in self.permits


TASKS: Mapping[Task, TaskRecord] = MappingProxyType(
    {
        "unconditional": TaskRecord(needs=(), permits=_GENERATION),
        "class-to-image": TaskRecord(needs=(("class_label",),), permits=_GENERATION, has_null=True),
        "text-to-image": TaskRecord(
            needs=(("prompt",),), permits=_GENERATION | _PROMPTS, has_null=True
        ),
        "layout-to-image": TaskRecord(needs=(("layout",),), permits=_GENERATION, has_null=True),
        # No second pass: the map would have to be encoded again at its size.
        "semantic-synthesis": TaskRecord(
            needs=(("segmentation",),), permits=_SAMPLING | _START | _DECODING, size="segmentation"
        ),
        # No tiles: large images are decoded in patches, as the reference does (`tiling`).
        "super-resolution": TaskRecord(
            needs=(("image",),), permits=_SAMPLING, image="condition", size="enlarged"
        ),
        "text-super-resolution": TaskRecord(
            needs=(("image",),),
            permits=_SAMPLING | _DECODING | _PROMPTS | {"noise_level"},
            image="condition",
            size="enlarged",
            # The default of `superresolution.py`, and `max_noise_level` of the configuration.
            noise_level=(20, 350),
            has_null=True,
        ),
        "inpainting": TaskRecord(
            needs=(("image",), _MASKS),
            permits=_SAMPLING | _DECODING | {"mask_blur"},
            image="condition",
        ),
        "text-inpainting": TaskRecord(
            needs=(("prompt",), ("image",), _MASKS),
            permits=_SAMPLING | _DECODING | _PROMPTS | {"mask_blur"},
            image="condition",
            has_null=True,
        ),
        # No second pass: the image would have to be encoded again at its size.
        "image-editing": TaskRecord(
            needs=(("prompt",), ("image",)),
            permits=_SAMPLING | _DECODING | _PROMPTS | {_IMAGE_GUIDANCE},
            image="condition",
            has_null=True,
        ),
        "image-variation": TaskRecord(
            needs=(("image",),),
            permits=_SAMPLING | _DECODING | _PROMPTS | _HIRES | {"noise_level"},
            image="embedding",
            noise_level=(0, 999),  # as in `stableunclip.py`
            has_null=True,
        ),
        # No second pass: the depth would have to be resized again; no margins, which have none.
        "depth-to-image": TaskRecord(
            needs=(("prompt",), ("image", "depth_map")),
            permits=_SAMPLING | _DECODING | _PROMPTS | {"strength", "mask_image", "mask_blur"},
            has_null=True,
        ),
        "retrieval": TaskRecord(needs=(("embeddings",),), permits=_GENERATION, has_null=True),
        "autoencoder": TaskRecord(needs=(("image",),), permits=_DECODING, image="condition"),
    }
)


def task_record(spec: ModelSpec) -> TaskRecord:
    """Return the row of a model's task."""
    return TASKS[spec.task]


def takes_prompts(spec: ModelSpec) -> bool:
    """Return whether the requests of a model have a prompt, which needs a tokenizer."""
    return "prompt" in task_record(spec).takes


def can_guide(spec: ModelSpec) -> bool:
    """Return whether a model has a null condition, which classifier-free guidance needs."""
    embedder = spec.find(ClassEmbedderSpec)
    has_null = embedder is None or embedder.null_class is not None
    return task_record(spec).has_null and has_null and not embeds_guidance(spec)


def embeds_guidance(spec: ModelSpec) -> bool:
    """Return whether a model's UNet takes the guidance scale as an input, and no null condition."""
    return spec.unet is not None and spec.unet.guidance_dim is not None


def samples_per_image(spec: ModelSpec, component: str) -> int:
    """Return the largest batch size that one image asks of a component."""
    if not can_guide(spec):
        return 1
    row = COMPONENTS[component]
    is_twice_guided = row.role == "denoiser" and task_record(spec).guides_by_image
    return row.samples_per_image + is_twice_guided


def runs_in_patches(spec: ModelSpec) -> bool:
    """Return whether the UNet and the decoder of a model see large latents in patches."""
    record = task_record(spec)
    return record.samples and "tile_size" not in record.takes
