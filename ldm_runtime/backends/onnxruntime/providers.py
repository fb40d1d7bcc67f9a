"""ONNX Runtime sessions on devices other than the CPU, and checks of where they really run."""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ldm_runtime.backends.contract import NO_TENSORS, EngineSource, Tensors
from ldm_runtime.backends.onnxruntime.device import Array, Buffer, DeviceEngine
from ldm_runtime.backends.onnxruntime.library import onnxruntime
from ldm_runtime.backends.onnxruntime.packages import conflict, installed_packages
from ldm_runtime.backends.onnxruntime.session import (
    NATIVE_ERRORS,
    SILENT,
    describe,
    take_weights,
)
from ldm_runtime.backends.signatures import check_names
from ldm_runtime.engines.gpu import Gpu, find_gpu
from ldm_runtime.errors import BackendError
from ldm_runtime.specs.components import COMPONENTS
from ldm_runtime.specs.model import axis_sizes
from ldm_runtime.version import extra

_LOGGER = logging.getLogger(__name__)

# A CUDA graph pays off where a network is called in a loop; capturing one costs two calls.
_LOOPED = "denoiser"
# Operators that dominate the run time: none of these may end up on the CPU unnoticed.
_HEAVY = ("Conv", "MatMul", "Gemm", "Attention")
_CPU = "CPUExecutionProvider"


@dataclass(frozen=True, kw_only=True)
class Provider:
    """An execution provider of ONNX Runtime, and how to use it.

    Attributes:
        name: Its name in ONNX Runtime.
        options: Its options, all of them text.
        memory: Where inputs and outputs lie: "cuda", or "cpu" for ONNX Runtime to copy them.
        graph_option: The option that turns CUDA graphs on; None if there is none.
        fallbacks: Providers for operators that this one cannot run, before the CPU.
        device: Number of the GPU.
    """

    name: str
    options: Mapping[str, str]
    memory: str = "cuda"
    graph_option: str | None = None
    fallbacks: tuple["Provider", ...] = ()
    device: int = 0


class OrtBuffer:
    """An `OrtValue` as a `Buffer`.

    Args:
        shape: Its shape.
        dtype: Its element type, as NumPy spells it.
        memory: Kind of device.
        device: Which of that kind.
    """

    def __init__(self, shape: Sequence[int], dtype: str, memory: str, device: int) -> None:
        self.value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            list(shape), np.dtype(dtype), memory, device
        )

    def write(self, array: Array) -> None:
        """Overwrite it."""
        self.value.update_inplace(np.ascontiguousarray(array))

    def read(self) -> Array:
        """Return a copy."""
        return np.array(self.value.numpy())


class OrtSession:
    """An `InferenceSession` as a `DeviceSession`.

    Args:
        path: The graph.
        provider: Where to run it.
        records_graphs: Whether to capture CUDA graphs.
        weights: Weights that replace those of the weights file, by name.

    Raises:
        BackendError: It cannot be loaded there, or ONNX Runtime placed it elsewhere.
    """

    def __init__(
        self,
        path: Path,
        provider: Provider,
        *,
        records_graphs: bool,
        weights: Tensors = NO_TENSORS,
    ) -> None:
        self.records_graphs = records_graphs
        self._provider = provider
        session_options = _session_options()
        self._weights: list[object] = take_weights(session_options, weights)
        self._session: Any = _create(path, provider, session_options, records_graphs)
        self.inputs = [each.name for each in self._session.get_inputs()]
        placed = [
            (subgraph.ep_name, node.op_type)
            for subgraph in self._session.get_provider_graph_assignment_info()
            for node in subgraph.get_nodes()
        ]
        check_placement(path, provider.name, self._session.get_providers(), placed)

    def allocate(self, shape: Sequence[int], dtype: str) -> OrtBuffer:
        """Allocate an array where the provider expects it."""
        return OrtBuffer(shape, dtype, self._provider.memory, self._provider.device)

    def prepare(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], graph_id: int | None
    ) -> Callable[[], None]:
        """Bind the buffers once for all calls."""
        session, binding = self._session, self._session.io_binding()
        run_options = onnxruntime.RunOptions()
        run_options.log_severity_level = SILENT
        if graph_id is not None:
            run_options.add_run_config_entry("gpu_graph_id", str(graph_id))
        for buffers, bind in (
            (inputs, binding.bind_ortvalue_input),
            (outputs, binding.bind_ortvalue_output),
        ):
            for name, buffer in buffers.items():
                assert isinstance(buffer, OrtBuffer), "a session is given its own buffers"
                bind(name, buffer.value)
        return lambda: session.run_with_iobinding(binding, run_options)

    def forget(self, graph_id: int) -> None:
        """Release a CUDA graph, where this version can."""
        if hasattr(self._session, "release_captured_graph"):
            with contextlib.suppress(*NATIVE_ERRORS):  # if it was never captured
                self._session.release_captured_graph(graph_id)

    def close(self) -> None:
        """Release the session."""
        self._session, self._weights = None, []


def open_on(provider: Provider, source: EngineSource) -> DeviceEngine:
    """Open the fp16 graph of a component.

    Where CUDA graphs cannot be captured, it runs without them and logs a warning.

    Raises:
        BackendError: The provider cannot run it.
        BundleError: A file is missing or altered.
    """
    path = source.graph("fp16")
    wanted = (
        provider.graph_option is not None
        and source.options.cuda_graphs
        and COMPONENTS[source.component.name].role == _LOOPED
    )
    preload_libraries()
    weights = source.changed_weights(path)
    try:
        opened = OrtSession(path, provider, records_graphs=wanted, weights=weights)
    except BackendError as error:
        if not wanted or "graph capture" not in str(error):
            raise
        _LOGGER.warning("%s; running without CUDA graphs", error)
        opened = OrtSession(path, provider, records_graphs=False, weights=weights)
    check_names(path, opened.inputs, source.component)
    spec = source.manifest.spec
    return DeviceEngine(
        opened,
        source.component,
        axis_sizes(spec, source.component.name),
        factor=spec.autoencoder.factor,
    )


def check_placement(
    path: Path, wanted: str, providers: Iterable[str], placed: Iterable[tuple[str, str]]
) -> None:
    """Compare where a session runs with where it should.

    Args:
        path: The graph.
        wanted: The provider asked for.
        providers: Those the session has.
        placed: Provider and operator of every node; nothing if ONNX Runtime does not say.

    Raises:
        BackendError: The provider is missing, runs nothing, or leaves heavy operators to the CPU.
    """
    if wanted not in providers:
        raise BackendError(
            f"ONNX Runtime would run {path} on {', '.join(providers)} and not on {wanted}, "
            "without saying why; run `ldm doctor`"
        )
    placed = list(placed)
    if placed and not any(name == wanted for name, _ in placed):
        raise BackendError(f"ONNX Runtime gave {wanted} nothing of {path} to run")
    heavy = {op for name, op in placed if name == _CPU and any(each in op for each in _HEAVY)}
    if heavy and wanted != _CPU:
        raise BackendError(
            f"{wanted} of onnxruntime {onnxruntime.__version__} would leave "
            f"{', '.join(sorted(heavy))} of {path} to the CPU; update onnxruntime-gpu, "
            "or use `--backend onnxruntime`"
        )


def gpu_fault(backend: str, find: Callable[[], Gpu | None] = find_gpu) -> str | None:
    """Say why no NVIDIA GPU can be used with this package of ONNX Runtime; None if one can."""
    gpu = find()
    if gpu is None:
        return (
            f"{backend} needs an NVIDIA GPU, and there is no driver here or it sees no GPU; "
            "`nvidia-smi` says which"
        )
    return driver_fault(backend, gpu, str(getattr(onnxruntime, "cuda_version", "")))


def driver_fault(backend: str, gpu: Gpu, built_for: str) -> str | None:
    """Say why the driver of a GPU is too old; None if it is not.

    Args:
        backend: Name of the backend, for the message.
        gpu: The GPU.
        built_for: The CUDA version ONNX Runtime was built for; empty if none.
    """
    if not built_for or int(gpu.driver_version.split(".")[0]) >= int(built_for.split(".")[0]):
        return None
    return (
        f"{backend} needs an NVIDIA driver for CUDA {built_for}, which this onnxruntime was built "
        f"for, and the driver of the {gpu.name} serves {gpu.driver_version}; update the driver"
    )


def provider_fault(
    backend: str, provider: str, packages: Mapping[str, str] | None = None
) -> str | None:
    """Say why this package of ONNX Runtime lacks a provider; None if it has it.

    Args:
        backend: Name of the backend, for the message.
        provider: Its name in ONNX Runtime.
        packages: Versions of the packages of ONNX Runtime; None is those installed.
    """
    if has_provider(provider):
        return None
    packages = installed_packages() if packages is None else packages
    if mixed := conflict(packages):
        return f"{backend} needs {provider}, which is missing: {mixed}"
    found = " and ".join(f"{name} {version}" for name, version in packages.items())
    remedy = f"run `pip uninstall {' '.join(packages)}` and then " if packages else ""
    return (
        f"{backend} needs {provider}, which {found or 'this onnxruntime'} does not have; "
        f"{remedy}install {extra('cuda')}"
    )


def has_provider(name: str) -> bool:
    """Say whether ONNX Runtime has a provider, built in or registered."""
    return name in onnxruntime.get_available_providers() or bool(plugin_devices(name))


def plugin_devices(name: str) -> list[Any]:
    """Return the devices that a registered provider offers."""
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]


def preload_libraries() -> None:
    """Load CUDA and cuDNN from NVIDIA's packages, so that no search path need be set.

    ONNX Runtime itself only looks for them in the folder that it is installed in.
    """
    if not hasattr(onnxruntime, "preload_dlls"):
        return
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for folder in library_folders(Path(onnxruntime.__file__).parents[1]):
            onnxruntime.preload_dlls(directory=str(folder))
        onnxruntime.preload_dlls()
    if said.getvalue():
        _LOGGER.debug("onnxruntime.preload_dlls: %s", said.getvalue().strip())


def library_folders(searched: Path) -> list[Path]:
    """Return the folders of libraries in NVIDIA's packages, if those lie elsewhere on `sys.path`.

    Args:
        searched: The folder where ONNX Runtime finds them by itself.
    """
    package = find_spec("nvidia")
    places = [Path(place) for place in (package and package.submodule_search_locations) or ()]
    if searched / "nvidia" in places:
        return []
    folders = ("bin", "bin/x86_64") if sys.platform == "win32" else ("lib",)
    return sorted(each for place in places for name in folders for each in place.glob(f"*/{name}"))


def _session_options() -> Any:  # noqa: ANN401
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = SILENT
    session_options.intra_op_num_threads = 1  # the CPU only computes shapes
    session_options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return session_options


def _create(
    path: Path,
    provider: Provider,
    session_options: Any,  # noqa: ANN401
    records_graphs: bool,
) -> Any:  # noqa: ANN401
    options = dict(provider.options)
    if records_graphs:
        options[str(provider.graph_option)] = "1"
    available = onnxruntime.get_available_providers()
    chosen = [(provider.name, options)]
    chosen += [(each.name, dict(each.options)) for each in provider.fallbacks]
    if provider.name not in available and (devices := plugin_devices(provider.name)):
        session_options.add_provider_for_devices(devices[:1], options)
        chosen = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about what is checked afterwards
            return onnxruntime.InferenceSession(
                path, session_options, providers=chosen or None, enable_fallback=0
            )
    except NATIVE_ERRORS as error:
        raise BackendError(f"{provider.name} cannot load {path}: {describe(error)}") from error
