"""Engine files in TensorRT or TensorRT-RTX: load them, create contexts, enqueue runs.

The vendor's calls return None or False and log the reason; here that is a `BackendError` with the
logged message. TensorRT-RTX compiles kernels on the machine it runs on and keeps them in a file in
the user's cache folder, next to the list of trusted engines: it is not a file of the bundle.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ldm_runtime.backends.contract import RunOptions
from ldm_runtime.backends.cuda_device import out_of_memory
from ldm_runtime.bundle.manifest import ComponentRecord
from ldm_runtime.engines.gpu import Gpu
from ldm_runtime.engines.library import TITLES, import_builder, library_logger, take_errors, why_not
from ldm_runtime.engines.records import BuilderName, EngineRecord
from ldm_runtime.engines.trust import cache_folder, read_own_file, write_own_file
from ldm_runtime.errors import BackendError

_LOGGER = logging.getLogger(__name__)

Shape = tuple[int, ...]


class LoadedEngine:
    """A deserialised engine; see `engine.EngineFile`.

    The GPU's context must be current in the calling thread, here and in every method.

    Args:
        path: The engine file, already checked against the manifest.
        record: Its record.
        component: The inputs and outputs that the engine must have.
        options: How it runs.
        cache: Path of the cache of compiled kernels, for TensorRT-RTX.
        library: The module that loads it; None is the builder in the record.

    Raises:
        BackendError: TensorRT refuses it, or it is not an engine of this component.
    """

    def __init__(
        self,
        path: Path,
        record: EngineRecord,
        component: ComponentRecord,
        options: RunOptions,
        cache: Path,
        library: ModuleType | None = None,
    ) -> None:
        self._library = library or import_builder(record.builder)
        self._title = f"{TITLES[record.builder]} {record.builder_version}"
        self._name = component.name
        self._cache_path = cache
        self._cache: Any = None
        take_errors(self._library)
        self._runtime: Any = self._library.Runtime(library_logger(self._library))
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise self.failure(f"load {path}")
        self._check_tensors(path, component)
        is_rtx = record.builder == "tensorrt_rtx"
        self._config: Any = self._configure(options) if is_rtx else None
        # TensorRT-RTX captures graphs itself, once the kernels for a shape are compiled.
        self.records_graphs = options.cuda_graphs and not is_rtx

    def new_context(self, shapes: Mapping[str, Shape]) -> "ShapedContext":
        """Return an execution context for these input shapes."""
        strategy = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        take_errors(self._library)
        settings = strategy if self._config is None else self._config
        context = self._engine.create_execution_context(settings)
        if context is None:
            raise self.failure("make it ready to run")
        return ShapedContext(self, context, shapes)

    def close(self) -> None:
        """Save the compiled kernels and free the engine."""
        if self._cache is not None:
            self._save_cache()
        self._cache = self._config = self._engine = self._runtime = None

    def failure(self, doing: str) -> BackendError:
        """Return the error for a call that failed, with the message of the library's logger."""
        told = "; ".join(take_errors(self._library)) or "it gave no reason"
        if re.search(r"out ?of ?memory", told, re.IGNORECASE):
            return out_of_memory(f"when {self._title} was to {doing} ({self._name}): {told}")
        return BackendError(f"{self._title} cannot {doing} ({self._name}): {told}")

    def _check_tensors(self, path: Path, component: ComponentRecord) -> None:
        expected = {each.name: each.dtype for each in (*component.inputs, *component.outputs)}
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        found = {name: _dtype(self._library, self._engine.get_tensor_dtype(name)) for name in names}
        if found != expected:
            raise BackendError(
                f"{path} has the tensors {_list(found)}, but the manifest says {_list(expected)}; "
                "run `ldm build-engines` again"
            )

    def _configure(self, options: RunOptions) -> Any:  # noqa: ANN401  (a class of the vendor's)
        library = self._library
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            library.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        specializations = library.DynamicShapesKernelSpecializationStrategy.__members__
        config.dynamic_shapes_kernel_specialization_strategy = specializations[
            options.specialization.upper()
        ]
        graphs = library.CudaGraphStrategy
        config.cuda_graph_strategy = (
            graphs.WHOLE_GRAPH_CAPTURE if options.cuda_graphs else graphs.DISABLED
        )
        self._cache = config.create_runtime_cache()
        if data := read_cache(self._cache_path):
            self._cache.deserialize(data)  # refuses the cache of another GPU or driver
        config.set_runtime_cache(self._cache)
        return config

    def _save_cache(self) -> None:
        memory = self._cache.serialize()
        if memory is not None:
            write_cache(self._cache_path, bytes(memory))


class ShapedContext:
    """An execution context for one set of shapes; see `engine.EngineContext`."""

    def __init__(self, engine: LoadedEngine, context: Any, shapes: Mapping[str, Shape]) -> None:  # noqa: ANN401
        self._loaded = engine
        self._context: Any = context
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise engine.failure(f"take {name} of shape {'x'.join(map(str, shape))}")
        if missing := context.infer_shapes():
            raise engine.failure(f"run without shapes of {', '.join(missing)}")

    def output_shape(self, name: str) -> Shape:
        """Return the shape of an output."""
        return tuple(int(length) for length in self._context.get_tensor_shape(name))

    def scratch_size(self) -> int:
        """Return the bytes of scratch memory that these shapes need."""
        return int(self._context.update_device_memory_size_for_shapes())

    def set_scratch(self, address: int, size: int) -> None:
        """Set the address of the scratch memory."""
        self._context.set_device_memory(address, size)

    def set_address(self, name: str, address: int) -> None:
        """Set the address of an input or output."""
        if not self._context.set_tensor_address(name, address):
            raise self._loaded.failure(f"use the memory of {name}")

    def enqueue(self, stream: int) -> None:
        """Enqueue one run."""
        if not self._context.execute_async_v3(stream):
            raise self._loaded.failure("run")

    def close(self) -> None:
        """Free the context."""
        self._context = None


def cache_path(engine_sha256: str, gpu: Gpu) -> Path:
    """Return the path of the cache of kernels that this GPU compiled for an engine file.

    It is this user's own: kernels are code, and no manifest could vouch for them. So they are read
    from a folder alone that no one else may write to.
    """
    model = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return cache_folder() / f"{engine_sha256[:32]}.{model}.kernel-cache"


def read_cache(path: Path) -> bytes:
    """Return the bytes of a kernel cache; none if it is missing, cannot be read or is not safe."""
    return read_own_file(path, "kernels are compiled again")


def write_cache(path: Path, data: bytes) -> None:
    """Write a kernel cache, whole or not at all; a failure is logged and ignored."""
    try:
        if not _is_kept(path, data):
            write_own_file(path, data)
    except OSError as error:
        _LOGGER.warning(
            "%s cannot be written (%s); kernels will be compiled again next time",
            path,
            error.strerror,
        )


def _is_kept(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:  # whatever is there is replaced
        return False


def installed_versions(builders: Iterable[BuilderName]) -> dict[BuilderName, str]:
    """Return the versions of the libraries that are installed and can be used."""
    return {
        name: str(import_builder(name).__version__) for name in builders if why_not(name) is None
    }


def _dtype(library: ModuleType, dtype: Any) -> str:  # noqa: ANN401  (an enum of the vendor's)
    try:
        return str(np.dtype(library.nptype(dtype)).name)
    except TypeError:  # a type that NumPy lacks
        return str(dtype)


def _list(tensors: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in sorted(tensors.items()))
