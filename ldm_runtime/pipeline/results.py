"""The result of a request: images, latents, timings, and metadata to generate them again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.pipeline.png import save_png
from ldm_runtime.requests.request import request_to_json
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.version import version


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The result of a request.

    Attributes:
        images: The images in order; image i has the seed + i.
        request: The resolved request.
        latents: (N, C, h, w) in the UNet's scale, as they were decoded.
        timings: Seconds in each network that the request took, by the name of its component: the
            UNet and the autoencoder with the code around them, the others alone; and "total"
            from start to end, a stream's consumer included. With `run_many` the time of a request
            includes waiting for others.
        bundle_sha256: Hash of the bundle's manifest.
    """

    images: list[Image.Image]
    request: ResolvedRequest
    latents: npt.NDArray[np.float32]
    timings: Mapping[str, float]
    bundle_sha256: str

    def save(self, path: str | Path, index: int = 0) -> None:
        """Write an image as PNG with its `metadata`, which `ldm inspect` shows.

        An existing file is replaced, in one step.

        Raises:
            OSError: The folder cannot be written to.
        """
        save_png(self.images[index], Path(path), self.metadata(index), replace=True)

    def metadata(self, index: int) -> dict[str, Any]:
        """Return the metadata of image `index`, from which it can be generated again, alone."""
        return {
            "request": request_to_json(self.request.of_image(index).as_request()),
            "bundle_sha256": self.bundle_sha256,
            "version": version(),
        }
