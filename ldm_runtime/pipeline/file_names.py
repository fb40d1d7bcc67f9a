"""Names of image files: the next free number of a folder, or a pattern with {index} and {seed}."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Formatter
from types import MappingProxyType

from ldm_runtime.errors import RequestError

#: Suffixes of image files. Any other name without a pattern is that of a folder.
IMAGE_SUFFIXES = frozenset(
    {
        *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif", ".jp2", ".jxl", ".ppm", ".tga"),
    }
)

#: Formats that are written, by suffix.
_FORMATS: Mapping[str, str] = MappingProxyType(
    {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
)
_NUMBER = re.compile(r"(\d{4,})-")
_PLACEHOLDERS = ("index", "seed")


def is_folder(target: str | os.PathLike[str]) -> bool:
    """Return whether images go into a folder of that name, and not into files named after it.

    It is a folder if it exists as one or ends with a slash, or else if it has neither a placeholder
    in braces nor the suffix of an image.
    """
    text = os.fspath(target)
    if text.endswith(os.sep) or Path(text).is_dir():
        return True
    return "{" not in text and Path(text).suffix.lower() not in IMAGE_SUFFIXES


def image_format(path: str | os.PathLike[str]) -> str:
    """Return Pillow's name of the format that a file's suffix stands for.

    Raises:
        RequestError: No image is written in that format.
    """
    suffix = Path(path).suffix
    if suffix.lower() not in _FORMATS:
        found = f"the suffix {suffix!r}" if suffix else "no suffix"
        raise RequestError(
            "path", f"{os.fspath(path)!r} has {found}; images are saved as .png, .jpg or .webp"
        )
    return _FORMATS[suffix.lower()]


def pattern_paths(pattern: str | os.PathLike[str], seeds: Sequence[int]) -> list[Path]:
    """Return the path of every image, such as `out/0003-42.png` for `out/{index:04d}-{seed}.png`.

    Args:
        pattern: A path with {index}, which counts images from 0, and {seed}, if need be with
            Python's format specifications. Two braces stand for one.
        seeds: The seed of every image.

    Raises:
        RequestError: The pattern has another placeholder, is malformed, gives two images one path,
            or has the suffix of no format that is written.
    """
    text = os.fspath(pattern)
    _check_placeholders(text)
    try:
        paths = [Path(text.format(index=index, seed=seed)) for index, seed in enumerate(seeds)]
    except ValueError as error:
        raise RequestError("path", f"{text!r} is not a valid pattern: {error}") from error
    for path in paths:
        image_format(path)
    if len(set(paths)) < len(paths):
        raise RequestError(
            "path", f"{text!r} gives several of {len(paths)} images one name; put {{index}} into it"
        )
    return paths


def save_numbered(folder: Path, seed: int, save: Callable[[Path], None]) -> Path:
    """Save an image as `0000-seed7.png` under the next free number of a folder; return its path.

    Args:
        folder: The folder; it is made if it is missing.
        seed: The seed of the image.
        save: Writes the file that it is given, or raises `FileExistsError` if there is one.

    Raises:
        OSError: The folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = (_NUMBER.match(path.name) for path in folder.iterdir())
        number = 1 + max((int(found[1]) for found in numbers if found), default=-1)
        path = folder / f"{number:04d}-seed{seed}.png"
        try:
            save(path)
        except FileExistsError:
            continue  # another process took the number
        return path


def _check_placeholders(pattern: str) -> None:
    try:
        parts = list(Formatter().parse(pattern))
    except ValueError as error:
        raise RequestError(
            "path", f"{pattern!r} is not a valid pattern: {error}; write {{{{ for a brace"
        ) from error
    for _, name, spec, conversion in parts:
        if name is not None and (name not in _PLACEHOLDERS or conversion or "{" in (spec or "")):
            raise RequestError(
                "path",
                f"{pattern!r} has the placeholder {{{name}}}; give {{index}} and {{seed}}, "
                "as in 'out/{index:04d}-{seed}.png'",
            )
        if spec and spec.endswith("c"):
            raise RequestError(
                "path",
                f"{pattern!r} has the placeholder {{{name}:{spec}}}, which makes a character of a "
                f"number; write {{{name}}}",
            )
