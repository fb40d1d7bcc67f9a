"""Reasons why a path is not a checkpoint that can be opened, and what to give instead."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

#: What a folder is, by a file in it.
_FOLDERS: Mapping[str, str] = MappingProxyType(
    {
        "model_index.json": "is a folder of diffusers, where one file was expected",
        "config.json": "is a folder of one component; give the folder of diffusers that it is in, "
        "which has a model_index.json",
        "manifest.json": "is a bundle already; give the checkpoint that it is to be made of",
    }
)
#: A name such as "runwayml/stable-diffusion-v1-5".
_NAME_OF_A_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def why_not_a_file(path: Path) -> str:
    """Return what to give instead of a folder or a device."""
    found = (fault for name, fault in _FOLDERS.items() if (path / name).is_file())
    return next(
        found,
        "is not a file, nor a folder of diffusers, which has a model_index.json; "
        "give the checkpoint itself",
    )


def why_not_opened(path: Path, error: OSError | ValueError) -> str:
    """Return why a file cannot be opened; nothing is fetched from anywhere."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, FileNotFoundError) and _looks_remote(path):
        return f"cannot be opened: {reason}; nothing is fetched, so download the file first"
    return f"cannot be opened: {reason}"


def _looks_remote(path: Path) -> bool:
    """Return whether a path reads like an address, or like a model's name on a hub."""
    text = str(path)
    is_name = _NAME_OF_A_HUB.fullmatch(text) is not None
    return ":/" in text or (is_name and path.suffix.lower() not in _SUFFIXES)
