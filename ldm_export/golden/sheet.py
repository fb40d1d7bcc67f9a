"""The contact sheet of a bundle's golden images, for a person to look at."""

import math
from collections.abc import Sequence

from PIL import Image

_GAP = 8  # pixels
_PAPER = (255, 255, 255)


def contact_sheet(images: Sequence[Image.Image]) -> Image.Image:
    """Return images side by side in rows, each in the upper left corner of a cell of its own.

    Cells are as large as the largest image; there are as many columns as rows, or one more.

    Args:
        images: At least one, of any sizes.
    """
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width = max(image.width for image in images) + _GAP
    height = max(image.height for image in images) + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), _PAPER)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (_GAP + column * width, _GAP + row * height))
    return sheet
