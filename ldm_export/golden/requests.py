"""The golden requests, which verify a bundle, per task, with inputs that need no data set."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.golden.images import Pixels, make_images
from ldm_runtime.inputs.depth_maps import DepthMap
from ldm_runtime.inputs.embeddings import Embeddings
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.layouts import LayoutObject, max_objects, num_labels
from ldm_runtime.inputs.segmentation import SegmentationMap
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve, sigma_table
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.schedules import most_steps
from ldm_runtime.specs.model import ModelSpec, Task, size_step
from ldm_runtime.specs.networks import (
    ClassEmbedderSpec,
    DepthEstimatorSpec,
    SegmentationEncoderSpec,
    TextEncoderSpec,
    UNetSpec,
)
from ldm_runtime.specs.tasks import can_guide, task_record

_MAX_PIXELS = 256  # per side: golden outputs show that a bundle works, not how good it is
_MAX_LATENTS = 32  # per side, of large models
_MANY_PARAMETERS = 100_000_000
_STEPS, _FEW_STEPS = 20, 4
#: Fields in which the requests of a bundle differ, in addition to their inputs.
_VARIED: tuple[Mapping[str, Any], ...] = (
    {"sampler": "ddim", "seed": 0},
    {"sampler": "dpmpp_2m", "seed": 1, "num_images": 2},
    {"sampler": "euler_ancestral", "seed": 3, "guidance_scale": 1.0},
)

#: Inputs of one request, by field.
Inputs = Mapping[str, Any]
Size = tuple[int, int]


def golden_requests(spec: ModelSpec, unet_parameters: int) -> tuple[ResolvedRequest, ...]:
    """Return the golden requests of a model; large models get small images in few steps."""
    is_large = unet_parameters > _MANY_PARAMETERS
    height, width = _size(spec, is_large=is_large)
    common: Inputs = {"num_inference_steps": _steps(spec, _FEW_STEPS if is_large else _STEPS)}
    varied = _VARIED
    if task_record(spec).size != "enlarged" and spec.task != "autoencoder":  # else the image says
        common = {**common, "height": height, "width": width}
    if spec.task == "autoencoder":  # nothing is sampled
        common, varied = {}, ({}, {})
    inputs = _INPUTS[spec.task](spec, (height, width))
    return tuple(
        resolve(GenerationRequest(**{**common, **each, **fields}), spec)
        for each, fields in zip(varied, inputs, strict=False)
    )


def unguided_request(spec: ModelSpec, image: Pixels) -> ResolvedRequest:
    """Return a request without guidance whose condition is of an image, or says nothing about it.

    Args:
        spec: The model.
        image: RGB (side, side, 3). What is concatenated to the latents is made from it.
    """
    side, factor = len(image), spec.autoencoder.factor
    fields: dict[str, Any] = {"height": side, "width": side, "guidance_scale": 1.0, "seed": 0}
    inputs = dict(next(_INPUTS[spec.task](spec, (side, side))))
    match spec.task:
        case "text-to-image":
            inputs = {"prompt": ""}
        case "image-variation":
            inputs = {"image": InputImage(image)}
        case "text-inpainting":
            inputs |= {"prompt": "", "image": InputImage(image)}
        case "image-editing":
            inputs |= {"prompt": "", "image": InputImage(image), "image_guidance_scale": 1.0}
        case "depth-to-image":
            inputs = {"prompt": "", "depth_map": DepthMap(image.mean(axis=2))}
        case "inpainting":
            inputs["image"] = InputImage(image)
        case "super-resolution" | "text-super-resolution":
            squares = image.reshape(side // factor, factor, side // factor, factor, 3)
            inputs["image"] = InputImage(np.rint(squares.mean(axis=(1, 3))).astype(np.uint8))
            del fields["height"], fields["width"]
    return resolve(GenerationRequest(**fields, **inputs), spec)


def _steps(spec: ModelSpec, wanted: int) -> int:
    """Return the number of steps: fewer where the schedule of a distilled model has no more."""
    if spec.unet is None or spec.defaults.schedule is None:
        return wanted
    table = sigma_table(spec, zero_terminal_snr=False)
    return most_steps(table, wanted, spec.defaults.schedule)


def _size(spec: ModelSpec, *, is_large: bool) -> Size:
    """Return height and width in pixels: the model's own, or fewer that are quickly generated."""
    step = size_step(spec)
    most = min(_MAX_PIXELS, _MAX_LATENTS * spec.autoencoder.factor) if is_large else _MAX_PIXELS
    height, width = (
        max(step, min(size, most) // step * step)
        for size in (spec.defaults.height, spec.defaults.width)
    )
    return height, width


def _no_inputs(spec: ModelSpec, size: Size) -> Iterator[Inputs]:
    del spec, size
    for _ in _VARIED:
        yield {}


def _prompts(spec: ModelSpec, size: Size) -> Iterator[Inputs]:
    del size
    yield {"prompt": "a large red circle left of a small blue square on a white background"}
    yield {
        "prompt": "a small green triangle on a black background",
        "negative_prompt": "a gray background" if can_guide(spec) else "",
    }
    yield {"prompt": "a large yellow cross above a small purple circle"}


def _class_labels(spec: ModelSpec, size: Size) -> Iterator[Inputs]:
    """Yield the first, the middle and the last class, the null class left out."""
    del size
    embedder = spec.network(ClassEmbedderSpec)
    classes = [each for each in range(embedder.num_classes) if each != embedder.null_class]
    for index in (0, len(classes) // 2, -1):
        yield {"class_label": classes[index]}


def _layouts(spec: ModelSpec, size: Size) -> Iterator[Inputs]:
    """Yield layouts of one, two and five objects."""
    del size
    encoder = spec.network(TextEncoderSpec)
    labels, most = num_labels(encoder), max_objects(encoder)
    for seed, count in enumerate((1, 2, 5)):
        rng = np.random.default_rng(seed)
        yield {"layout": tuple(_object(rng, labels) for _ in range(min(count, most)))}


def _object(rng: np.random.Generator, labels: int) -> LayoutObject:
    left, top = (float(each) for each in rng.uniform(0, 0.5, 2))
    width, height = (float(each) for each in rng.uniform(0.2, 0.5, 2))
    box = (left, top, left + width, top + height)
    return LayoutObject(label=int(rng.integers(min(labels, 100))), box=box)


def _segmentation_maps(spec: ModelSpec, size: Size) -> Iterator[Inputs]:
    classes = spec.network(SegmentationEncoderSpec).num_classes
    for seed in range(len(_VARIED)):
        yield {"segmentation": SegmentationMap(_segmentation_map(seed, size, classes))}


def _segmentation_map(seed: int, size: Size, classes: int) -> npt.NDArray[np.uint8]:
    """Return ids (H, W): a mosaic of classes with a rectangle of another one in it."""
    rng, (height, width) = np.random.default_rng(seed), size
    mosaic = rng.integers(classes, size=(3, 4))
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * 4 // width
    ids = mosaic[rows[:, None], columns].astype(np.uint8)
    ids[height // 3 : height // 2, width // 4 : -width // 3] = rng.integers(classes)
    return ids


def _low_resolution(spec: ModelSpec, size: Size) -> Iterator[Inputs]:
    """Yield images of one pixel per latent pixel; one of them of an irregular width."""
    height, width = (side // spec.autoencoder.factor for side in size)
    for seed, narrower in enumerate((0, 0, 3)):
        shape = height, width - narrower if width > 2 * narrower else width
        yield {"image": _image(seed, shape)}


def _prompts_and_low_resolution(spec: ModelSpec, size: Size) -> Iterator[Inputs]:
    """Yield likewise with prompts, and with noise of several levels."""
    levels: tuple[Inputs, ...] = ({}, {"noise_level": 100}, {"noise_level": 0})
    for prompts, images, level in zip(
        _prompts(spec, size), _low_resolution(spec, size), levels, strict=True
    ):
        yield {**prompts, **images, **level}


def _masked_images(spec: ModelSpec, size: Size) -> Iterator[Inputs]:
    """Yield images with a mask: a rectangle, an ellipse, and a margin next to the image."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    y, x = np.abs(2 * y + 1 - height) / height, np.abs(2 * x + 1 - width) / width
    yield {"image": _image(0, size), "mask_image": _mask(np.maximum(y, x) < 0.5)}
    yield {"image": _image(1, size), "mask_image": _mask(np.hypot(y, x) < 0.7)}
    margin = max(spec.autoencoder.factor, width // 4)
    image = _image(2, (height, width - margin))
    yield {"image": image, "outpaint": (0, 0, margin, 0)}


def _prompts_and_masked_images(spec: ModelSpec, size: Size) -> Iterator[Inputs]:
    for prompts, images in zip(_prompts(spec, size), _masked_images(spec, size), strict=True):
        yield {**prompts, **images}


def _prompts_and_images(spec: ModelSpec, size: Size) -> Iterator[Inputs]:
    """Yield images to edit: guided by prompt and image, more by the image, and unguided."""
    scales: tuple[Inputs, ...] = (
        {},
        {"image_guidance_scale": 2.0},
        {"image_guidance_scale": 1.0},
    )
    for seed, (prompts, scale) in enumerate(zip(_prompts(spec, size), scales, strict=True)):
        yield {**prompts, "image": _image(seed, size), **scale}


def _prompts_and_images_to_vary(spec: ModelSpec, size: Size) -> Iterator[Inputs]:
    """Yield images of several proportions, with noise of several levels on their embeddings."""
    height, width = size
    levels: tuple[Inputs, ...] = ({}, {"noise_level": 500}, {"noise_level": 50})
    sizes = ((height, width), (height, width // 2), (height // 2, width))
    for seed, (prompts, level) in enumerate(zip(_prompts(spec, size), levels, strict=True)):
        yield {**prompts, "image": _image(seed, sizes[seed]), **level}


def _prompts_and_depths(spec: ModelSpec, size: Size) -> Iterator[Inputs]:
    """Yield an image, a depth map, and both; in place of the image, a map if it needs one."""
    images = [_image(seed, size) for seed in range(len(_VARIED))]
    maps = [DepthMap(image.gray()) for image in images]
    estimates = spec.find(DepthEstimatorSpec) is not None
    depths: tuple[Inputs, ...] = (
        {"image": images[0]} if estimates else {"depth_map": maps[0]},
        {"depth_map": maps[1]},
        {"image": images[2], "depth_map": maps[0], "strength": 0.5},
    )
    for prompts, depth in zip(_prompts(spec, size), depths, strict=True):
        yield {**prompts, **depth}


def _neighbours(spec: ModelSpec, size: Size) -> Iterator[Inputs]:
    """Yield one, two and four vectors, of the length that CLIP's have in practice."""
    del size
    context_dim = spec.network(UNetSpec).context_dim
    assert context_dim is not None, "the task is conditioned by cross-attention"
    for seed, count in enumerate((1, 2, 4)):
        rng = np.random.default_rng(seed)
        vectors = 10 * rng.standard_normal((count, context_dim), dtype=np.float32)
        yield {"embeddings": Embeddings(vectors)}


def _whole_images(spec: ModelSpec, size: Size) -> Iterator[Inputs]:
    """Yield two images, one of them half as wide."""
    (height, width), factor = size, spec.autoencoder.factor
    yield {"image": _image(0, size)}
    yield {"image": _image(1, (height, max(factor, width // 2 // factor * factor)))}


def _image(seed: int, size: Size) -> InputImage:
    height, width = size
    return InputImage(make_images(max(size))[seed, :height, :width])


def _mask(inside: npt.NDArray[np.bool_]) -> InputImage:
    return InputImage(np.repeat(np.uint8(255) * inside[..., None], 3, axis=2))


_INPUTS: Mapping[Task, Callable[[ModelSpec, Size], Iterator[Inputs]]] = MappingProxyType(
    {
        "unconditional": _no_inputs,
        "class-to-image": _class_labels,
        "text-to-image": _prompts,
        "layout-to-image": _layouts,
        "semantic-synthesis": _segmentation_maps,
        "super-resolution": _low_resolution,
        "text-super-resolution": _prompts_and_low_resolution,
        "inpainting": _masked_images,
        "text-inpainting": _prompts_and_masked_images,
        "image-editing": _prompts_and_images,
        "image-variation": _prompts_and_images_to_vary,
        "depth-to-image": _prompts_and_depths,
        "retrieval": _neighbours,
        "autoencoder": _whole_images,
    }
)
