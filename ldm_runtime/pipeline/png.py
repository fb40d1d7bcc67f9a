"""PNG files with metadata of how they were generated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image, PngImagePlugin

from ldm_runtime.durable import whole_file
from ldm_runtime.errors import LdmError

#: Keyword of the PNG text chunk that holds the metadata, as JSON.
METADATA_KEY = "ldm-deploy"


def save_png(
    image: Image.Image, path: Path, metadata: Mapping[str, Any], *, replace: bool = False
) -> None:
    """Write an image and its metadata; the file appears complete or not at all.

    Args:
        image: The image.
        path: The file.
        metadata: The metadata, as `read_metadata` returns it.
        replace: Whether to replace an existing file.

    Raises:
        FileExistsError: There is a file at `path`, and `replace` is off.
        OSError: The folder cannot be written to.
    """
    text = PngImagePlugin.PngInfo()
    text.add_itxt(METADATA_KEY, msgspec.json.encode(metadata).decode())
    with whole_file(path, replace=replace) as file:
        image.save(file, format="PNG", pnginfo=text)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata that `save_png` wrote into a file.

    Raises:
        LdmError: The file is not a PNG, or has no such metadata.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            assert isinstance(image, PngImagePlugin.PngImageFile)
            text = image.text.get(METADATA_KEY)  # a str with a language
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise LdmError(f"{path} cannot be read as a PNG: {error}") from error
    if text is None:
        raise LdmError(
            f"{path} carries no {METADATA_KEY!r} metadata; `ldm generate` did not make it"
        )
    try:
        return msgspec.json.decode(str(text), type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise LdmError(f"{path}: its {METADATA_KEY!r} metadata is damaged: {error}") from error
