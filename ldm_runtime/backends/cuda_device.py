"""CUDA for the TensorRT backend: memory on a GPU, copies, one stream, captured graphs.

`Device` is the interface that the TensorRT backend needs of a GPU, and that tests replace by a
fake; `CudaDevice` implements it over `cuda.core`. Whether there is a GPU at all is checked first,
by `ldm_runtime.engines.gpu`.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ldm_runtime.errors import BackendError

_MIB = 1024**2


class DeviceMemory(Protocol):
    """A block of memory on the GPU."""

    @property
    def address(self) -> int:
        """Its address."""
        ...

    @property
    def size(self) -> int:
        """Its size in bytes."""
        ...

    def close(self) -> None:
        """Free it in the order of the stream. Closing twice is harmless."""
        ...


class HostMemory(Protocol):
    """A block of pinned memory on the host."""

    @property
    def address(self) -> int:
        """Its address."""
        ...

    @property
    def size(self) -> int:
        """Its size in bytes."""
        ...

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The bytes, to read and write."""
        ...

    def close(self) -> None:
        """Free it; nothing may be using it."""
        ...


class RecordedGraph(Protocol):
    """A CUDA graph: work captured on a stream, to be replayed with one launch."""

    def launch(self) -> None:
        """Enqueue the work again."""
        ...

    def close(self) -> None:
        """Forget it."""
        ...


class Device(Protocol):
    """A GPU with one non-default stream, on which all work is done in order."""

    @property
    def stream(self) -> int:
        """The stream's handle."""
        ...

    def make_current(self) -> None:
        """Use this GPU in the calling thread."""
        ...

    def allocate(self, size: int) -> DeviceMemory:
        """Allocate memory on the GPU.

        Raises:
            BackendError: There is not enough.
        """
        ...

    def allocate_pinned(self, size: int) -> HostMemory:
        """Allocate pinned memory on the host, which the GPU can copy from and to directly.

        Raises:
            BackendError: There is not enough.
        """
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy between two addresses, each on the GPU or pinned."""
        ...

    def record(self, work: Callable[[], None]) -> RecordedGraph:
        """Capture the work that `work` enqueues, without running it.

        Raises:
            BackendError: The work cannot be captured.
        """
        ...

    def synchronize(self) -> None:
        """Wait until everything enqueued has been done."""
        ...

    def close(self) -> None:
        """Close the stream."""
        ...


class CudaDevice:
    """The first visible GPU, through `cuda.core`; see `Device`.

    Args:
        load: Imports the modules of NVIDIA's bindings; tests pass fakes.

    Raises:
        BackendError: `cuda.core` is not installed, or the GPU cannot be used.
    """

    def __init__(self, load: Callable[[str], Any] = import_module) -> None:
        try:
            core = load("cuda.core")
            self._driver = load("cuda.bindings.driver")
            self._fault = load("cuda.core._utils.cuda_utils").CUDAError  # has no public name
        except (ImportError, AttributeError) as error:
            raise BackendError(
                f"a GPU needs the package cuda-core, which does not load ({error}); "
                "run `pip install 'cuda-core>=1.0' 'cuda-bindings>=13.0'`"
            ) from error
        with self._translated("starting the GPU"):
            self._device = core.Device(0)
            self._device.set_current()
            self._pinned = core.LegacyPinnedMemoryResource()
            self._stream = self._device.create_stream()
        self.stream = int(self._stream.handle)

    def make_current(self) -> None:
        """Use this GPU in the calling thread."""
        with self._translated("selecting the GPU"):
            self._device.set_current()

    def allocate(self, size: int) -> DeviceMemory:
        """Allocate memory on the GPU, in the order of the stream."""
        with self._translated(f"allocating {size / _MIB:.0f} MiB on the GPU"):
            return _CudaMemory(self._device.allocate(size, stream=self._stream), size)

    def allocate_pinned(self, size: int) -> HostMemory:
        """Allocate pinned memory on the host."""
        with self._translated(f"allocating {size / _MIB:.0f} MiB of pinned memory"):
            return _PinnedMemory(self._pinned.allocate(size), size)

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy; the addresses say in which direction."""
        status, *_ = self._driver.cuMemcpyAsync(target, source, size, self.stream)
        if int(status) != 0:
            raise BackendError(f"CUDA failed copying {size} bytes: {status}")

    def record(self, work: Callable[[], None]) -> RecordedGraph:
        """Capture the work that `work` enqueues on the stream."""
        with self._translated("capturing a graph"):
            builder = self._stream.create_graph_builder()
            builder.begin_building("thread_local")
            try:
                work()
            finally:
                builder.end_building()
            return _CudaGraph(builder.complete(), self._launch)

    def synchronize(self) -> None:
        """Wait for the stream."""
        with self._translated("computing"):
            self._stream.sync()

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()

    def _launch(self, graph: Any) -> None:  # noqa: ANN401  (ships few types)
        with self._translated("replaying a graph"):
            graph.launch(self._stream)

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        """Translate the exceptions of cuda.core into `BackendError`."""
        try:
            yield
        except (self._fault, RuntimeError, MemoryError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            if isinstance(error, MemoryError) or "OUT_OF_MEMORY" in lines[0].upper():
                raise out_of_memory(f"{doing}: {lines[0]}") from error
            raise BackendError(f"CUDA failed {doing}: {lines[0]}") from error


class _CudaMemory:
    def __init__(self, buffer: Any, size: int) -> None:  # noqa: ANN401  (ships few types)
        self._buffer = buffer
        self.address = int(buffer.handle)
        self.size = size

    def close(self) -> None:
        self._buffer.close()


class _PinnedMemory(_CudaMemory):
    def __init__(self, buffer: Any, size: int) -> None:  # noqa: ANN401  (ships few types)
        super().__init__(buffer, size)
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))


class _CudaGraph:
    def __init__(self, graph: Any, launch: Callable[[Any], None]) -> None:  # noqa: ANN401
        self._graph = graph
        self._launch = launch

    def launch(self) -> None:
        self._launch(self._graph)

    def close(self) -> None:
        self._graph.close()


def out_of_memory(doing: str) -> BackendError:
    """Return the error that says that memory ran out, and what to do."""
    return BackendError(
        f"the GPU ran out of memory {doing}; ask for fewer or smaller images, "
        "or close what else runs on it"
    )
