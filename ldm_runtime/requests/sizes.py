"""Sizes of images and latents: those a model can generate, and those a request gets."""

from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.reading import MAX_SIDE
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolved import (
    Condition,
    NoImage,
    OutpaintedImage,
    RequestImage,
    ResolvedRequest,
    SegmentationCondition,
)
from ldm_runtime.specs.model import ModelSpec, latent_step, size_step
from ldm_runtime.specs.tasks import task_record
from ldm_runtime.tiling.tiles import MIN_TILE

#: Images of more latent pixels than this are decoded in tiles of that many per side: memory grows
#: with latent pixels, and of what a model can generate, tiles of this size are within 47 dB
#: (`docs/steering.md`).
WHOLE_LATENTS, TILE_LATENTS = 128 * 128, 96

#: Height and width in pixels.
Size = tuple[int, int]


def latent_size(request: ResolvedRequest, spec: ModelSpec) -> Size:
    """Return height and width of the latents that are sampled for a request.

    They cover the request's size and are what the UNet can take: images and maps that a request
    brings are padded to them on the right and at the bottom, and the result has to be cropped.
    """
    return latents_covering((request.height, request.width), spec)


def latents_covering(size: Size, spec: ModelSpec) -> Size:
    """Return height and width of the smallest latents that a UNet can take for images of a size."""
    factor, step = spec.autoencoder.factor, latent_step(spec)
    height, width = -(-size[0] // factor), -(-size[1] // factor)
    return -(-height // step) * step, -(-width // step) * step


def padded_size(request: ResolvedRequest, spec: ModelSpec) -> Size:
    """Return height and width of the images that are encoded and decoded for a request."""
    height, width = latent_size(request, spec)
    return height * spec.autoencoder.factor, width * spec.autoencoder.factor


def image_size(
    request: GenerationRequest, image: RequestImage, condition: Condition, spec: ModelSpec
) -> Size:
    """Return the size of a request's images, checked.

    Raises:
        RequestError: The model cannot generate such a size, or not from such an image.
    """
    default = _default_size(request, image, condition, spec)
    height = default[0] if request.height is None else request.height
    width = default[1] if request.width is None else request.width
    if task_record(spec).size == "enlarged":
        _check_enlarged((height, width), default, spec)
    else:
        _check_multiples((height, width), default, spec)
    _check_outpaint((height, width), image)
    if max(height, width) > MAX_SIDE:
        raise RequestError("outpaint", f"makes more than {MAX_SIDE} pixels per side; add fewer")
    return height, width


def hires_size(size: Size, scale: float, spec: ModelSpec) -> Size:
    """Return height and width of images enlarged for a second pass, at least one size step each.

    Raises:
        RequestError: They are too large.
    """
    step = size_step(spec)
    height, width = (max(1, round(side * scale / step)) * step for side in size)
    if max(height, width) > MAX_SIDE:
        raise RequestError("hires_scale", f"makes more than {MAX_SIDE} pixels per side; lower it")
    return height, width


def tile_size(request: GenerationRequest, size: Size, spec: ModelSpec) -> int:
    """Return the side of the tiles to decode images of a size in, in pixels; 0 is in one piece.

    Raises:
        RequestError: The model cannot decode in such tiles.
    """
    if "tile_size" not in task_record(spec).takes:
        return 0
    factor, step = spec.autoencoder.factor, size_step(spec)
    is_large = size[0] * size[1] > WHOLE_LATENTS * factor**2
    default = -(-TILE_LATENTS * factor // step) * step if is_large else 0
    tile = default if request.tile_size is None else request.tile_size
    if tile % step:
        raise RequestError(
            "tile_size", f"{tile} is not a multiple of {step}; take {-(-tile // step) * step}"
        )
    if 0 < tile < MIN_TILE * factor:
        raise RequestError(
            "tile_size", f"{tile} is too small; take 0 or at least {MIN_TILE * factor}"
        )
    return tile


def _default_size(
    request: GenerationRequest, image: RequestImage, condition: Condition, spec: ModelSpec
) -> Size:
    """Return height and width where the request leaves them open.

    An image or map that a request brings keeps its size, whatever that is: an image of which a
    part is kept cannot be stretched.
    """
    if isinstance(condition, SegmentationCondition):
        width, height = condition.segmentation.size
    elif isinstance(image, NoImage) and request.depth_map is not None:
        width, height = request.depth_map.size
    elif isinstance(image, NoImage) or task_record(spec).image == "embedding":
        return spec.defaults.height, spec.defaults.width
    elif task_record(spec).size == "enlarged":
        return _enlarged_size(image.size, spec)
    else:
        width, height = image.size
    return height, width


def _enlarged_size(size: tuple[int, int], spec: ModelSpec) -> Size:
    width, height = (spec.autoencoder.factor * side for side in size)
    if max(width, height) > MAX_SIDE:
        raise RequestError(
            "image",
            f"makes {width}x{height} pixels, enlarged {spec.autoencoder.factor} times; give at "
            f"most {MAX_SIDE // spec.autoencoder.factor} per side",
        )
    return height, width


def _check_enlarged(size: Size, enlarged: Size, spec: ModelSpec) -> None:
    for name, given, only in zip(("height", "width"), size, enlarged, strict=True):
        if given != only:
            raise RequestError(
                name,
                f"is {given}, but the image enlarged {spec.autoencoder.factor} times has {only}; "
                "leave it out",
            )


def _check_multiples(size: Size, default: Size, spec: ModelSpec) -> None:
    step = size_step(spec)
    for name, side, given in zip(("height", "width"), size, default, strict=True):
        below = side // step * step
        if side not in (below, given):
            nearest = f"{below} and {below + step}" if below else f"{step} and {2 * step}"
            raise RequestError(
                name, f"{side} is not a multiple of {step}; the nearest sizes are {nearest}"
            )


def _check_outpaint(size: Size, image: RequestImage) -> None:
    """Margins are counted in pixels of the image, so that the canvas cannot be resized."""
    if not isinstance(image, OutpaintedImage):
        return
    (height, width), canvas = size, image.size
    if canvas != (width, height):
        raise RequestError(
            "outpaint",
            f"makes {canvas[0]}x{canvas[1]} pixels, but {width}x{height} are asked for; "
            "leave height and width out",
        )
