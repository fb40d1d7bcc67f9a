import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from ldm_runtime.backends.cuda_device import CudaDevice
from ldm_runtime.errors import BackendError


class CudaError(Exception):
    """What cuda.core raises."""


class FakeCuda:
    """NVIDIA's Python bindings over memory of the host; `fault` is raised by the next call."""

    def __init__(self):
        self.fault, self.events, self.blocks = None, [], []
        self.modules = {
            "cuda.core": SimpleNamespace(
                Device=lambda _: self, LegacyPinnedMemoryResource=lambda: self
            ),
            "cuda.bindings.driver": SimpleNamespace(cuMemcpyAsync=self.copy),
            "cuda.core._utils.cuda_utils": SimpleNamespace(CUDAError=CudaError),
        }
        self.handle, self.status = 7, 0

    def load(self, name):
        return self.modules[name]

    def note(self, event):
        if self.fault is not None:
            raise self.fault
        self.events.append(event)

    def set_current(self):
        self.note("set_current")

    def create_stream(self):
        return self

    def allocate(self, size, stream=None):
        self.note(f"allocate {size}")
        self.blocks.append((ctypes.c_uint8 * size)())
        return SimpleNamespace(
            handle=ctypes.addressof(self.blocks[-1]), close=lambda: self.note("free")
        )

    def copy(self, target, source, size, stream):
        assert stream == 7
        ctypes.memmove(target, source, size)
        return (self.status,)

    def create_graph_builder(self):
        return self

    def begin_building(self, mode):
        self.note(f"begin {mode}")

    def end_building(self):
        self.note("end")

    def complete(self):
        return SimpleNamespace(
            launch=lambda stream: self.note("launch"), close=lambda: self.note("forget")
        )

    def sync(self):
        self.note("sync")

    def close(self):
        self.note("close stream")


@pytest.fixture
def cuda():
    return FakeCuda()


def test_bytes_travel_through_pinned_memory(cuda):
    device = CudaDevice(cuda.load)
    host, gpu = device.allocate_pinned(16), device.allocate(16)

    host.array[...] = np.arange(16)
    device.copy(gpu.address, host.address, 16)
    host.array[...] = 0
    device.copy(host.address, gpu.address, 8)

    assert host.array.tolist() == [*range(8), *[0] * 8]
    assert (host.size, device.stream) == (16, 7)


def test_work_is_recorded_between_begin_and_end_and_launched_later(cuda):
    device = CudaDevice(cuda.load)
    cuda.events.clear()

    graph = device.record(lambda: cuda.note("work"))
    graph.launch()
    device.synchronize()
    graph.close()

    assert cuda.events == ["begin thread_local", "work", "end", "launch", "sync", "forget"]


def test_work_that_fails_while_it_is_recorded_ends_the_recording(cuda):
    device = CudaDevice(cuda.load)

    def fail():
        raise BackendError("TensorRT cannot run")

    with pytest.raises(BackendError, match="TensorRT cannot run"):
        device.record(fail)

    assert cuda.events[-1] == "end"


@pytest.mark.parametrize("fault", [CudaError("CUDA_ERROR_OUT_OF_MEMORY: no"), MemoryError()])
def test_too_little_memory_is_our_error_and_says_what_to_do(cuda, fault):
    device = CudaDevice(cuda.load)
    cuda.fault = fault

    message = r"out of memory allocating 64 MiB on the GPU: .*smaller"
    with pytest.raises(BackendError, match=message):
        device.allocate(64 * 1024**2)
    with pytest.raises(BackendError, match="out of memory allocating 64 MiB of pinned memory"):
        device.allocate_pinned(64 * 1024**2)


def test_any_other_fault_is_our_error_too(cuda):
    device = CudaDevice(cuda.load)
    graph = device.record(lambda: None)
    cuda.fault, cuda.status = CudaError("CUDA_ERROR_LAUNCH_FAILED: boom\nmore"), 719

    for call, doing in ((device.synchronize, "computing"), (graph.launch, "replaying a graph")):
        with pytest.raises(BackendError) as caught:
            call()
        assert str(caught.value) == f"CUDA failed {doing}: CUDA_ERROR_LAUNCH_FAILED: boom"
    with pytest.raises(BackendError, match="CUDA failed copying 0 bytes: 719"):
        device.copy(0, 0, 0)


def test_missing_bindings_name_what_to_install():
    def load(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    with pytest.raises(BackendError, match=r"cuda-core, .* run `pip install 'cuda-core>=1\.0'"):
        CudaDevice(load)


def test_the_device_frees_and_closes(cuda):
    device = CudaDevice(cuda.load)

    device.make_current()
    device.allocate(1).close()
    device.close()

    assert cuda.events[-2:] == ["free", "close stream"]
