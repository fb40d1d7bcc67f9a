"""Noise "as on a GPU" against torch on a real one, with the GPU's own numbers of threads."""

import numpy as np
import pytest

from ldm_runtime.noise import TorchCudaGenerator

pytestmark = pytest.mark.gpu

#: The GPU's approximate sine and cosine allow 6e-6 in float32; float64 is accurate.
TOLERANCE = {np.float32: 6e-6, np.float64: 1e-13}


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return torch


@pytest.fixture(scope="module")
def threads(torch):
    properties = torch.cuda.get_device_properties(0)
    return {
        "multiprocessors": properties.multi_processor_count,
        "threads_per_multiprocessor": properties.max_threads_per_multi_processor,
    }


def draw(torch, generator, count, dtype):
    precision = {np.float32: torch.float32, np.float64: torch.float64}[dtype]
    return torch.randn(count, generator=generator, dtype=precision, device="cuda").cpu().numpy()


def assert_close(ours, theirs, dtype):
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**63 + 5])
def test_noise_equals_torch_for_sizes_on_both_sides_of_a_pass(torch, threads, seed, dtype):
    capacity = threads["multiprocessors"] * (threads["threads_per_multiprocessor"] // 256) * 256
    for count in (1, 255, 257, 16384, capacity, capacity + 1, 4 * capacity + 1, 9 * capacity + 5):
        theirs = torch.Generator("cuda").manual_seed(seed)

        ours = TorchCudaGenerator(seed, **threads).randn((count,), dtype)

        assert_close(ours, draw(torch, theirs, count, dtype), dtype)


def test_calls_of_mixed_sizes_and_precisions_continue_the_stream_as_in_torch(torch, threads):
    ours, theirs = TorchCudaGenerator(7, **threads), torch.Generator("cuda").manual_seed(7)

    for count in (5, 0, 16384, 3_000_000, 1, 70_000):
        for dtype in TOLERANCE:
            assert_close(ours.randn((count,), dtype), draw(torch, theirs, count, dtype), dtype)


def test_latents_that_fit_the_threads_need_no_knowledge_of_the_gpu(torch, threads):
    if threads["multiprocessors"] * threads["threads_per_multiprocessor"] < 4 * 64 * 64:
        pytest.skip("this GPU has fewer threads than the latents have numbers")
    theirs = torch.Generator("cuda").manual_seed(42)

    ours = TorchCudaGenerator(42).randn((4 * 64 * 64,))

    assert_close(ours, draw(torch, theirs, 4 * 64 * 64, np.float32), np.float32)
