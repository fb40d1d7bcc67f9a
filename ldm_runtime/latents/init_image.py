"""Pictures that a request has: what sampling starts from, and what of them comes back."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.backends.contract import Runner
from ldm_runtime.inputs.images import InputImage, resize
from ldm_runtime.inputs.masks import composite, latent_mask, outpaint_canvas
from ldm_runtime.latents.codec import encode_image
from ldm_runtime.requests.resolved import (
    MaskedImage,
    NoImage,
    OutpaintedImage,
    ResolvedRequest,
    SamplingPass,
    WholeImage,
)
from ldm_runtime.requests.sizes import padded_size
from ldm_runtime.specs.model import ModelSpec

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class InitImage:
    """The picture of a request in the size that is drawn.

    Attributes:
        picture: What there is.
        mask: What of it to draw anew, or None for all of it.
    """

    picture: InputImage
    mask: InputImage | None

    def padded(self, height: int, width: int) -> "InitImage":
        """Return both grown to a size on the right and at the bottom, by repeating their edge."""
        mask = None if self.mask is None else _padded(self.mask, height, width)
        return InitImage(picture=_padded(self.picture, height, width), mask=mask)

    def finish(self, image: Image.Image) -> Image.Image:
        """Put back what is known."""
        return image if self.mask is None else composite(self.picture, image, self.mask)


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """What sampling starts from instead of noise.

    Attributes:
        latents: Clean latents in the UNet's scale, (1, C, h, w) or one for each image.
        strength: The share of the steps that are made; 0 without any.
        mask: Where to draw (1) and what to keep (0), (1, 1, h, w), or None for everything.
    """

    latents: Float32Array
    strength: float
    mask: Float32Array | None = None


def init_image(request: ResolvedRequest) -> InitImage | None:
    """Return the image of a request, with what is to be added around it, or None without one."""
    size = request.width, request.height
    match request.source_image:
        case NoImage():
            return None
        case WholeImage(image=picture):
            return InitImage(picture=resize(picture, *size), mask=None)
        case MaskedImage(image=picture, mask=mask):
            pass
        case OutpaintedImage(image=small, margins=margins):
            picture, mask = outpaint_canvas(small, *margins)
    return InitImage(picture=resize(picture, *size), mask=resize(mask, *size))


def start_from(engine: Runner, init: InitImage, request: ResolvedRequest, spec: ModelSpec) -> Start:
    """Return what sampling starts from; without sampling it is also where it ends.

    Args:
        engine: The autoencoder's encoder.
        init: From `init_image`.
        request: The request.
        spec: The model.
    """
    whole = init.padded(*padded_size(request, spec))
    factor = spec.autoencoder.factor
    return Start(
        latents=encode_image(engine, whole.picture.pixels[None], spec),
        strength=request.passes[0].strength if request.passes else 0.0,
        mask=None if whole.mask is None else latent_mask(whole.mask, factor),
    )


def hires_start(
    engine: Runner, images: Sequence[Image.Image], second: SamplingPass, spec: ModelSpec
) -> Start:
    """Return what the second pass starts from: the first pass's images, enlarged.

    Args:
        engine: The autoencoder's encoder.
        images: What the first pass drew.
        second: The second pass.
        spec: The model.
    """
    size = second.width, second.height
    enlarged = [resize(InputImage.read(image), *size).pixels for image in images]
    latents = [encode_image(engine, pixels[None], spec) for pixels in enlarged]
    return Start(latents=np.concatenate(latents), strength=second.strength)


def _padded(picture: InputImage, height: int, width: int) -> InputImage:
    if picture.size == (width, height):
        return picture
    missing = (0, height - picture.size[1]), (0, width - picture.size[0]), (0, 0)
    return InputImage(np.pad(picture.pixels, missing, mode="edge"))
