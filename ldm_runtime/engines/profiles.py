"""Optimization profiles of a bundle's engines, from the component table and a range of sizes.

Guidance needs two samples per image from the UNet and from the encoders of prompts, layouts and
classes, one with and one without the condition, so that their profiles are optimized for a batch
size of twice the number of images; of a UNet that an image guides as well, three times. A batch
size of 1 stays possible, for a guidance scale of 1, unless the shapes are static. Models that
cannot be guided need one sample per image.

The UNet is optimized for prompts of one chunk of the text encoder and serves longer ones, of up to
four chunks; with retrieval, for one embedding, and serves up to 21, a text's and those of 20
neighbours; unless the shapes are static. Where images are upscaled in patches, engines are
optimized for a whole patch, and serve smaller images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ldm_runtime.engines.records import ProfileRecord
from ldm_runtime.errors import EngineBuildError
from ldm_runtime.specs.model import ModelSpec, Task, axis_sizes, components_of, size_step
from ldm_runtime.specs.networks import TextEncoderSpec
from ldm_runtime.specs.tasks import runs_in_patches, samples_per_image
from ldm_runtime.tiling.patches import PATCH

_BELOW_PIXELS, _ABOVE, _MAX_BATCH = 256, 1.5, 4
#: Longest context, in units of the shortest: chunks of a prompt, embeddings.
_LONGEST_CONTEXT: Mapping[Task, int] = MappingProxyType(
    {
        "text-to-image": 4,
        "text-super-resolution": 4,
        "text-inpainting": 4,
        "image-editing": 4,
        "image-variation": 4,
        "depth-to-image": 4,
        "retrieval": 21,
    }
)

#: Height and width in pixels.
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SizeRange:
    """Sizes that engines should serve; None leaves them to `resolve_shapes`.

    Attributes:
        min_size: Smallest image.
        opt_size: Image size that the engines are optimized for.
        max_size: Largest image.
        max_batch: Most images per call.
        static: Serve images of `opt_size` in batches of `max_batch`, with guidance where the
            model has it, and the shortest context, nothing else.
    """

    min_size: Size | None = None
    opt_size: Size | None = None
    max_size: Size | None = None
    max_batch: int | None = None
    static: bool = False


@dataclass(frozen=True, kw_only=True)
class EngineShapes:
    """Sizes that engines serve, all of them resolved; attributes as in `SizeRange`."""

    min_size: Size
    opt_size: Size
    max_size: Size
    max_batch: int
    static: bool


def resolve_shapes(spec: ModelSpec, wanted: SizeRange) -> EngineShapes:
    """Return the sizes, with defaults where they are None.

    By default images of the model's native size, 256 pixels below it (at least half of it) to
    1.5 times above, one to four per call; static shapes are for one image. A super-resolution
    model is optimized for a whole patch, down to the smallest possible image.

    Raises:
        EngineBuildError: A size is not a multiple of the UNet's downsampling, the sizes are not in
            order, or the batch size is below 1.
    """
    step = size_step(spec)
    given = {"min_size": wanted.min_size, "opt_size": wanted.opt_size, "max_size": wanted.max_size}
    for name, size in given.items():
        _check_multiple(name, size, step)
    default_batch = 1 if wanted.static else _MAX_BATCH
    batch = default_batch if wanted.max_batch is None else wanted.max_batch
    if batch < 1:
        raise EngineBuildError(f"max_batch is {batch}; a batch has at least 1 image")
    native = _native_size(spec)
    if wanted.static:
        if wanted.min_size or wanted.max_size:
            raise EngineBuildError("static engines serve one size; give opt_size alone")
        low = opt = high = wanted.opt_size or native
    else:
        low, opt, high = zip(
            *(
                _axis_range(
                    _default_range(native[i], spec), [size and size[i] for size in given.values()]
                )
                for i in (0, 1)
            ),
            strict=True,
        )
    if not all(low[i] <= opt[i] <= high[i] for i in (0, 1)):
        raise EngineBuildError(
            f"sizes must grow from min_size {_text(low)} over opt_size {_text(opt)} "
            f"to max_size {_text(high)}"
        )
    return EngineShapes(
        min_size=low, opt_size=opt, max_size=high, max_batch=batch, static=wanted.static
    )


def component_profiles(
    name: str, spec: ModelSpec, shapes: EngineShapes
) -> tuple[ProfileRecord, ...]:
    """Return the shapes that the engine of component `name` takes, one record per input."""
    samples = samples_per_image(spec, name)
    most = samples * shapes.max_batch
    longest = 1 if shapes.static else _LONGEST_CONTEXT.get(spec.task, 1)
    sizes = {
        "min": _axes(name, spec, shapes.min_size, most if shapes.static else 1, 1),
        "opt": _axes(name, spec, shapes.opt_size, most if shapes.static else samples, 1),
        "max": _axes(name, spec, shapes.max_size, most, longest),
    }
    return tuple(
        ProfileRecord(
            input=tensor.name,
            **{end: tuple(axes[axis] for axis in tensor.axes) for end, axes in sizes.items()},
        )
        for tensor in components_of(spec)[name].inputs
    )


def _axes(name: str, spec: ModelSpec, size: Size, batch: int, context: int) -> dict[str, int]:
    factor, encoder = spec.autoencoder.factor, spec.find(TextEncoderSpec)
    return {
        **axis_sizes(spec, name),
        "batch": batch,
        "height": size[0] // factor,
        "width": size[1] // factor,
        "image_height": size[0],
        "image_width": size[1],
        "context_tokens": context * (encoder.max_tokens if encoder else 1),
    }


def _native_size(spec: ModelSpec) -> Size:
    """Return the default size that engines are optimized for."""
    if runs_in_patches(spec):
        return PATCH * spec.autoencoder.factor, PATCH * spec.autoencoder.factor
    return spec.defaults.height, spec.defaults.width


def _default_range(native: int, spec: ModelSpec) -> tuple[int, int, int]:
    """Return the default lowest, optimal and highest length in pixels."""
    step = size_step(spec)
    if runs_in_patches(spec):
        return step, native, native
    lowest = math.ceil(max(native - _BELOW_PIXELS, native / 2) / step) * step
    return lowest, native, int(native * _ABOVE) // step * step


def _axis_range(default: tuple[int, int, int], given: Sequence[int | None]) -> tuple[int, int, int]:
    """Return the lowest, optimal and highest length in pixels, each as given or by default."""
    low, opt, high = given
    if opt is None:
        opt = max(default[1], low or 0)
        opt = opt if high is None else min(opt, high)
    low = min(opt, default[0]) if low is None else low
    high = max(opt, default[2]) if high is None else high
    return low, opt, high


def _check_multiple(name: str, size: Size | None, step: int) -> None:
    for length in size or ():
        if length < step or length % step:
            below = max(length // step, 1) * step
            raise EngineBuildError(
                f"{name}: {length} is not a multiple of {step}; the nearest sizes are {below} "
                f"and {below + step}"
            )


def _text(size: Size) -> str:
    """Return a size as flags have it, the width first."""
    height, width = size
    return f"{width}x{height}"
