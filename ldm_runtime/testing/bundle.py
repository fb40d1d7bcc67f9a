"""Tiny bundles, written whole: graphs, weights, vocabulary, golden outputs and manifest."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_runtime.bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    BuildRecord,
    ComponentRecord,
    FileRecord,
    GraphRecord,
    Manifest,
    PreviewRecord,
    encode_manifest,
)
from ldm_runtime.conditioning import open_tokenizer
from ldm_runtime.diagnostics.golden_requests import save_golden_request
from ldm_runtime.latents.codec import decode_latents
from ldm_runtime.latents.previews import explained_variance, preview_pixels
from ldm_runtime.noise import TorchCpuGenerator
from ldm_runtime.pipeline.passes import ImagePasses, open_passes
from ldm_runtime.pipeline.sampling import sample_latents
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.specs.components import Component
from ldm_runtime.specs.model import ModelSpec, Task, axis_sizes, components_of, value_counts
from ldm_runtime.specs.tasks import takes_prompts
from ldm_runtime.testing.engine import FakeEngine, Function
from ldm_runtime.testing.networks import Float32Array, tiny_network, tiny_networks, tiny_weights
from ldm_runtime.testing.onnx_bytes import encode_model, pack_weights
from ldm_runtime.testing.requests import tiny_requests
from ldm_runtime.testing.specs import MERGES, tiny_spec

_VOCABULARY = "tokenizer/merges.txt"


def write_tiny_bundle(folder: Path, task: Task = "text-to-image") -> Manifest:
    """Write the tiny bundle of a task into a folder, which is made if need be.

    Returns:
        Its manifest.
    """
    spec, networks = tiny_spec(task), tiny_networks(task)
    for path, data in _bundle_files(spec).items():
        _write(folder / path, data)
    _write_golden_components(folder / "golden/components", spec, networks)
    tokenizer_file = _VOCABULARY if takes_prompts(tiny_spec(task)) else None
    vocabulary = None if tokenizer_file is None else folder / tokenizer_file
    golden = {f"golden/{index}": each for index, each in enumerate(tiny_requests(task))}
    for path, request in golden.items():
        _write_golden_request(folder / path, resolve(request, spec), spec, vocabulary)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        spec=spec,
        weights_dtype="float32",
        components=tuple(_component_record(name, spec) for name in components_of(spec)),
        tokenizer_file=tokenizer_file,
        golden=tuple(golden),
        golden_key="tiny",
        preview=_preview(spec, networks["vae_decoder"]),
        prediction=None,
        quantization=None,
        engines=(),
        files=tuple(_file_records(folder)),
        build=BuildRecord(
            checkpoint="tiny",
            checkpoint_sha256=hashlib.sha256(b"tiny").hexdigest(),
            components=(),
            versions={"numpy": np.__version__},
            seconds=0.0,
        ),
    )
    _write(folder / MANIFEST_NAME, encode_manifest(manifest))
    return manifest


def _bundle_files(spec: ModelSpec) -> dict[str, bytes]:
    """Return the files of a bundle by path, without golden outputs and manifest."""
    files, weights = {}, tiny_weights(spec)
    if takes_prompts(spec):
        files[_VOCABULARY] = "\n".join(("#version: 0.2", *MERGES, "")).encode()
    for name, component in components_of(spec).items():
        network = tiny_network(name, spec)
        files[f"{name}/weights.bin"], _ = pack_weights(weights[name])
        files[f"{name}/model.cpu.onnx"] = encode_model(
            network.nodes, component.inputs, component.outputs, weights[name], network.axes
        )
    return files


def _preview(spec: ModelSpec, decoder: Function) -> PreviewRecord:
    """Return the decoder's own weights as a map to colours, and how well that does on noise."""
    factor, scale = spec.autoencoder.factor, spec.autoencoder.latent_scale_factor
    channels = spec.autoencoder.embed_dim
    kernel = tiny_weights(spec)["vae_decoder"]["kernel"].reshape(factor**2, 3, channels)
    red, green, blue = (tuple(row) for row in (kernel.mean(axis=0) / scale).tolist())
    record = PreviewRecord(matrix=(red, green, blue), bias=(0.0, 0.0, 0.0), r2=math.nan)
    latents = TorchCpuGenerator(2).randn((4, channels, 8, 8))
    image = decoder({"latents": latents / scale})["image"]
    colours = image.reshape(4, 3, 8, factor, 8, factor).mean(axis=(3, 5))
    return replace(record, r2=explained_variance(preview_pixels(latents, record), colours))


def _write_golden_components(
    folder: Path, spec: ModelSpec, networks: Mapping[str, Function]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, component in components_of(spec).items():
        inputs = _sample_inputs(component, spec)
        arrays: dict[str, Any] = {f"in.{key}": array for key, array in inputs.items()}
        arrays |= {f"out.{key}": array for key, array in networks[name](inputs).items()}
        np.savez(folder / f"{name}.npz", **arrays)


def _sample_inputs(component: Component, spec: ModelSpec) -> dict[str, npt.NDArray[Any]]:
    """Return one fixed input of a component: noise, small numbers and the ends of the schedule."""
    sizes = {
        **axis_sizes(spec, component.name),
        "batch": 2,
        "height": 8,
        "width": 8,
        "context_tokens": 11,
    }
    sizes |= {"image_height": 16, "image_width": 16}
    generator = TorchCpuGenerator(1)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for tensor in component.inputs:
        shape = tuple(sizes[axis] for axis in tensor.axes)
        if tensor.dtype == "int64":
            count = min(5, value_counts(spec, component.name)[tensor.name])
            arrays[tensor.name] = np.arange(math.prod(shape)).reshape(shape) % count
        elif tensor.name == "timesteps":
            arrays[tensor.name] = np.array([0.0, 999.0], dtype=np.float32)
        else:
            arrays[tensor.name] = generator.randn(shape)
    if "learned_embeddings" in arrays:
        arrays["tokens"][:, 1] = value_counts(spec, component.name)["tokens"]
    return arrays


def _write_golden_request(
    folder: Path, request: ResolvedRequest, spec: ModelSpec, vocabulary: Path | None
) -> None:
    engines = {name: FakeEngine(each) for name, each in tiny_networks(spec.task).items()}
    tokenizer = None if vocabulary is None else open_tokenizer(vocabulary, spec)
    passes = open_passes(engines.__getitem__, tokenizer, request, spec)
    save_golden_request(folder, request.as_request())
    arrays = {"latents": _golden_latents(passes, engines)}
    for name in ("context", "concat"):
        if (array := getattr(passes.conditioning, name)) is not None:
            arrays[name] = array
    np.savez(folder / "golden.npz", **arrays)  # type: ignore[arg-type]
    images = decode_latents(engines["vae_decoder"], arrays["latents"], spec)
    for index, image in enumerate(images):
        image.save(folder / f"{index}.png")


def _golden_latents(passes: ImagePasses, engines: Mapping[str, FakeEngine]) -> Float32Array:
    if passes.spec.unet is None:
        assert passes.start is not None, "an autoencoder has an image to encode"
        return passes.start.latents
    *_, last = sample_latents(
        engines["unet"], passes.conditioning, passes.request, passes.spec, start=passes.start
    )
    return last.latents


def _component_record(name: str, spec: ModelSpec) -> ComponentRecord:
    component = components_of(spec)[name]
    return ComponentRecord(
        name=name,
        inputs=component.inputs,
        outputs=component.outputs,
        graphs=(GraphRecord(variant="fp32", file=f"{name}/model.cpu.onnx"),),
        weights_file=f"{name}/weights.bin",
        fp32_islands=(),
        parity=(),
        key=hashlib.sha256(name.encode()).hexdigest(),
    )


def _file_records(folder: Path) -> list[FileRecord]:
    paths = sorted(each for each in folder.rglob("*") if each.is_file())
    return [
        FileRecord(
            path=path.relative_to(folder).as_posix(),
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            size_bytes=path.stat().st_size,
        )
        for path in paths
        if path.name != MANIFEST_NAME
    ]


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
