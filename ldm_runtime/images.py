"""Between latents and pixels, and from pixels to files that say how they were made."""

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
from ldm_runtime.patches import over_patches, runs_in_patches
from ldm_runtime.pictures import Picture
from ldm_runtime.tiles import decode_tiled

#: Keyword of the PNG text chunk that holds the metadata, as JSON.
METADATA_KEY = "ldm-deploy"

Float32Array = npt.NDArray[np.float32]


def encode_image(engine: Runner, pixels: npt.NDArray[np.uint8], spec: ModelSpec) -> Float32Array:
    """Return the latents (B, C, h, w) of pictures, in the UNet's scale; see `encode_pixels`.

    Args:
        engine: The autoencoder's encoder.
        pixels: RGB, (B, H, W, 3).
        spec: The model.

    Raises:
        ValueError: A side is not a multiple of the autoencoder's factor.
    """
    scale = float(spec.autoencoder.latent_scale_factor)
    return encode_pixels(engine, to_float(pixels), spec) * scale


def encode_pixels(engine: Runner, image: Float32Array, spec: ModelSpec) -> Float32Array:
    """Return the latents (B, C, h, w) of pictures (B, 3, H, W) from -1 to 1, in their own scale.

    Of a KL autoencoder these are the means of its posterior. CompVis and diffusers draw from it
    instead; its deviation is small beside the noise that sampling adds, and a mean is the same
    every time. Of a VQ autoencoder they are what comes before the codebook, as CompVis has it.

    Args:
        engine: The autoencoder's encoder.
        image: The pictures.
        spec: The model.

    Raises:
        ValueError: A side is not a multiple of the autoencoder's factor.
    """
    factor = spec.autoencoder.factor
    height, width = image.shape[2:]
    if height % factor or width % factor:
        raise ValueError(
            f"the picture has {width}x{height} pixels; make both sides multiples of {factor}"
        )
    moments: Float32Array = engine.run({"image": image})["moments"]
    mean: Float32Array = moments[:, : spec.autoencoder.embed_dim]
    return mean


def to_float(pixels: npt.NDArray[np.uint8]) -> Float32Array:
    """Turn bytes (B, H, W, 3) into (B, 3, H, W) from -1 to 1."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / 127.5 - 1


def resize(picture: Picture, width: int, height: int) -> Picture:
    """Return a picture of another size, by Lanczos' filter; the same one if it has that size.

    It is stretched if the sides are in another proportion; cropping is left to the caller.
    """
    if picture.size == (width, height):
        return picture
    resized = picture.to_image().resize((width, height), Image.Resampling.LANCZOS)
    return Picture(np.asarray(resized))


def decode_latents(
    engine: Runner, latents: Float32Array, spec: ModelSpec, tile_size: int = 0
) -> list[Image.Image]:
    """Return the pictures of the UNet's latents (B, C, h, w).

    Args:
        engine: The autoencoder's decoder.
        latents: Latents in the UNet's scale, as `sampling.sample_latents` ends with.
        spec: The model.
        tile_size: Side in pixels of the tiles to decode in, one image at a time; 0 decodes the
            whole batch at once. Models that enlarge decode in the patches of `patches` instead.

    Raises:
        ValueError: The tile size is not a multiple of the autoencoder's factor, or too small.
    """
    latents = latents / float(spec.autoencoder.latent_scale_factor)
    factor = spec.autoencoder.factor
    if tile_size % factor:
        raise ValueError(f"tile_size {tile_size} is not a multiple of {factor}; make it one")

    def decode(part: Float32Array) -> Float32Array:
        return engine.run({"latents": part})["image"]

    if runs_in_patches(spec):
        image = over_patches(decode, latents, factor)
    elif tile_size:
        image = decode_tiled(decode, latents, factor, tile_size // factor)
    else:
        image = decode(latents)
    return [Image.fromarray(each) for each in to_uint8(image)]


def to_uint8(image: Float32Array) -> npt.NDArray[np.uint8]:
    """Turn (B, 3, H, W) from -1 to 1 into (B, H, W, 3) bytes, clipping and then rounding.

    Rounding, not truncating, is what diffusers does; CompVis truncates.
    """
    unit = np.clip(image / 2 + 0.5, 0.0, 1.0)
    return np.ascontiguousarray(np.rint(unit * 255).astype(np.uint8).transpose(0, 2, 3, 1))


def save_png(
    image: Image.Image, path: Path, metadata: Mapping[str, Any], *, replace: bool = False
) -> None:
    """Write a picture and its metadata; the file appears complete or not at all.

    Args:
        image: The picture.
        path: The file.
        metadata: What `read_metadata` returns.
        replace: Whether to replace what is there.

    Raises:
        FileExistsError: There is something at `path` that is not to be replaced.
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
        if replace:
            temporary.replace(path)
        else:
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
    except (msgspec.DecodeError, RecursionError) as error:
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
