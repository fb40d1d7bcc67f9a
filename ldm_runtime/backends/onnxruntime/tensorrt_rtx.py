"""ONNX Runtime's TensorRT-RTX provider, a separate package for RTX GPUs; by name only."""

from importlib import import_module
from pathlib import Path

from ldm_runtime.backends.contract import (
    Abilities,
    EngineSource,
    RunOptions,
    always_prepared,
    lacks_graph,
)
from ldm_runtime.backends.onnxruntime.device import DeviceEngine
from ldm_runtime.backends.onnxruntime.library import onnxruntime
from ldm_runtime.backends.onnxruntime.providers import Provider, gpu_fault, open_on, plugin_devices
from ldm_runtime.backends.onnxruntime.session import NATIVE_ERRORS, describe
from ldm_runtime.bundle.manifest import Manifest
from ldm_runtime.errors import BackendError

_NAME = "tensorrt-rtx-ort"
_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"

# The plugin brings its own device type; ONNX Runtime copies to and from it.
PROVIDER = Provider(name="NvTensorRTRTXExecutionProvider", options={}, memory="cpu")

ABILITIES = Abilities(
    variant="fp16",
    limited_shapes=False,
    min_shared_samples=1,
    is_prepared=always_prepared,
)


def open_engine(source: EngineSource) -> DeviceEngine:
    """Open one component of a bundle; see `ldm_runtime.backends.Backend`."""
    register()
    return open_on(PROVIDER, source)


def why_not(
    manifest: Manifest | None, _bundle: Path | None = None, _options: RunOptions | None = None
) -> str | None:
    """Say why a bundle cannot run."""
    if reason := lacks_graph(_NAME, "fp16", manifest) or gpu_fault(_NAME):
        return reason
    try:
        register()
    except BackendError as error:
        return str(error)
    return None


def version() -> str:
    """Return ONNX Runtime's version."""
    return str(onnxruntime.__version__)


def register(package: str = _PACKAGE) -> None:
    """Register the provider with ONNX Runtime, once per process.

    Raises:
        BackendError: It is not installed, does not load, or supports no GPU of this machine.
    """
    if plugin_devices(PROVIDER.name):
        return
    try:
        library = import_module(package).get_library_path()
    except ImportError as error:
        raise BackendError(
            f"{_NAME} needs the package {package!r}, which does not load ({error}); "
            f"run `pip install {_PACKAGE.replace('_', '-')}`"
        ) from error
    except FileNotFoundError as error:
        raise BackendError(f"{_NAME} is not complete: {error}") from error
    try:
        onnxruntime.register_execution_provider_library(PROVIDER.name, library)
    except NATIVE_ERRORS as error:
        raise BackendError(f"{_NAME} cannot load {library}: {describe(error)}") from error
    if not plugin_devices(PROVIDER.name):
        raise BackendError(
            f"{_NAME} supports no GPU of this machine, only compute capability 8.6, 8.9 and "
            "from 12.0; use `--backend cuda`"
        )
