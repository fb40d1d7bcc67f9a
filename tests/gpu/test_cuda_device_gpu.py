"""Memory, copies and recorded graphs through cuda.core on a real GPU."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ldm_runtime.backends.cuda_device import CudaDevice
from ldm_runtime.errors import BackendError

pytestmark = pytest.mark.gpu


@pytest.fixture
def device():
    pytest.importorskip("cuda.core")
    device = CudaDevice()
    yield device
    device.close()


def test_bytes_travel_to_the_gpu_and_back(device):
    sent, received = device.allocate_pinned(1000), device.allocate_pinned(1000)
    gpu, other = device.allocate(1000), device.allocate(4096)
    sent.array[...] = np.arange(1000) % 251

    device.copy(gpu.address, sent.address, 1000)
    device.copy(other.address, gpu.address, 1000)
    device.copy(received.address, other.address, 1000)
    device.synchronize()

    np.testing.assert_array_equal(received.array, sent.array)


def test_a_recorded_copy_reads_what_is_there_when_it_is_replayed(device):
    sent, received, gpu = (
        device.allocate_pinned(256),
        device.allocate_pinned(256),
        device.allocate(256),
    )

    def work():
        device.copy(gpu.address, sent.address, 256)
        device.copy(received.address, gpu.address, 256)

    work()  # as every first call does
    device.synchronize()
    graph = device.record(work)
    for value in (1, 2, 3):
        sent.array[...] = value
        graph.launch()
        device.synchronize()

        assert (received.array == value).all()
    graph.close()


def test_a_recording_that_fails_leaves_the_stream_usable(device):
    def fail():
        raise BackendError("no")

    with pytest.raises(BackendError):
        device.record(fail)
    host, gpu = device.allocate_pinned(8), device.allocate(8)
    device.copy(gpu.address, host.address, 8)
    device.synchronize()


def test_too_little_memory_is_our_error_and_the_gpu_stays_usable(device):
    with pytest.raises(BackendError, match=r"the GPU ran out of memory .*fewer or smaller images"):
        device.allocate(1 << 46)

    device.allocate(256).close()
    device.synchronize()


def test_other_threads_use_the_same_device(device):
    def copy():
        device.make_current()
        host, gpu = device.allocate_pinned(64), device.allocate(64)
        device.copy(gpu.address, host.address, 64)
        device.synchronize()

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(copy) for _ in range(8)]:
            done.result()


def test_memory_may_be_freed_by_the_collector_after_the_device_is_closed():
    pytest.importorskip("cuda.core")
    device = CudaDevice()
    memory = device.allocate(256)

    device.close()
    del memory
