"""Masks as OpenAI's API has them: transparent pixels are to be changed."""

import io

from PIL import Image, ImageChops

from ldm_runtime.inputs.reading import NamedBytes, decode_image, load_image
from ldm_serve.errors import invalid


def edit_mask(data: bytes) -> bytes:
    """Return the mask of a `GenerationRequest`, white where pixels are to be changed, as a PNG.

    Args:
        data: A PNG or WebP with an alpha channel.

    Raises:
        ServeError: It is not one.
    """

    def alpha(image: Image.Image) -> Image.Image:
        load_image(image, "the mask")
        if not image.has_transparency_data:
            raise ValueError("the mask has no alpha channel; make the pixels to change transparent")
        return ImageChops.invert(image.convert("RGBA").getchannel("A"))

    named = NamedBytes(data, "the mask", None)
    try:
        mask = decode_image(named, ("PNG", "WEBP"), "is not a PNG or WebP", alpha)
    except ValueError as error:
        raise invalid("mask", f"mask: {error}") from error
    file = io.BytesIO()
    mask.save(file, format="PNG")
    return file.getvalue()
