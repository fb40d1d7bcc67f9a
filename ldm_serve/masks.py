"""Masks as OpenAI's API and AUTOMATIC1111's have them, as masks of a `GenerationRequest`."""

import io
from collections.abc import Callable

from PIL import Image, ImageChops

from ldm_runtime.inputs.images import FORMATS, InputImage
from ldm_runtime.inputs.reading import NamedBytes, data_of_url, decode_image, load_image
from ldm_serve.errors import invalid

_OPAQUE = (255, 255)


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

    return _converted(data, ("PNG", "WEBP"), "is not a PNG or WebP", alpha)


def web_ui_mask(url: str, *, invert: bool) -> bytes:
    """Return the mask of a `GenerationRequest` from one of AUTOMATIC1111's web UI, as a PNG.

    White pixels are to be changed; of an image with transparent parts, those that are not
    transparent are. Source: `create_binary_mask` in `modules/processing.py` of the web UI.

    Args:
        url: The image as a `data:` URL.
        invert: Whether it is the other way round.

    Raises:
        ServeError: It is not an image.
    """

    def mask(image: Image.Image) -> Image.Image:
        load_image(image, "the mask")
        found = _alpha(image) or Image.fromarray(InputImage.read(image).gray())
        return ImageChops.invert(found) if invert else found

    try:
        data = data_of_url(url)
    except ValueError as error:
        raise invalid("mask", "mask: is not an image in base64") from error
    return _converted(data, FORMATS, "is not a readable image", mask)


def _alpha(image: Image.Image) -> Image.Image | None:
    """Return how opaque the pixels of an image are, or None if all are."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == _OPAQUE else alpha


def _converted(
    data: bytes,
    formats: tuple[str, ...],
    unreadable: str,
    convert: Callable[[Image.Image], Image.Image],
) -> bytes:
    try:
        mask = decode_image(NamedBytes(data, "the mask", None), formats, unreadable, convert)
    except ValueError as error:
        raise invalid("mask", f"mask: {error}") from error
    file = io.BytesIO()
    mask.save(file, format="PNG")
    return file.getvalue()
