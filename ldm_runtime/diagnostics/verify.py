"""Verification of a bundle: its golden requests run again and compared with torch's results."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends import Backend, BackendName, choose_backend, get_backend
from ldm_runtime.backends.contract import (
    Engine,
    EngineSource,
    Precision,
    Runner,
    RunOptions,
    Tensors,
)
from ldm_runtime.backends.networks import FiniteOutputs
from ldm_runtime.bundle.files import checked_file
from ldm_runtime.bundle.manifest import Manifest, WeightsDType, load_manifest
from ldm_runtime.conditioning import conditioning_components, open_tokenizer
from ldm_runtime.diagnostics.dependence import warn_of_ignored_inputs
from ldm_runtime.diagnostics.golden_outputs import GoldenOutput, load_golden_output, readable
from ldm_runtime.diagnostics.golden_requests import golden_latents
from ldm_runtime.diagnostics.measures import max_relative_error, psnr, relative_l2
from ldm_runtime.errors import BundleError, ShapeError
from ldm_runtime.latents.codec import decode_latents
from ldm_runtime.pipeline.passes import ImagePasses, open_passes
from ldm_runtime.requests.resolved import NoImage
from ldm_runtime.specs.model import ModelSpec, components_of

_LOGGER = logging.getLogger(__name__)

COMPONENTS_FOLDER = "golden/components"

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Error bounds that a bundle promises; None is no promise.

    Attributes:
        max_relative_error: Upper bound for any output of a component.
        relative_l2: Likewise.
        psnr: Lower bound for any golden image, in decibels.
    """

    max_relative_error: float | None
    relative_l2: float | None
    psnr: float | None


BOUNDS: Mapping[WeightsDType, Bounds] = {
    "float32": Bounds(max_relative_error=1e-4, relative_l2=None, psnr=60.0),
    "float16": Bounds(max_relative_error=None, relative_l2=5e-3, psnr=35.0),
}
#: Of networks that compute in bf16, which has 8 bits of precision where fp16 has 11: what it costs
#: depends on the model, so that it is measured and nothing is promised but finite images.
BFLOAT16_BOUNDS = Bounds(max_relative_error=None, relative_l2=None, psnr=None)
#: How far golden images in 8 bits may be below what `ldm quantize` was asked for, in decibels: it
#: measured them on one processor, and rounding differs from one to another.
QUANTIZED_MARGIN = 3.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One measured difference.

    Attributes:
        subject: A component, such as "unet", or a golden request, such as "golden/0 image 1".
        measure: "max_relative_error", "relative_l2" or "psnr" (in decibels, higher is better).
        value: The measured value.
        bound: The bound that the bundle promises, or None.
    """

    subject: str
    measure: str
    value: float
    bound: float | None

    @property
    def passed(self) -> bool:
        """Whether the value is within the bound; NaN never is."""
        if self.bound is None:
            return not math.isnan(self.value)
        return self.value >= self.bound if self.measure == "psnr" else self.value <= self.bound


def verify(
    bundle: str | Path,
    *,
    backend: BackendName = "auto",
    precision: Precision | None = None,
    threads: int | None = None,
    sha256: str | None = None,
    trust_engines: bool = False,
) -> Iterator[Check]:
    """Check every file of a bundle, then rerun its golden outputs, one network at a time.

    Golden images are decoded from golden latents: without cropping, and without restoring the area
    outside a mask.

    Where a backend of limited shapes does not take a network's golden inputs, that network is only
    compared as part of whole images, and a warning is logged.

    Args:
        bundle: Folder made by `ldm-export`.
        backend: Backend that runs the networks.
        precision: Precision that they compute in; None is the most exact that the backend has.
        threads: Threads that compute; None is one per physical core that this process may use.
        sha256: Hash that the manifest must have; None takes any.
        trust_engines: Whether to run TensorRT engines that were not built on this machine.

    Raises:
        BundleError: A file is missing or altered, the bundle is not the one with that hash, or has
            no golden outputs.
        BackendError: The backend cannot run here.
    """
    bundle = Path(bundle).resolve()
    manifest = load_manifest(bundle, sha256=sha256)
    for record in manifest.files:
        checked_file(bundle, manifest, record.path)
    if not manifest.golden:
        raise BundleError(f"{bundle} has no golden outputs to compare with; export it again")
    options = RunOptions(trust_engines=trust_engines, precision=precision)
    chosen = get_backend(choose_backend(backend, manifest, bundle=bundle, options=options))
    options = replace(options, precision=precision or chosen.ABILITIES.variant)
    verification = _Verification(
        bundle=bundle,
        manifest=manifest,
        backend=chosen,
        bounds=_bounds(chosen, manifest, precision),
        threads=threads,
        options=options,
    )
    yield from verification.checks()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Verification:
    """A bundle under verification, with its backend and its bounds."""

    bundle: Path
    manifest: Manifest
    backend: Backend
    bounds: Bounds
    threads: int | None
    options: RunOptions

    def checks(self) -> Iterator[Check]:
        """Check every component and every golden request, in the order of generation."""
        spec = self.manifest.spec
        goldens = [
            load_golden_output(self.bundle, self.manifest, path) for path in self.manifest.golden
        ]
        encoders = _encoders(goldens, spec)
        with ExitStack() as opened:
            engines = {name: opened.enter_context(self._open(name)) for name in encoders}
            for name, engine in engines.items():
                yield from self._check_component(name, engine)
            all_passes = self._all_passes(_finite(engines), goldens)
        latents = [each.start.latents if each.start else np.empty(0) for each in all_passes]
        if spec.unet is not None:
            with self._open("unet") as unet:
                yield from self._check_component("unet", unet)
                (finite,) = _finite({"unet": unet}).values()
                latents = [golden_latents(finite, each) for each in all_passes]
        with self._open("vae_decoder") as decoder:
            yield from self._check_component("vae_decoder", decoder)
            (finite,) = _finite({"vae_decoder": decoder}).values()
            for golden, mine in zip(goldens, latents, strict=True):
                yield from _check_golden(finite, golden, mine, spec, self.bounds)
        for name in components_of(spec):
            if name not in {*encoders, "unet", "vae_decoder"}:
                with self._open(name) as engine:
                    yield from self._check_component(name, engine)

    def _open(self, name: str) -> Engine:
        source = EngineSource(
            bundle=self.bundle,
            manifest=self.manifest,
            component=self.manifest.component(name),
            threads=self.threads,
            check_hashes=False,
            options=self.options,
        )
        return self.backend.open_engine(source)

    def _all_passes(
        self, engines: Mapping[str, Runner], goldens: Sequence[GoldenOutput]
    ) -> list[ImagePasses]:
        path, spec = self.manifest.tokenizer_file, self.manifest.spec
        tokenizer = None
        if path is not None:
            file = checked_file(self.bundle, self.manifest, path, hashed=False)
            tokenizer = open_tokenizer(file, spec)
        return [
            open_passes(engines.__getitem__, tokenizer, golden.request, spec) for golden in goldens
        ]

    def _check_component(self, name: str, engine: Engine) -> Iterator[Check]:
        inputs, expected = _golden_component(name, self.bundle, self.manifest)
        outputs = _outputs(self.backend, engine, name, inputs)
        if outputs is None:
            return
        warn_of_ignored_inputs(name, engine, inputs, outputs, self.manifest.spec)
        pairs = [(outputs[output], expected[output]) for output in expected]
        yield Check(
            subject=name,
            measure="max_relative_error",
            value=_largest(max_relative_error(mine, theirs) for mine, theirs in pairs),
            bound=self.bounds.max_relative_error,
        )
        yield Check(
            subject=name,
            measure="relative_l2",
            value=_largest(relative_l2(mine, theirs) for mine, theirs in pairs),
            bound=self.bounds.relative_l2,
        )


def _bounds(backend: Backend, manifest: Manifest, precision: Precision | None = None) -> Bounds:
    """Return the bounds that apply: those of fp16 if the weights or the graphs are fp16."""
    if precision == "bf16":
        return BFLOAT16_BOUNDS
    if precision == "int8" and manifest.quantization is not None:
        least = manifest.quantization.least_psnr - QUANTIZED_MARGIN
        return replace(BFLOAT16_BOUNDS, psnr=least)
    variant = backend.ABILITIES.variant
    return BOUNDS["float16" if variant == "fp16" else manifest.weights_dtype]


def _finite(engines: Mapping[str, Runner]) -> dict[str, Runner]:
    """Return networks for whole images: a check of one alone reports NaN, here it is an error."""
    return {name: FiniteOutputs(name=name, runner=engine) for name, engine in engines.items()}


def _encoders(goldens: Sequence[GoldenOutput], spec: ModelSpec) -> list[str]:
    """Return the networks that golden requests need before sampling."""
    needed = {*conditioning_components(spec)}
    if not all(isinstance(golden.request.source_image, NoImage) for golden in goldens):
        needed.add("vae_encoder")
    return [name for name in components_of(spec) if name in needed]


def _golden_component(name: str, bundle: Path, manifest: Manifest) -> tuple[Tensors, Tensors]:
    """Return the golden inputs and outputs of a component."""
    path = checked_file(bundle, manifest, f"{COMPONENTS_FOLDER}/{name}.npz", hashed=False)
    with readable(path), np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    with readable(path):
        expected = {
            each.name: arrays[f"out.{each.name}"] for each in manifest.component(name).outputs
        }
    return {key[3:]: array for key, array in arrays.items() if key.startswith("in.")}, expected


def _outputs(backend: Backend, engine: Runner, name: str, inputs: Tensors) -> Tensors | None:
    """Return the outputs for golden inputs, or None if the engine does not take their shapes."""
    try:
        return engine.run(inputs)
    except ShapeError as error:
        if not backend.ABILITIES.limited_shapes:
            raise
        _LOGGER.warning("%s is only compared in whole images, not alone: %s", name, error)
        return None


def _largest(errors: Iterable[float]) -> float:
    """Return the largest error; NaN if one of them is, which `max` would pass over."""
    return float(np.max([*errors]))


def _check_golden(
    engine: Runner, golden: GoldenOutput, latents: Array, spec: ModelSpec, bounds: Bounds
) -> Iterator[Check]:
    yield Check(
        subject=f"{golden.name} latents",
        measure="relative_l2",
        value=relative_l2(latents, golden.latents),
        bound=None,
    )
    for index, expected in enumerate(golden.images):
        (image,) = decode_latents(engine, latents[index : index + 1], spec)
        yield Check(
            subject=f"{golden.name} image {index}",
            measure="psnr",
            value=psnr(np.asarray(image), expected),
            bound=bounds.psnr,
        )
