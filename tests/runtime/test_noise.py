"""Noise against known answers; tests/reference/test_noise_reference.py asks torch itself.

The answers were printed by torch 2.13.0 (CPU, AVX2 and AVX-512 kernels) as
`torch.randn(shape, generator=torch.Generator().manual_seed(seed))`.
"""

import hashlib

import numpy as np
import pytest

from ldm_runtime.noise import TorchCpuGenerator

# fmt: off
SEED_7_FIRST_16 = [
    "-0x1.a3e8acp-1", "0x1.952056p-2", "0x1.cc3dbcp-1", "-0x1.636e7p+0",
    "-0x1.560202p-3", "0x1.23fe5ap-2", "-0x1.483d26p-1", "-0x1.c98d34p-1",
    "0x1.da63d8p-1", "-0x1.122ea8p-1", "-0x1.28e36ep+0", "-0x1.d7337p-2",
    "0x1.6ac5a2p-1", "0x1.0343fp+0", "0x1.d7da5p-3", "0x1.17151p+0",
]
SEED_7_FIRST_19 = [
    "-0x1.a3e8acp-1", "0x1.952056p-2", "0x1.cc3dbcp-1", "-0x1.51ee98p-2",
    "0x1.966a5cp-3", "0x1.906bd4p-1", "0x1.0a02f6p+0", "-0x1.72f312p-1",
    "-0x1.b2a426p-1", "-0x1.3788bp+0", "-0x1.4bdd4ap-4", "-0x1.61871cp-2",
    "-0x1.07de82p+1", "0x1.5923bap-1", "-0x1.52c6cap+0", "-0x1.5c19d2p+0",
    "-0x1.bbc05p-1", "-0x1.20c57cp-1", "-0x1.073a2ap+1",
]
# fmt: on


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, ["0x1.8a7eb8p+0", "-0x1.2c78ap-2", "-0x1.16e292p+1"]),
        (2**32 - 1, ["0x1.384264p+0", "-0x1.926936p-2", "0x1.05e84p+0", "-0x1.7e621cp-2"]),
        (7, SEED_7_FIRST_16),
        (7, SEED_7_FIRST_19),
    ],
    ids=["fewer than 16", "seed of 32 ones", "one group of 16", "no multiple of 16"],
)
def test_noise_has_exactly_the_bits_of_torch(seed, expected):
    noise = TorchCpuGenerator(seed).randn((len(expected),))

    assert noise.dtype == np.float32
    assert noise.tolist() == [float.fromhex(value) for value in expected]


@pytest.mark.parametrize(
    ("seed", "digest"),
    [
        (0, "24efac55b39e95b2d74d8fb5b3a8e8a8e808bd04129f260c4cdbb225bb952a4d"),
        (1, "e3a63ffe8c41d8927973056980b6ef12e997f569ac35a6080304961709402cb4"),
        (42, "e97f3de04c7c6ba86354db4402b91d4402ede9c72aabed29a96dd7d635a798ba"),
        (2**63 - 1, "9cd9e22a6fa43e2b77ccdaca07858b02451d0474e0b37ed5ea74c80ec1ac44bc"),
    ],
)
def test_the_latents_of_a_512_pixel_picture_start_as_in_torch(seed, digest):
    noise = TorchCpuGenerator(seed).randn((1, 4, 64, 64))

    assert noise.shape == (1, 4, 64, 64)
    assert hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest() == digest


def test_successive_calls_continue_the_stream_and_keep_the_number_that_waits():
    generator = TorchCpuGenerator(5)

    calls = [generator.randn((count,)) for count in (3, 16, 1, 2)]

    assert calls[1][0] == float.fromhex("0x1.08731ep-2")
    assert calls[2].tolist() == [float.fromhex("0x1.55c5bep-1")]  # the fourth of the first pairs
    assert calls[3].tolist() == [float.fromhex("0x1.c7985ep-3"), float.fromhex("-0x1.551b7ap-1")]


def test_only_the_low_32_bits_of_a_seed_count():
    low, high = TorchCpuGenerator(3), TorchCpuGenerator(2**32 + 3)

    assert low.randn((20,)).tolist() == high.randn((20,)).tolist()


@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 5), (3, 0, 4)])
def test_noise_takes_any_shape(shape):
    noise = TorchCpuGenerator(0).randn(shape)

    assert noise.shape == shape
    assert np.isfinite(noise).all()


def test_one_generator_does_not_disturb_another():
    first, second = TorchCpuGenerator(1), TorchCpuGenerator(1)

    first.randn((100,))

    assert second.randn((16,)).tolist() == TorchCpuGenerator(1).randn((16,)).tolist()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match=rf"between 0 and 2\*\*64 - 1, got {seed}"):
        TorchCpuGenerator(seed)
