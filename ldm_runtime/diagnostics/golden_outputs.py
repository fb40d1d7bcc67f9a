"""Golden outputs of a bundle: requests with the latents and images that torch made of them."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.bundle.files import checked_file
from ldm_runtime.bundle.manifest import Manifest
from ldm_runtime.diagnostics.golden_requests import (
    ATTACHMENTS,
    REQUEST_FILE,
    load_golden_request,
)
from ldm_runtime.errors import BundleError
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.resolved import ResolvedRequest

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class GoldenOutput:
    """A golden request and what torch made of it.

    Attributes:
        name: Its folder.
        request: The request.
        latents: Its latents (N, C, h, w).
        images: Its images (H, W, 3), uint8.
    """

    name: str
    request: ResolvedRequest
    latents: Array
    images: list[Array]


def load_golden_output(bundle: Path, manifest: Manifest, folder: str) -> GoldenOutput:
    """Read a golden request with its outputs.

    Args:
        bundle: The bundle's folder.
        manifest: Its manifest.
        folder: One of `manifest.golden`.

    Raises:
        BundleError: A file is missing, altered or malformed.
    """
    locate = partial(checked_file, bundle, manifest, hashed=False)
    request = load_golden_request(locate(f"{folder}/{REQUEST_FILE}").parent)
    for name, file in ATTACHMENTS.items():
        if getattr(request, name) is not None:
            locate(f"{folder}/{file}")
    path = locate(f"{folder}/golden.npz")
    with readable(path), np.load(path, allow_pickle=False) as arrays:
        latents = arrays["latents"]
    images = []
    for index in range(request.num_images):
        path = locate(f"{folder}/{index}.png")
        with readable(path), Image.open(path, formats=["PNG"]) as image:
            images.append(np.asarray(image))
    return GoldenOutput(
        name=folder, request=resolve(request, manifest.spec), latents=latents, images=images
    )


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a golden file is read into one sentence.

    Raises:
        BundleError: The file is malformed.
    """
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} is malformed: {error}; export the bundle again") from error
