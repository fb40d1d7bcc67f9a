"""Images of a request: the latents that sampling starts from, and the area that is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.backends.contract import Runner
from ldm_runtime.inputs.images import InputImage, resize
from ldm_runtime.inputs.masks import (
    binary_mask,
    blurred_mask,
    composite,
    latent_mask,
    outpaint_canvas,
)
from ldm_runtime.latents.codec import encode_image
from ldm_runtime.requests.resolved import (
    NO_BLUR,
    MaskedImage,
    NoImage,
    OutpaintedImage,
    ResolvedRequest,
    SamplingPass,
    WholeImage,
)
from ldm_runtime.requests.sizes import padded_size
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.tasks import task_record

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class InitImage:
    """The init image of a request, in the size that is generated.

    Attributes:
        image: The image.
        mask: The masked region, which is generated again; None for all of the image. Of two
            colours for a model that was trained to inpaint, as CompVis composites its results.
        blurred: The mask with blurred edges, where the generated image fades into this one; None
            if it was not to be blurred.
    """

    image: InputImage
    mask: InputImage | None
    blurred: InputImage | None = None

    def padded(self, height: int, width: int) -> "InitImage":
        """Return image and mask padded on the right and at the bottom, by repeating their edge."""
        mask = None if self.mask is None else _padded(self.mask, height, width)
        return InitImage(image=_padded(self.image, height, width), mask=mask)

    def finish(self, generated: Image.Image) -> Image.Image:
        """Restore the area outside the mask in a generated image."""
        if self.mask is None:
            return generated
        if self.blurred is not None:
            return composite(self.image, generated, self.blurred, fades_outwards=True)
        return composite(self.image, generated, self.mask)


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """Initial latents for sampling, in place of pure noise.

    Attributes:
        latents: Clean latents in the UNet's scale, (1, C, h, w) or one for each image.
        mask: 1 in the masked region and 0 where latents are kept, (1, 1, h, w); None for all 1.
    """

    latents: Float32Array
    mask: Float32Array | None = None


def init_image(request: ResolvedRequest, spec: ModelSpec) -> InitImage | None:
    """Return the init image of a request, with its margins to outpaint; None without one."""
    size = request.width, request.height
    blur = NO_BLUR
    match request.source_image:
        case NoImage():
            return None
        case WholeImage(image=image):
            return InitImage(image=resize(image, *size), mask=None)
        case MaskedImage(image=image, mask=mask, blur=blur):
            mask = blurred_mask(mask, blur)
        case OutpaintedImage(image=small, margins=margins):
            image, mask = outpaint_canvas(small, *margins)
    mask = resize(mask, *size)  # a resized mask has soft edges
    blurred = None if blur == NO_BLUR else mask
    if task_record(spec).image == "condition":
        mask = binary_mask(mask)
    return InitImage(image=resize(image, *size), mask=mask, blurred=blurred)


def start_from(engine: Runner, init: InitImage, request: ResolvedRequest, spec: ModelSpec) -> Start:
    """Return the start of sampling; for an autoencoder task it is also the result.

    Args:
        engine: The autoencoder's encoder.
        init: From `init_image`.
        request: The request.
        spec: The model.
    """
    whole = init.padded(*padded_size(request, spec))
    factor = spec.autoencoder.factor
    return Start(
        latents=encode_image(engine, whole.image.pixels[None], spec),
        mask=None if whole.mask is None else latent_mask(whole.mask, factor),
    )


def hires_start(
    engine: Runner, images: Sequence[Image.Image], second: SamplingPass, spec: ModelSpec
) -> Start:
    """Return the start of the second pass: the first pass's images, resized and encoded.

    Args:
        engine: The autoencoder's encoder.
        images: The images of the first pass.
        second: The second pass.
        spec: The model.
    """
    size = second.width, second.height
    enlarged = [resize(InputImage.read(image), *size).pixels for image in images]
    latents = [encode_image(engine, pixels[None], spec) for pixels in enlarged]
    return Start(latents=np.concatenate(latents))


def _padded(image: InputImage, height: int, width: int) -> InputImage:
    if image.size == (width, height):
        return image
    missing = (0, height - image.size[1]), (0, width - image.size[0]), (0, 0)
    return InputImage(np.pad(image.pixels, missing, mode="edge"))
