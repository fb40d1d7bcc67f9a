"""Masks: the part of an image that is generated again, with any model.

Pixels of a mask that are brighter than one half are generated again, the others are known and kept
exactly, whether the mask has two colours, has soft edges or was stored as JPEG. Only a mask that is
blurred on request changes pixels beyond its edge.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.reading import MAX_SIDE

Float32Array = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]

_HALF = 127  # the brightest pixel that is still known: 127 / 255 < 0.5
_WHITE = 255
#: Largest blur of a mask: the web UI's.
MAX_BLUR = 64
#: Standard deviations that the kernel of a blur reaches.
_REACH = 2.5


def binary_mask(mask: InputImage) -> InputImage:
    """Return a mask in two colours: white where it is brighter than one half, else black.

    Source: `scripts/inpaint.py` of CompVis/latent-diffusion, commit a506df5.
    """
    white = np.where(mask.gray() > _HALF, np.uint8(255), np.uint8(0))
    return InputImage(np.repeat(white[..., None], 3, axis=2))


def latent_mask(mask: InputImage, factor: int) -> Float32Array:
    """Return which latent pixels are generated again (1) or kept (0), shape (1, 1, h, w).

    A latent pixel is generated again if any of its pixels is brighter than one half, because one
    that is kept would hold on to all of them.

    Args:
        mask: The mask, as large as the image.
        factor: Pixels that a latent pixel covers in each direction.

    Raises:
        ValueError: A side of the mask is not a multiple of `factor`.
    """
    width, height = mask.size
    if width % factor or height % factor:
        raise ValueError(
            f"the mask has {width}x{height} pixels; make both sides multiples of {factor}"
        )
    blocks = mask.gray().reshape(height // factor, factor, width // factor, factor)
    bright = blocks.max(axis=(1, 3)) > _HALF
    return np.asarray(bright[None, None], dtype=np.float32)


def blurred_mask(mask: InputImage, blur: tuple[int, int]) -> InputImage:
    """Return a mask that is blurred by a Gaussian, in width and then in height.

    Beyond the border it is mirrored at the outermost pixels, and it has 8 bits in between. OpenCV,
    whose weights have 8 bits, makes the edge of a shape up to 3 of 255 levels lighter or darker.

    Args:
        mask: The mask.
        blur: Standard deviation in each direction, in pixels; 0 leaves it sharp.

    Source: `StableDiffusionProcessingImg2Img.init` in `modules/processing.py` of
    AUTOMATIC1111/stable-diffusion-webui 1.10.
    """
    width, height = blur
    gray = _blurred_rows(_blurred_rows(mask.gray(), width).T, height).T
    return InputImage(np.repeat(gray[..., None], 3, axis=2))


def _blurred_rows(gray: UInt8Array, blur: int) -> UInt8Array:
    """Return an image (H, W) whose rows are blurred."""
    radius = int(_REACH * blur + 0.5)
    if not radius:
        return gray
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / blur) ** 2)
    weights /= weights.sum()
    padded = np.pad(gray, ((0, 0), (radius, radius)), mode="reflect")
    rows = [np.rint(np.convolve(row, weights, mode="valid")) for row in padded]
    return np.array(rows, dtype=np.uint8)


def composite(
    original: InputImage,
    generated: Image.Image,
    mask: InputImage,
    *,
    fades_outwards: bool = False,
) -> Image.Image:
    """Return `generated` where the mask is white, and exactly `original` up to one half.

    From one half to white, `generated` fades in linearly, so that a soft edge hides the seam.
    Without this step, the known pixels would have gone through the autoencoder, which changes every
    pixel a little.

    Args:
        original: The image.
        generated: What was generated in its place.
        mask: The mask.
        fades_outwards: Whether `generated` fades in from black to one half instead, beyond the edge
            of what the mask has generated again, as in AUTOMATIC1111's web UI (`mask_for_overlay`).

    Raises:
        ValueError: The three are not of one size.
    """
    sizes = {"image": original.size, "generated image": generated.size, "mask": mask.size}
    if len(set(sizes.values())) > 1:
        named = ", ".join(f"the {name} {size[0]}x{size[1]}" for name, size in sizes.items())
        raise ValueError(f"sizes differ: {named}; make them equal")
    gray = mask.gray().astype(np.float32)
    if fades_outwards:
        share = np.minimum(2 * gray, _WHITE)
    else:
        share = np.rint(np.maximum(gray - _HALF, 0) * (_WHITE / (_WHITE - _HALF)))
    return Image.composite(generated, original.to_image(), Image.fromarray(share.astype(np.uint8)))


def outpaint_canvas(
    image: InputImage, left: int, top: int, right: int, bottom: int
) -> tuple[InputImage, InputImage]:
    """Return an image grown by a number of pixels on each side, and the mask of the new border.

    The new border repeats the edge of the image. The image is encoded together with it, so
    that a border of one colour would shine into the latents along the seam; and wherever sampling
    starts from the image and not from noise alone, this is the likeliest guess.

    The mask is white in the border and black inside, with no gray between: every pixel of the
    image is kept exactly, and a seam softened inwards would not. The model itself makes the two
    meet, because in every step it sees the pixels that are kept.

    Raises:
        ValueError: A number is negative, all are 0, or the canvas becomes too large.
    """
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    for side, count in sides.items():
        if count < 0:
            raise ValueError(f"cannot grow by {count} pixels on the {side}; give 0 or more")
    if not any(sides.values()):
        raise ValueError("nothing to add; give at least one side more than 0 pixels")
    width, height = image.size[0] + left + right, image.size[1] + top + bottom
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"grown to {width}x{height} pixels; at most {MAX_SIDE} per side; add less")
    border = ((top, bottom), (left, right), (0, 0))
    grown = np.pad(image.pixels, border, mode="edge")
    mask = np.pad(np.zeros_like(image.pixels), border, constant_values=255)
    return InputImage(grown), InputImage(mask)
