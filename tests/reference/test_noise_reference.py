"""Noise against torch: every seed, size and order of calls must give the same bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_runtime.noise import TorchCpuGenerator
from ldm_runtime.noise.torch_cpu import _box_muller

# Elsewhere torch calls the C library's logf, sinf and cosf, which round differently. To try that:
# ATEN_CPU_CAPABILITY=default pytest tests/reference/test_noise_reference.py
VECTOR_KERNELS = torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}
DTYPES = {np.float32: torch.float32, np.float64: torch.float64}
SEEDS = [0, 1, 12345, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]

pytestmark = pytest.mark.reference


def assert_same_bits(ours, torchs):
    expected = torchs.numpy()
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    if VECTOR_KERNELS or ours.dtype == np.float64:
        np.testing.assert_array_equal(ours, expected)
        np.testing.assert_array_equal(np.signbit(ours), np.signbit(expected))
    else:
        np.testing.assert_allclose(ours, expected, rtol=0, atol=4e-6)


def draw_both(ours, theirs, shape, dtype):
    return ours.randn(shape, dtype), torch.randn(shape, generator=theirs, dtype=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_noise_equals_torch_for_every_size_up_to_40(seed, dtype):
    for count in range(41):
        ours, theirs = TorchCpuGenerator(seed), torch.Generator().manual_seed(seed)

        for _ in range(3):
            assert_same_bits(*draw_both(ours, theirs, (count,), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (1, 4, 8, 8), (3, 4, 17, 23), (1009,), (2, 7)])
def test_noise_equals_torch_for_latents_of_any_shape(seed, shape, dtype):
    ours, theirs = TorchCpuGenerator(seed), torch.Generator().manual_seed(seed)

    assert_same_bits(*draw_both(ours, theirs, shape, dtype))


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    calls=st.lists(
        st.tuples(st.integers(0, 40) | st.integers(0, 3000), st.sampled_from([*DTYPES])),
        max_size=8,
    ),
)
def test_any_sequence_of_calls_of_either_precision_equals_torch(seed, calls):
    ours, theirs = TorchCpuGenerator(seed), torch.Generator().manual_seed(seed)

    for count, dtype in calls:
        assert_same_bits(*draw_both(ours, theirs, (count,), dtype))


def test_a_million_numbers_in_float64_equal_torch():
    ours, theirs = TorchCpuGenerator(11), torch.Generator().manual_seed(11)

    assert_same_bits(*draw_both(ours, theirs, (1_000_003,), np.float64))


@pytest.mark.slow
@pytest.mark.skipif(not VECTOR_KERNELS, reason="about the vector kernels")
def test_every_radius_and_every_angle_that_can_be_drawn_equals_torch():
    """All 2**24 arguments of the logarithm, each with another of the 2**24 angles.

    Torch's generator is loaded with the words to draw, by undoing MT19937's output scrambling; its
    state is the seed (8 bytes), how many words are left, two flags, and the 624 words.
    """
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state().numpy()
    state.view(np.int32)[2:5] = (624, 1, 0)
    groups = 38  # of 16: what one state holds
    numbers = np.arange(-(-(2**24) // (groups * 8)) * groups * 8, dtype=np.uint64) % 2**24
    pairs = np.stack([numbers, numbers * 9_699_691 % 2**24]).reshape(2, -1, groups, 8)

    for words in pairs.transpose(1, 2, 0, 3).reshape(-1, groups * 16):
        state.view(np.uint64)[3 : 3 + words.size] = unscramble(words)
        generator.set_state(torch.from_numpy(state))
        theirs = torch.randn(words.size, generator=generator)
        assert_same_bits(_box_muller(words.astype(np.uint32)), theirs)


def unscramble(words):
    """The state words from which MT19937 produces `words` (Matsumoto and Nishimura 1998)."""
    words = words ^ words >> 18
    words = words ^ words << 15 & 0xEFC60000
    partial = words
    for _ in range(4):
        partial = words ^ partial << 7 & 0x9D2C5680
    words = partial
    for _ in range(2):
        partial = words ^ partial >> 11
    return partial
