"""The units of a batch: images, each with the request that generates it alone."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import msgspec

from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import MANIFEST_NAME, load_manifest
from ldm_runtime.cli.request_lines import at_line, is_json, requests_of_lines
from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.reading import without_byte_order_mark
from ldm_runtime.requests.request import MAX_IMAGES, GenerationRequest
from ldm_runtime.requests.request_json import request_to_json
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.tasks import task_record
from ldm_serve.adapters import (
    AdapterChoices,
    AdapterUse,
    NamedAdapter,
    chosen_adapters,
    fitting_adapters,
)

#: Field of a line with adapters.
_ADAPTERS = "adapters"
#: Open seeds lie below: torch's generator uses 32 bits, and every image needs one.
_OPEN_SEEDS = 2**32 - MAX_IMAGES
#: Bytes of a file that are read to tell JSON from prompts.
_HEAD_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One image of a batch.

    Attributes:
        line: Number of the line that asks for it, from 1.
        image: Its index in the request of that line.
        request: The request of this image alone; a pure function of the file and the batch's seed.
        name: Hash of that request, of the bundle and of the adapters.
        bundle_sha256: Hash of the bundle's manifest.
        adapters: The adapters of its model.
    """

    line: int
    image: int
    request: ResolvedRequest
    name: str
    bundle_sha256: str
    adapters: tuple[AdapterUse, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BatchModel:
    """The model of a batch, as far as its manifest says.

    Attributes:
        spec: What it is.
        bundle_sha256: Hash of its manifest.
        adapters: The adapters that lines can name.
    """

    spec: ModelSpec
    bundle_sha256: str
    adapters: Mapping[str, NamedAdapter] = field(default_factory=dict)

    @classmethod
    def of_bundle(
        cls,
        folder: Path,
        adapters: Mapping[str, Path] = MappingProxyType({}),
        *,
        live_adapters: bool = False,
    ) -> "BatchModel":
        """Read the manifest of a bundle, and the files of adapters by name.

        Args:
            folder: The bundle.
            adapters: The files.
            live_adapters: Whether they are to be inputs of the networks.

        Raises:
            BundleError: The folder is not a bundle.
            RequestError: An adapter cannot be read, or does not fit it.
        """
        spec = load_manifest(folder).spec
        bundles = {folder.name: folder}
        fitting = fitting_adapters(adapters, bundles, live=live_adapters)[folder.name]
        return cls(spec=spec, bundle_sha256=sha256_of(folder / MANIFEST_NAME), adapters=fitting)


class RequestFile:
    """A file with a request per line, of which one is in memory at a time.

    Every iteration reads the file from its beginning and yields the same units. What is added to it
    after the first has begun is not read.

    Args:
        path: The file, as `ldm generate --requests` reads it.
        model: The model.
        batch_seed: Decides the seeds that requests leave open, together with their lines.

    Raises:
        RequestError: It is not a file.
    """

    def __init__(self, path: Path, model: BatchModel, batch_seed: int) -> None:
        if not path.is_file():
            raise RequestError(
                "requests", f"{path} is not a file; give one with a request per line"
            )
        self._path, self._model, self._batch_seed = path, model, batch_seed
        self._size = path.stat().st_size

    def __iter__(self) -> Iterator[Unit]:
        """Yield the images in the order of the lines.

        Raises:
            RequestError: A line is not a request that the model can do, or there is none.
            OSError: The file cannot be read.
        """
        with self._path.open("rb") as file:
            head = self._without_mark(file.read(_HEAD_BYTES))
        has_json = is_json(str(self._path), head)
        lines = requests_of_lines(
            self._lines(), str(self._path), is_json=has_json, others=(_ADAPTERS,)
        )
        for line in lines:
            with at_line(line.place):
                seeded = self._with_seeds(line.request, line.number)
                request = resolve(seeded, self._model.spec)
                adapters = self._adapters(line.others.get(_ADAPTERS))
            yield from self._units(request, adapters, line.number)

    def _lines(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            yield self._without_mark(file.readline(self._size))
            while line := file.readline(max(0, self._size - file.tell())):
                yield line

    def _without_mark(self, data: bytes) -> bytes:
        try:
            return without_byte_order_mark(data, str(self._path))
        except ValueError as error:
            raise RequestError("requests", str(error)) from error

    def _with_seeds(self, request: GenerationRequest, line: int) -> GenerationRequest:
        """Fill in open seeds: the same in every run, and others for every line."""
        if not task_record(self._model.spec).samples:
            return request
        if request.seed is None:
            request = replace(request, seed=self._open_seed("seed", line))
        if request.is_variation and request.variation_seed is None:
            request = replace(request, variation_seed=self._open_seed("variation_seed", line))
        return request

    def _open_seed(self, field: str, line: int) -> int:
        digest = hashlib.sha256(f"{self._batch_seed} {field} {line}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % _OPEN_SEEDS

    def _adapters(self, value: object) -> tuple[AdapterUse, ...]:
        """Return the adapters that a line names."""
        try:
            choices = msgspec.convert(value, AdapterChoices | None)
        except msgspec.ValidationError as error:
            raise RequestError(_ADAPTERS, f"cannot be read: {error}") from error
        return () if choices is None else chosen_adapters(choices, self._model.adapters, _ADAPTERS)

    def _units(
        self, request: ResolvedRequest, adapters: tuple[AdapterUse, ...], line: int
    ) -> Iterator[Unit]:
        bundle_sha256 = self._model.bundle_sha256
        for image in range(request.num_images):
            alone = request.of_image(image)
            yield Unit(
                line=line,
                image=image,
                request=alone,
                name=request_sha256(alone, bundle_sha256, adapters),
                bundle_sha256=bundle_sha256,
                adapters=adapters,
            )


def request_sha256(
    request: ResolvedRequest, bundle_sha256: str, adapters: Sequence[AdapterUse] = ()
) -> str:
    """Return the hexadecimal sha256 of a request to a bundle with adapters.

    It is that of the JSON of all with sorted keys and without spaces: of the request the fields
    that are not at their defaults, images and maps by their own hashes, as in the metadata of an
    image, and of adapters the hashes of their files and their scales, if there are any. It does not
    depend on the backend, on the precision or on who asks.
    """
    fields, usual = request_to_json(request.as_request()), request_to_json(GenerationRequest())
    given = {name: value for name, value in fields.items() if value != usual[name]}
    text: dict[str, object] = {"bundle_sha256": bundle_sha256, "request": given}
    if adapters:
        text["adapters"] = [{"sha256": each.sha256, "scale": each.scale} for each in adapters]
    return hashlib.sha256(msgspec.json.encode(text, order="sorted")).hexdigest()
