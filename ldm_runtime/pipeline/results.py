"""The result of a request: images, latents, timings, and metadata to generate them again."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import ceil, sqrt
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.bundle.manifest import BuildRecord
from ldm_runtime.errors import RequestError
from ldm_runtime.pipeline.file_names import image_format, is_folder, pattern_paths, save_numbered
from ldm_runtime.pipeline.image_files import FormatName, encode_image_file, save_image
from ldm_runtime.pipeline.infotext import (
    InfotextAdapter,
    InfotextModel,
    model_name,
    write_infotext,
)
from ldm_runtime.pipeline.open_model import AdapterOrigin, Origin
from ldm_runtime.requests.request_json import request_to_json
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.version import version


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Result:
    """The result of a request: a sequence of images, which a notebook shows.

    Attributes:
        images: The images in order; image i has the seed + i.
        request: The resolved request.
        latents: (N, C, h, w) in the UNet's scale, as they were decoded; with the noise that a
            `denoising_end` leaves in them, and for the `latents` of a request that goes on there.
        timings: Seconds in each network that the request took, by the name of its component: the
            UNet and the autoencoder with the code around them, the others alone; and "total"
            from start to end, a stream's consumer included. A refiner's seconds count to the same
            names. With `run_many` the time of a request includes waiting for others.
        bundle_sha256: Hash of the bundle's manifest.
        build: Provenance of the bundle: its checkpoint and what it was made with.
        refiner: Origin of the model that made the last steps, if one did.
        textual_inversions: Hash of the file of every learned word in the prompts, by word.
        adapters: Adapters that were merged into the model.
    """

    images: list[Image.Image]
    request: ResolvedRequest
    latents: npt.NDArray[np.float32]
    timings: Mapping[str, float]
    bundle_sha256: str
    build: BuildRecord
    refiner: Origin | None
    textual_inversions: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[AdapterOrigin, ...] = ()

    @property
    def image(self) -> Image.Image:
        """The only image, or the first."""
        return self.images[0]

    @property
    def seed(self) -> int:
        """The seed of the first image."""
        return self.request.seed

    @property
    def seeds(self) -> list[int]:
        """The seed of every image."""
        return [self.request.of_image(index).seed for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.images)

    def __getitem__(self, index: int) -> Image.Image:
        return self.images[index]

    def __repr__(self) -> str:
        width, height = self.image.size
        plural = "image" if len(self) == 1 else "images"
        parts = [f"{len(self)} {plural} of {width}x{height}"]
        if self.request.passes:
            seeds = sorted({self.seeds[0], self.seeds[-1]})
            parts.append(f"seed{'s' if len(seeds) > 1 else ''} {' to '.join(map(str, seeds))}")
            parts.append(f"{self.request.sampler} {self.request.num_inference_steps} steps")
        return f"Result: {', '.join(parts)}, {self.timings['total']:.1f} s"

    def _repr_png_(self) -> bytes:
        """Return the image as a notebook shows it; several side by side."""
        file = io.BytesIO()
        _sheet(self.images).save(file, format="PNG")
        return file.getvalue()

    def save(self, path: str | Path, index: int | None = None) -> None:
        """Write one image with its `metadata`, which `ldm inspect` shows, and as A1111 writes it.

        An existing file is replaced, in one step; missing folders are made.

        Args:
            path: The file: PNG or WebP, which keep every pixel, or JPEG, by its suffix.
            index: Index of the image; may be left out if there is only one.

        Raises:
            RequestError: There are several images, and no index, or it is another format.
            OSError: The file cannot be written.
        """
        if index is None and len(self) > 1:
            raise RequestError(
                "index", f"this result has {len(self)} images; give one, or use save_all(folder)"
            )
        self._write(index or 0, Path(path), replace=True)

    def save_all(self, target: str | Path) -> list[Path]:
        """Write every image with its metadata, and return the files in the order of the images.

        Args:
            target: A folder, where files are called `0000-seed7.png` from the next free number on
                and none is replaced; or a pattern such as `out/{index:04d}-{seed}.png`, whose files
                are replaced. Missing folders are made.

        Raises:
            RequestError: The pattern is malformed, or gives two images one name.
            OSError: A file cannot be written.
        """
        if is_folder(target):
            writes = [partial(self._write, index) for index in range(len(self))]
            return [
                save_numbered(Path(target), seed, write)
                for seed, write in zip(self.seeds, writes, strict=True)
            ]
        paths = pattern_paths(target, self.seeds)
        for index, path in enumerate(paths):
            self.save(path, index)
        return paths

    def encoded(
        self, index: int = 0, file_format: FormatName = "png", *, quality: int | None = None
    ) -> bytes:
        """Return the bytes of the file of image `index`, as `save` writes it.

        Args:
            index: Index of the image.
            file_format: Format of the file.
            quality: Quality of a JPEG, or of a WebP that is not lossless then, from 0 to 100.

        Raises:
            RequestError: The metadata does not fit into a file of that format.
        """
        image, metadata = self.images[index], self.metadata(index)
        infotext = self.infotext(index)
        return encode_image_file(image, file_format, metadata, infotext, quality=quality)

    def infotext(
        self, index: int = 0, adapter_names: Mapping[str, str] = MappingProxyType({})
    ) -> str | None:
        """Return the text that AUTOMATIC1111's web UI would write into the file of an image.

        None is for a request without a prompt, which that does not know.

        Args:
            index: Index of the image.
            adapter_names: Names of adapters by the hash of their file, where they are called
                otherwise than the file.
        """
        return write_infotext(
            self.request.of_image(index),
            model=_checkpoint(self.build),
            refiner=None if self.refiner is None else _checkpoint(self.refiner.build),
            version=version(),
            textual_inversions=self.textual_inversions,
            adapters=[
                InfotextAdapter(
                    name=adapter_names.get(each.sha256, model_name(each.name)),
                    scale=each.scale,
                    sha256=each.web_ui_sha256,
                )
                for each in self.adapters
            ],
        )

    def metadata(self, index: int = 0) -> dict[str, Any]:
        """Return the metadata of image `index`, from which it can be generated again, alone."""
        refiner = {} if self.refiner is None else {"refiner_sha256": self.refiner.bundle_sha256}
        words = {"textual_inversions": dict(self.textual_inversions)}
        adapters = [
            {"name": each.name, "sha256": each.sha256, "scale": each.scale}
            for each in self.adapters
        ]
        return {
            "request": request_to_json(self.request.of_image(index).as_request()),
            "bundle_sha256": self.bundle_sha256,
            **refiner,
            **(words if self.textual_inversions else {}),
            **({"adapters": adapters} if adapters else {}),
            "version": version(),
        }

    def _write(self, index: int, path: Path, *, replace: bool = False) -> None:
        image_format(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata, infotext = self.metadata(index), self.infotext(index)
        save_image(self.images[index], path, metadata, infotext, replace=replace)


def _checkpoint(build: BuildRecord) -> InfotextModel:
    return InfotextModel(name=model_name(build.checkpoint), sha256=build.checkpoint_sha256)


def _sheet(images: list[Image.Image]) -> Image.Image:
    """Return images of one size in a grid about as wide as it is high."""
    if len(images) == 1:
        return images[0]
    columns = ceil(sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet
