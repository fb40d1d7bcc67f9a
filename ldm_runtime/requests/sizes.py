"""Sizes: what a model can draw, what a request gets, and what of it is sampled."""

from dataclasses import replace

from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.images import MAX_SIDE
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.specs.model import ModelSpec, latent_step, size_step
from ldm_runtime.specs.tasks import task_record
from ldm_runtime.tiling.tiles import MIN_TILE

#: Pictures of more latent pixels than this are decoded in tiles of so many a side: memory goes with
#: latent pixels, and of what a model can draw, tiles of this size are within 47 dB
#: (`docs/steering.md`).
WHOLE_LATENTS, TILE_LATENTS = 128 * 128, 96


def latent_size(request: GenerationRequest, spec: ModelSpec) -> tuple[int, int]:
    """Return height and width of what is sampled for a resolved request, in latent pixels.

    They cover the request's size and are what the UNet can take: pictures and maps that a request
    brings are padded to them on the right and at the bottom, and the result has to be cropped.
    """
    assert request.height is not None, "the request is not resolved"
    assert request.width is not None, "the request is not resolved"
    factor, step = spec.autoencoder.factor, latent_step(spec)
    height, width = -(-request.height // factor), -(-request.width // factor)
    return -(-height // step) * step, -(-width // step) * step


def padded_size(request: GenerationRequest, spec: ModelSpec) -> tuple[int, int]:
    """Return height and width of what is encoded and decoded for a resolved request, in pixels."""
    height, width = latent_size(request, spec)
    return height * spec.autoencoder.factor, width * spec.autoencoder.factor


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


def with_size(request: GenerationRequest, spec: ModelSpec) -> GenerationRequest:
    """Return a request with its size, and that of its tiles if it has any, filled in and checked.

    Raises:
        RequestError: The model cannot draw such a size, or not from such a picture.
    """
    default = _default_size(request, spec)
    height = default[0] if request.height is None else request.height
    width = default[1] if request.width is None else request.width
    request = replace(request, height=height, width=width)
    if task_record(spec).size == "enlarged":
        _check_enlarged(request, spec)
    else:
        _check_multiples(request, spec, default)
    if max(hires_size(request, spec)) > MAX_SIDE:
        raise RequestError("hires_scale", f"makes more than {MAX_SIDE} pixels a side; lower it")
    _check_outpaint(request)
    if "tile_size" not in task_record(spec).takes:
        return request
    return replace(request, tile_size=_tile_size(request, spec))


def _default_size(request: GenerationRequest, spec: ModelSpec) -> tuple[int, int]:
    """Return height and width where the request leaves them open.

    What a request brings keeps its size, whatever that is: a picture of which a part is kept cannot
    be stretched.
    """
    size = task_record(spec).size
    if size == "enlarged":
        return _enlarged_size(request, spec)
    if size == "segmentation":
        assert request.segmentation is not None, "the request is not checked"
        width, height = request.segmentation.size
    elif request.image is not None:
        width, height = canvas_size(request)
    else:
        return spec.defaults.height, spec.defaults.width
    return height, width


def _enlarged_size(request: GenerationRequest, spec: ModelSpec) -> tuple[int, int]:
    assert request.image is not None, "the request is not checked"
    width, height = (spec.autoencoder.factor * side for side in request.image.size)
    if max(width, height) > MAX_SIDE:
        raise RequestError(
            "image",
            f"makes {width}x{height} pixels, enlarged {spec.autoencoder.factor} times; give at "
            f"most {MAX_SIDE // spec.autoencoder.factor} a side",
        )
    return height, width


def _check_enlarged(request: GenerationRequest, spec: ModelSpec) -> None:
    for name, size in zip(("height", "width"), _enlarged_size(request, spec), strict=True):
        if getattr(request, name) != size:
            raise RequestError(
                name,
                f"is {getattr(request, name)}, but the image enlarged {spec.autoencoder.factor} "
                f"times has {size}; leave it out",
            )


def _check_multiples(request: GenerationRequest, spec: ModelSpec, default: tuple[int, int]) -> None:
    step = size_step(spec)
    sizes = (request.height, request.width)
    for name, size, given in zip(("height", "width"), sizes, default, strict=True):
        assert size is not None, "the request is not resolved"
        below = size // step * step
        if size not in (below, given):
            nearest = f"{below} and {below + step}" if below else f"{step} and {2 * step}"
            raise RequestError(
                name, f"{size} is not a multiple of {step}; the nearest sizes are {nearest}"
            )


def _check_outpaint(request: GenerationRequest) -> None:
    """Margins are counted in pixels of the picture, so that the canvas cannot be resized."""
    if request.outpaint is None:
        return
    width, height = canvas_size(request)
    if (width, height) != (request.width, request.height):
        raise RequestError(
            "outpaint",
            f"makes {width}x{height} pixels, but {request.width}x{request.height} are asked for; "
            "leave height and width out",
        )


def _tile_size(request: GenerationRequest, spec: ModelSpec) -> int:
    """Return the side of the tiles to decode in, in pixels; 0 decodes in one piece."""
    height, width = hires_size(request, spec)
    factor, step = spec.autoencoder.factor, size_step(spec)
    is_large = height * width > WHOLE_LATENTS * factor**2
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
