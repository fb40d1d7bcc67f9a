"""`quantize_bundle`: 8-bit graphs added to a bundle, as few layers left out as images allow.

The graphs are over the weights that the bundle has already. They appear in it complete or not at
all: the manifest never names a file that is missing or outdated.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends import Backend, BackendName, choose_backend, get_backend
from ldm_runtime.backends.contract import Engine, EngineSource, Runner, RunOptions
from ldm_runtime.backends.networks import FiniteOutputs
from ldm_runtime.bundle.files import check_file, checked_file, sha256_of
from ldm_runtime.bundle.manifest import (
    MANIFEST_NAME,
    ComponentRecord,
    FileRecord,
    GraphRecord,
    Manifest,
    QuantizationRecord,
    encode_manifest,
    load_manifest,
    without_int8,
)
from ldm_runtime.bundle.quantized_graphs import (
    CANDIDATE_FILE,
    GRAPH_FILE,
    Layer,
    Range,
    layers_of,
    quantized_graph,
)
from ldm_runtime.conditioning import open_tokenizer
from ldm_runtime.diagnostics.golden_outputs import load_golden_output
from ldm_runtime.diagnostics.golden_requests import golden_latents
from ldm_runtime.diagnostics.measures import psnr
from ldm_runtime.durable import locked_folder, remove_stale_parts, write_file
from ldm_runtime.errors import BundleError
from ldm_runtime.latents.codec import decode_latents
from ldm_runtime.pipeline.passes import ImagePasses, open_passes
from ldm_runtime.progress import Progress, Silent
from ldm_runtime.quantization.recording import RangeRecorder, most_expensive_first, open_recorder
from ldm_runtime.quantization.requests import SampleOptions, make_samples
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.text import Tokenizer

_UNET = "unet"
#: Networks whose layers are those of the UNet.
_DENOISERS = (_UNET, "unet_shallow")
_REFERENCE = "onnxruntime"
#: Most of the layers that may be left out, as a fraction; with more, 8 bits are not worth it.
_MOST_KEPT = 0.5
#: Of the layers, how finely the number of those that are left out is chosen.
_FINENESS = 1 / 16
_MOST_PSNR = 100.0  # of equal images it is infinite, which JSON does not have

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions:
    """How the 8-bit graphs of a bundle are made.

    Attributes:
        backend: Backend whose images are compared; it has to run graphs in 8 bits.
        threads: Compute threads; None is one per physical core that this process may use.
        samples: The requests.
        least_psnr: Least PSNR of any compared image, in decibels.
    """

    backend: BackendName = "auto"
    threads: int | None = None
    samples: SampleOptions = field(default_factory=SampleOptions)
    least_psnr: float = 25.0


def quantize_bundle(
    bundle: str | Path, options: QuantizationOptions, *, progress: Progress | None = None
) -> Manifest:
    """Measure a bundle's UNet, and add graphs of it in 8 bits, or replace those that it has.

    The ranges of activations are those of whole requests, in fp32. Images in 8 bits are compared
    with torch's golden images and with others in fp32; as long as one is less like it than was
    asked for, layers that 8 bits cost most are left out.

    Args:
        bundle: Folder made by `ldm-export`.
        options: How the graphs are made.
        progress: Told about every step.

    Returns:
        The bundle's new manifest.

    Raises:
        BundleError: The bundle is incomplete or altered, or has no UNet or no golden outputs;
            another process holds it; or images are less like those in fp32 than was asked for even
            if half of the layers is left out.
        BackendError: The backend cannot run graphs in 8 bits here.
        RequestError: A prompt or the number of steps is not one that the model takes, or there are
            prompts for a model that takes none.
        ValueError: No image is to be measured or compared.
    """
    folder = Path(bundle).resolve()
    load_manifest(folder)  # raises if this is not a bundle
    with _locked(folder):
        manifest = load_manifest(folder)
        if manifest.spec.unet is None or not manifest.golden:
            raise BundleError(
                f"{folder} has no UNet, or no golden outputs to compare 8 bits with; quantise a "
                "bundle of a model that samples images"
            )
        _remove_leftovers(folder)
        manifest = without_int8(manifest)
        for record in manifest.files:
            check_file(folder, record)
        get_backend(_REFERENCE)
        name = choose_backend(options.backend, None, options=RunOptions(precision="int8"))
        quantization = _Quantization(
            bundle=folder,
            manifest=manifest,
            backend=name,
            options=options,
            progress=progress or Silent(),
        )
        return quantization.run()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Comparison:
    """A request, and its images in fp32."""

    request: ResolvedRequest
    images: list[Image]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Quantization:
    """The quantisation of one bundle.

    Attributes:
        bundle: Its folder.
        manifest: Its manifest without 8-bit graphs.
        backend: Name of the backend whose images are compared.
        options: How the graphs are made.
        progress: Told about every step.
    """

    bundle: Path
    manifest: Manifest
    backend: str
    options: QuantizationOptions
    progress: Progress

    def run(self) -> Manifest:
        """Measure, choose, and write."""
        load = partial(load_golden_output, self.bundle, self.manifest)
        goldens = [load(each) for each in self.manifest.golden]
        samples = make_samples(goldens, self.manifest.spec, self.options.samples)
        source = self._source(self.manifest, _REFERENCE, _UNET)
        layers = layers_of(source.graph("fp32"))
        if not layers:
            raise BundleError(
                f"the UNet of {self.bundle} has no convolution or matrix product with a weight of "
                "its own, so nothing can be in 8 bits; run it in another precision"
            )
        with ExitStack() as opened:
            network = _Networks(self._open(self.manifest, _REFERENCE), opened)
            engine = opened.enter_context(open_recorder(source, layers))
            outputs = [each.name for each in source.component.outputs]
            recorder = RangeRecorder(engine, outputs, layers)
            unet = FiniteOutputs(name=_UNET, runner=recorder)
            with self._step("ranges"):
                for request in samples.measured:
                    golden_latents(unet, self._passes(network, request))
            recorder.is_recording = False
            with self._step("fp32 images"):
                compared = [
                    _Comparison(request=each.request, images=each.images) for each in goldens
                ]
                for request in samples.compared:
                    passes = self._passes(network, request)
                    images = self._images(unet, network, passes)
                    compared.append(_Comparison(request=request, images=images))
        chosen, values = self._chosen(source, recorder, compared)
        record = QuantizationRecord(
            layers=len(chosen),
            kept=tuple(layer.weight for layer in layers if layer not in chosen),
            calls=recorder.calls,
            least_psnr=self.options.least_psnr,
            backend=self.backend,
            psnr=tuple(min(round(each, 2), _MOST_PSNR) for each in values),
        )
        return self._publish(chosen, record)

    def _chosen(
        self, source: EngineSource, recorder: RangeRecorder, compared: Sequence[_Comparison]
    ) -> tuple[Mapping[Layer, Range], list[float]]:
        """Return the layers in 8 bits, with their ranges, and the PSNR of every image."""
        ranges, least = recorder.ranges, self.options.least_psnr
        found = self._psnr(ranges, compared)
        if min(found) >= least:
            return ranges, found
        with self._step("layers"):
            ordered = most_expensive_first(source, ranges, recorder.inputs)

        def without(count: int) -> Mapping[Layer, Range]:
            return {layer: ranges[layer] for layer in ordered[count:]}

        most = int(len(ordered) * _MOST_KEPT)
        step = max(1, round(len(ordered) * _FINENESS))
        best = self._psnr(without(most), compared)
        if min(best) < least:
            raise BundleError(
                f"in 8 bits, images of {self.bundle} have a PSNR of {min(best):.1f} dB to those in "
                f"fp32 even with {most} of {len(ordered)} layers in higher precision, less than "
                f"{least:g} dB; ask for less, or measure with other prompts and more images"
            )
        too_few, enough = 0, most
        while enough - too_few > step:
            middle = (too_few + enough) // 2
            values = self._psnr(without(middle), compared)
            if min(values) >= least:
                enough, best = middle, values
            else:
                too_few = middle
        return without(enough), best

    def _psnr(self, ranges: Mapping[Layer, Range], compared: Sequence[_Comparison]) -> list[float]:
        """Return the PSNR of images of which some layers are in 8 bits to those in fp32."""
        values = []
        with (
            self._step(f"{len(ranges)} layers"),
            self._candidate(ranges) as manifest,
            ExitStack() as opened,
        ):
            network = _Networks(self._open(manifest, self.backend), opened)
            for each in compared:
                passes = self._passes(network, each.request)
                images = self._images(network(_UNET), network, passes)
                values += [psnr(*pair) for pair in zip(images, each.images, strict=True)]
        return values

    def _passes(self, network: "_Networks", request: ResolvedRequest) -> ImagePasses:
        return open_passes(network, self._tokenizer(), request, self.manifest.spec)

    def _tokenizer(self) -> Tokenizer | None:
        path = self.manifest.tokenizer_file
        if path is None:
            return None
        file = checked_file(self.bundle, self.manifest, path, hashed=False)
        return open_tokenizer(file, self.manifest.spec)

    def _images(self, unet: Runner, network: "_Networks", passes: ImagePasses) -> list[Image]:
        latents = golden_latents(unet, passes)
        decoder = network("vae_decoder")
        return [
            np.asarray(image)
            for index in range(len(latents))
            for image in decode_latents(decoder, latents[index : index + 1], self.manifest.spec)
        ]

    def _open(self, manifest: Manifest, backend: str) -> Callable[[str], Engine]:
        module: Backend = get_backend(backend)
        return lambda name: module.open_engine(self._source(manifest, backend, name))

    def _source(self, manifest: Manifest, backend: str, name: str) -> EngineSource:
        is_candidate = manifest.quantization is not None
        precision = "int8" if is_candidate else get_backend(backend).ABILITIES.variant
        return EngineSource(
            bundle=self.bundle,
            manifest=manifest,
            component=manifest.component(name),
            threads=self.options.threads,
            check_hashes=False,
            options=RunOptions(precision=precision),
        )

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        self.progress.begin(name)
        yield
        self.progress.end(name, "measured")

    @contextmanager
    def _candidate(self, ranges: Mapping[Layer, Range]) -> Iterator[Manifest]:
        """Write the graph of the UNet under a name that nothing else knows, for a while."""
        path = self.bundle / _UNET / CANDIDATE_FILE
        component = self.manifest.component(_UNET)
        try:
            write_file(path, self._graph(component, ranges))
            record = QuantizationRecord(
                layers=len(ranges), kept=(), calls=0, least_psnr=0.0, backend="", psnr=()
            )
            yield _with(self.manifest, self.bundle, {_UNET: path}, record)
        finally:
            path.unlink(missing_ok=True)

    def _graph(self, component: ComponentRecord, ranges: Mapping[Layer, Range]) -> bytes:
        """Return a graph of a component with the layers in 8 bits that it has of the UNet's."""
        source = self._source(self.manifest, _REFERENCE, component.name)
        path, by_weight = source.graph("fp32"), {each.weight: ranges[each] for each in ranges}
        own = {
            layer: by_weight[layer.weight] for layer in layers_of(path) if layer.weight in by_weight
        }
        return quantized_graph(path, self.bundle / component.weights_file, own)

    def _publish(self, ranges: Mapping[Layer, Range], record: QuantizationRecord) -> Manifest:
        """Write the graphs and list them; first a manifest without those that are replaced."""
        self._write_manifest(self.manifest)
        paths = {}
        for component in self.manifest.components:
            if component.name in _DENOISERS:
                paths[component.name] = self.bundle / component.name / GRAPH_FILE
                write_file(paths[component.name], self._graph(component, ranges))
        published = _with(self.manifest, self.bundle, paths, record)
        self._write_manifest(published)
        return published

    def _write_manifest(self, manifest: Manifest) -> None:
        write_file(self.bundle / MANIFEST_NAME, encode_manifest(manifest))


class _Networks:
    """Networks by name, each opened by the first call for it and closed with a stack.

    Args:
        open_engine: Opens a component.
        opened: What closes it.
    """

    def __init__(self, open_engine: Callable[[str], Engine], opened: ExitStack) -> None:
        self._open_engine, self._opened = open_engine, opened
        self._networks: dict[str, FiniteOutputs] = {}

    def __call__(self, name: str) -> FiniteOutputs:
        if name not in self._networks:
            engine: Any = self._opened.enter_context(self._open_engine(name))
            self._networks[name] = FiniteOutputs(name=name, runner=engine)
        return self._networks[name]


def _with(
    manifest: Manifest, bundle: Path, paths: Mapping[str, Path], record: QuantizationRecord
) -> Manifest:
    """Return a manifest with 8-bit graphs of some components."""
    files = {name: path.relative_to(bundle).as_posix() for name, path in paths.items()}
    components = tuple(
        replace(each, graphs=(*each.graphs, GraphRecord(variant="int8", file=files[each.name])))
        if each.name in files
        else each
        for each in manifest.components
    )
    records = [
        FileRecord(path=files[name], sha256=sha256_of(path), size_bytes=path.stat().st_size)
        for name, path in paths.items()
    ]
    listed = tuple(sorted((*manifest.files, *records), key=lambda each: each.path))
    return replace(manifest, components=components, files=listed, quantization=record)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a quantisation has left that was killed."""
    for name in _DENOISERS:
        (folder / name / CANDIDATE_FILE).unlink(missing_ok=True)
        remove_stale_parts(folder / name, seconds=0)


def _locked(bundle: Path) -> AbstractContextManager[None]:
    message = f"another process is changing {bundle}; wait for it"
    return locked_folder(bundle, BundleError(message))
