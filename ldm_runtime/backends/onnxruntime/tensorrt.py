"""ONNX Runtime's TensorRT provider: builds engines at load time, for minutes; by name only."""

import contextlib
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

from ldm_runtime.backends.contract import (
    Abilities,
    EngineSource,
    RunOptions,
    always_prepared,
    lacks_graph,
)
from ldm_runtime.backends.onnxruntime.cuda import CudaOptions, cuda_provider
from ldm_runtime.backends.onnxruntime.device import DeviceEngine
from ldm_runtime.backends.onnxruntime.library import onnxruntime
from ldm_runtime.backends.onnxruntime.providers import Provider, gpu_fault, open_on, provider_fault
from ldm_runtime.bundle.manifest import ComponentRecord, Manifest

_NAME = "tensorrt-ort"

# No engine is kept on disk: engines are code, and the manifest could not vouch for them.
PROVIDER = Provider(
    name="TensorrtExecutionProvider",
    options=MappingProxyType(
        {"device_id": "0", "trt_fp16_enable": "1", "trt_layer_norm_fp32_fallback": "1"}
    ),
    graph_option="trt_cuda_graph_enable",
    fallbacks=(cuda_provider(CudaOptions()),),
)

ABILITIES = Abilities(
    variant="fp16",
    limited_shapes=False,
    min_shared_samples=1,
    is_prepared=always_prepared,
)


def open_engine(source: EngineSource) -> DeviceEngine:
    """Open one component of a bundle; see `ldm_runtime.backends.Backend`."""
    with contextlib.suppress(ImportError):  # then the libraries may still be on the system's path
        import_module("tensorrt")  # loads the libraries that the provider links to
    return open_on(provider_for(source.component), source)


def provider_for(component: ComponentRecord) -> Provider:
    """Return the provider; a network that fp16 cannot hold has one graph, and computes in fp32."""
    files = {graph.file for graph in component.graphs if graph.variant in ("fp16", "fp32")}
    if len(files) > 1:
        return PROVIDER
    options = {**PROVIDER.options, "trt_fp16_enable": "0"}
    return replace(PROVIDER, options=MappingProxyType(options))


def why_not(
    manifest: Manifest | None, _bundle: Path | None = None, _options: RunOptions | None = None
) -> str | None:
    """Say why a bundle cannot run; whether TensorRT itself loads shows when it is opened."""
    return (
        lacks_graph(_NAME, "fp16", manifest)
        or gpu_fault(_NAME)
        or provider_fault(_NAME, PROVIDER.name)
    )


def version() -> str:
    """Return ONNX Runtime's version."""
    return str(onnxruntime.__version__)
