"""From latents to pixels to files that say how they were made."""

import errno
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from ldm_runtime.backends import Runner
from ldm_runtime.errors import LdmError
from ldm_runtime.manifest import ModelSpec

#: Keyword of the PNG text chunk that holds the metadata, as JSON.
METADATA_KEY = "ldm-deploy"

Float32Array = npt.NDArray[np.float32]


def decode_latents(engine: Runner, latents: Float32Array, spec: ModelSpec) -> list[Image.Image]:
    """Return the pictures of the UNet's latents (B, C, h, w).

    Args:
        engine: The autoencoder's decoder.
        latents: Latents in the UNet's scale, as `generator.sample_latents` ends with.
        spec: The model.
    """
    latents = latents / float(spec.autoencoder.latent_scale_factor)
    pixels = to_uint8(engine.run({"latents": latents})["image"])
    return [Image.fromarray(each) for each in pixels]


def to_uint8(image: Float32Array) -> npt.NDArray[np.uint8]:
    """Turn (B, 3, H, W) from -1 to 1 into (B, H, W, 3) bytes, clipping and then rounding.

    Rounding, not truncating, is what diffusers does; CompVis truncates.
    """
    unit = np.clip(image / 2 + 0.5, 0.0, 1.0)
    return np.ascontiguousarray(np.rint(unit * 255).astype(np.uint8).transpose(0, 2, 3, 1))


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a picture and its metadata; the file appears complete or not at all.

    Raises:
        FileExistsError: There is something at `path`; it is left as it is.
        OSError: The folder cannot be written to.
    """
    text = PngImagePlugin.PngInfo()
    text.add_itxt(METADATA_KEY, msgspec.json.encode(metadata).decode())
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            image.save(file, format="PNG", pnginfo=text)
            file.flush()
            os.fsync(file.fileno())
        _rename_without_replacing(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what `save_png` wrote into a file.

    Raises:
        LdmError: The file is no PNG, or not one of ours.
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
    except msgspec.DecodeError as error:
        raise LdmError(f"{path}: its {METADATA_KEY!r} metadata is damaged: {error}") from error


def _rename_without_replacing(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, this never replaces a file
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.rename(path)
