"""Reruns a bundle's golden requests on this machine and measures how far they are from torch.

The differences are also what `ldm_export` writes into parity records.
"""

import logging
import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_runtime.backends import (
    Backend,
    EngineSource,
    Runner,
    Tensors,
    checked_file,
    choose_backend,
    get_backend,
)
from ldm_runtime.conditioning import encode_prompts, open_tokenizer
from ldm_runtime.errors import BundleError, ShapeError
from ldm_runtime.images import decode_latents
from ldm_runtime.manifest import Manifest, WeightsDType, load_manifest
from ldm_runtime.request import GenerationRequest, parse_request
from ldm_runtime.resolution import resolve
from ldm_runtime.sampling import batches, sample_latents

_LOGGER = logging.getLogger(__name__)

COMPONENTS_FOLDER = "golden/components"
#: Networks in the order of drawing.
TEXT_TO_IMAGE = ("text_encoder", "unet", "vae_decoder")

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a bundle promises; None is not promised.

    Attributes:
        max_relative_error: Highest for any output of a component.
        relative_l2: Likewise.
        psnr: Lowest for any golden image, in decibels.
    """

    max_relative_error: float | None
    relative_l2: float | None
    psnr: float


BOUNDS: Mapping[WeightsDType, Bounds] = {
    "float32": Bounds(max_relative_error=1e-4, relative_l2=None, psnr=60.0),
    "float16": Bounds(max_relative_error=None, relative_l2=5e-3, psnr=35.0),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One measured difference.

    Attributes:
        subject: A component, such as "unet", or a golden request, such as "golden/0 image 1".
        measure: "max_relative_error", "relative_l2" or "psnr" (in decibels, higher is better).
        value: What was measured.
        bound: What the bundle promises, or None if it promises nothing.
    """

    subject: str
    measure: str
    value: float
    bound: float | None

    @property
    def passed(self) -> bool:
        """Whether the value keeps the promise; NaN keeps none."""
        if self.bound is None:
            return not math.isnan(self.value)
        return self.value >= self.bound if self.measure == "psnr" else self.value <= self.bound


@dataclass(frozen=True, kw_only=True)
class _Golden:
    name: str
    request: GenerationRequest
    latents: Array
    images: list[Array]


def verify(
    bundle: str | Path, *, backend: str = "auto", threads: int | None = None
) -> Iterator[Check]:
    """Check every file of a bundle, then rerun its golden outputs, one network at a time.

    Where a backend of limited shapes does not take a network's golden inputs, that network is only
    compared in whole pictures, with a logged sentence.

    Raises:
        BundleError: A file is missing or altered, or the bundle has no golden outputs.
        BackendError: The backend cannot run here.
    """
    bundle = Path(bundle)
    manifest = load_manifest(bundle)
    for record in manifest.files:
        checked_file(bundle, manifest, record.path)
    if not manifest.golden:
        raise BundleError(f"{bundle} has no golden outputs to compare with; export it again")
    chosen = get_backend(choose_backend(backend, manifest, bundle=bundle))
    bounds = _bounds(chosen, manifest)
    source = partial(
        EngineSource, bundle=bundle, manifest=manifest, threads=threads, check_hashes=False
    )
    goldens = [_load_golden(bundle, manifest, folder) for folder in manifest.golden]
    contexts: list[Array] = []
    latents: list[Array] = []
    for component in sorted(manifest.components, key=lambda each: _phase(each.name)):
        with chosen.open_engine(source(component=component)) as engine:
            inputs, expected = _golden_component(component.name, bundle, manifest)
            outputs = _outputs(chosen, engine, component.name, inputs)
            yield from _check_component(component.name, outputs, expected, bounds)
            match component.name:
                case "text_encoder":
                    contexts = _contexts(engine, bundle, manifest, goldens)
                case "unet":
                    latents = [
                        _latents(engine, context, golden.request, manifest)
                        for context, golden in zip(contexts, goldens, strict=True)
                    ]
                case "vae_decoder":
                    for golden, mine in zip(goldens, latents, strict=True):
                        yield from _check_golden(engine, golden, mine, manifest, bounds)


def max_relative_error(actual: Array, expected: Array) -> float:
    """Return the largest absolute difference over the largest absolute expected value."""
    difference, scale = _difference(actual, expected), np.abs(expected.astype(np.float64))
    return _ratio(float(np.abs(difference).max()), float(scale.max()))


def relative_l2(actual: Array, expected: Array) -> float:
    """Return the Euclidean norm of the difference over that of what was expected."""
    difference = _difference(actual, expected)
    return _ratio(
        float(np.linalg.norm(difference)),
        float(np.linalg.norm(expected.astype(np.float64).ravel())),
    )


def psnr(actual: Array, expected: Array) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images in decibels; equal is infinite."""
    mean_square = float(np.square(_difference(actual, expected)).mean())
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


def _bounds(backend: Backend, manifest: Manifest) -> Bounds:
    """Return the promise that holds: fp16 somewhere, in weights or graphs, is fp16's."""
    variant = getattr(backend, "VARIANT", "fp32")
    return BOUNDS["float16" if variant == "fp16" else manifest.weights_dtype]


def _phase(name: str) -> int:
    return TEXT_TO_IMAGE.index(name) if name in TEXT_TO_IMAGE else len(TEXT_TO_IMAGE)


def _contexts(
    engine: Runner, bundle: Path, manifest: Manifest, goldens: list[_Golden]
) -> list[Array]:
    tokenizer = open_tokenizer(bundle / manifest.tokenizer_file, manifest.spec)
    return [encode_prompts(engine, tokenizer, each.request, manifest.spec) for each in goldens]


def _latents(
    engine: Runner, context: Array, request: GenerationRequest, manifest: Manifest
) -> Array:
    rows = []
    for batch in batches(request.num_images, 1):
        *_, last = sample_latents(engine, context, request, manifest.spec, batch)
        rows.append(last.latents)
    return np.concatenate(rows)


def _golden_component(name: str, bundle: Path, manifest: Manifest) -> tuple[Tensors, Tensors]:
    """Return the golden inputs and outputs of a component."""
    path = checked_file(bundle, manifest, f"{COMPONENTS_FOLDER}/{name}.npz", hashed=False)
    with _readable(path), np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    with _readable(path):
        expected = {
            each.name: arrays[f"out.{each.name}"] for each in manifest.component(name).outputs
        }
    return {key[3:]: array for key, array in arrays.items() if key.startswith("in.")}, expected


def _outputs(backend: Backend, engine: Runner, name: str, inputs: Tensors) -> Tensors | None:
    """Return what a component makes of its golden inputs, or None if it is not made for them."""
    try:
        return engine.run(inputs)
    except ShapeError as error:
        if not getattr(backend, "LIMITED_SHAPES", False):
            raise
        _LOGGER.warning("%s is only compared in whole pictures, not alone: %s", name, error)
        return None


def _check_component(
    name: str, outputs: Tensors | None, expected: Tensors, bounds: Bounds
) -> Iterator[Check]:
    if outputs is None:
        return
    pairs = [(outputs[output], expected[output]) for output in expected]
    worst = max(max_relative_error(mine, theirs) for mine, theirs in pairs)
    yield Check(
        subject=name,
        measure="max_relative_error",
        value=worst,
        bound=bounds.max_relative_error,
    )
    distance = max(relative_l2(mine, theirs) for mine, theirs in pairs)
    yield Check(subject=name, measure="relative_l2", value=distance, bound=bounds.relative_l2)


def _check_golden(
    engine: Runner, golden: _Golden, latents: Array, manifest: Manifest, bounds: Bounds
) -> Iterator[Check]:
    yield Check(
        subject=f"{golden.name} latents",
        measure="relative_l2",
        value=relative_l2(latents, golden.latents),
        bound=None,
    )
    for index, expected in enumerate(golden.images):
        (image,) = decode_latents(engine, latents[index : index + 1], manifest.spec)
        yield Check(
            subject=f"{golden.name} image {index}",
            measure="psnr",
            value=psnr(np.asarray(image), expected),
            bound=bounds.psnr,
        )


def _load_golden(bundle: Path, manifest: Manifest, folder: str) -> _Golden:
    locate = partial(checked_file, bundle, manifest, hashed=False)
    path = locate(f"{folder}/request.json")
    with _readable(path):
        fields = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    request = resolve(parse_request(fields), manifest.spec)
    path = locate(f"{folder}/golden.npz")
    with _readable(path), np.load(path, allow_pickle=False) as arrays:
        latents = arrays["latents"]
    images = []
    for index in range(request.num_images):
        path = locate(f"{folder}/{index}.png")
        with _readable(path), Image.open(path, formats=["PNG"]) as image:
            images.append(np.asarray(image))
    return _Golden(name=folder, request=request, latents=latents, images=images)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} is malformed: {error}; export the bundle again") from error


def _difference(actual: Array, expected: Array) -> npt.NDArray[np.float64]:
    if actual.shape != expected.shape:
        raise BundleError(
            f"golden output has shape {expected.shape}, this bundle produced {actual.shape}; "
            "export the bundle again"
        )
    return (actual.astype(np.float64) - expected).ravel()


def _ratio(difference: float, scale: float) -> float:
    if scale == 0:
        return math.inf if difference else 0.0
    return difference / scale
