"""Noise against known answers; tests/reference and tests/gpu ask torch itself.

The answers for the CPU were printed by torch 2.13.0 (AVX2 and AVX-512 kernels) as
`torch.randn(shape, generator=torch.Generator().manual_seed(seed))`. Those for GPUs were printed by
torch on the GPU named, in the issue of pytorch/pytorch named. Those of Philox are Random123's own.
"""

import hashlib
import math

import numpy as np
import pytest

from ldm_runtime.noise import NOISES, NumpyGenerator, TorchCpuGenerator, TorchCudaGenerator
from ldm_runtime.noise.philox import philox4x32
from ldm_runtime.noise.torch_cuda import _four_floats, _two_doubles

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
SEED_0_DOUBLES_UNDER_16 = [
    "0x1.8a7eb8902be3ap+0", "-0x1.2c78a087c6feap-2", "-0x1.16e2920a70ee5p+1",
]
SEED_7_DOUBLES = [
    "0x1.0f6e8d3a53973p-4", "0x1.80f46f1ebf213p-5", "0x1.d6276549d121ep+0",
    "0x1.5e20f53cc4c77p+0", "0x1.1f115c8471adbp+0", "0x1.dc186469a9861p+0",
    "0x1.33d449b0b2b5bp-1", "0x1.79c4cc50d0f5bp-1", "-0x1.9d127871df74bp-1",
    "-0x1.98c1010293323p-1", "0x1.8919a94819b5dp-1", "0x1.08e2d281fd3b7p-1",
    "0x1.f6d8e92fd72cep+0", "0x1.cae4f230cc977p-2", "0x1.29257037f8aa8p-1",
    "-0x1.0c99542db62ebp+0",
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


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, SEED_0_DOUBLES_UNDER_16),
        (7, SEED_7_DOUBLES),
    ],
    ids=["fewer than 16", "one group of 16"],
)
def test_noise_in_float64_is_that_of_torch(seed, expected):
    noise = TorchCpuGenerator(seed).randn((len(expected),), np.float64)

    assert noise.dtype == np.float64
    # To the last bit on the C library of the machine that printed them; one off elsewhere.
    np.testing.assert_array_max_ulp(noise, np.array([*map(float.fromhex, expected)]), 4)


def test_a_call_in_one_precision_continues_the_stream_of_the_other():
    generator, twin = TorchCpuGenerator(3), TorchCpuGenerator(3)

    single, double = generator.randn((1,)), generator.randn((1,), np.float64)

    both = twin.randn((2,), np.float64)
    assert single[0] == both[0].astype(np.float32)
    assert double[0] == both[1]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFF_FFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_words_of_random123(counter, key, expected):
    words = philox4x32(counter, key)

    assert words.dtype == np.uint32
    assert " ".join(f"{word:08x}" for word in words) == expected


def test_philox_of_many_counters_is_philox_of_each():
    counters = np.arange(12).reshape(4, 3)

    together = philox4x32(counters, 5)

    for index in range(3):
        assert together[:, index].tolist() == philox4x32(counters[:, index], 5).tolist()


# #158398 prints the ends of the rows of torch.randn([1, 64, 2048]) from seed 42, #79496 the first
# numbers from seed 10, #62467 the first of each channel of (1, 3, 128, 128) from seed 43.
@pytest.mark.parametrize(
    ("seed", "positions", "expected"),
    [
        (42, [0, 1, 2, 2045, 2046, 2047], [0.1940, 2.1614, -0.1721, 1.4540, -2.7733, -0.8932]),
        (42, [2048, 2049, 2050, 4093, 4095], [-0.4574, 0.8063, 0.1580, 0.1124, -1.2535]),
        (10, [0, 1, 2], [-0.1029, 1.6810, -0.2708]),
        (43, [0, 16384, 32768], [1.9983, 0.8704, 2.1127]),
    ],
)
def test_numbers_that_fit_the_threads_are_those_that_torch_prints_on_gpus(
    seed, positions, expected
):
    noise = TorchCudaGenerator(seed).randn((49152,))

    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise[positions], expected, rtol=0, atol=6e-5)


# #143086 prints the last three of torch.randn(1, 49 * 12 * 112 * 144) from seed 1.
@pytest.mark.parametrize(
    ("multiprocessors", "expected"),
    [(132, [-0.6970, -0.7780, 0.3267]), (108, [0.1549, -0.6797, -0.1656])],
    ids=["H100", "A100"],
)
def test_numbers_that_outnumber_the_threads_are_those_of_the_gpu(multiprocessors, expected):
    generator = TorchCudaGenerator(1, multiprocessors=multiprocessors)

    noise = generator.randn((1, 49 * 12 * 112 * 144))

    np.testing.assert_allclose(noise[0, :3], [-0.2963, 2.6764, -0.1408], rtol=0, atol=6e-5)
    np.testing.assert_allclose(noise[0, -3:], expected, rtol=0, atol=6e-5)


def test_a_small_gpu_is_followed_too():
    # #97097: torch.cuda.FloatTensor(1000, 100).normal_(5, 5**.5) from seed 14 on an RTX A4000.
    generator = TorchCudaGenerator(14, multiprocessors=48, threads_per_multiprocessor=1536)

    numbers = 5 + math.sqrt(5) * generator.randn((1000, 100))

    ends = numbers[[0, 1, -2, -1]][:, [0, 1, 2, -3, -2, -1]]
    expected = [
        [2.8731, 5.2727, 2.9889, 1.6853, 9.6331, 6.6319],
        [3.9968, 3.8097, 5.7328, 4.4029, 3.9804, 7.4698],
        [7.0551, 7.8583, 3.9990, 4.1139, 8.9315, 4.2042],
        [2.7337, 2.2106, 7.7815, 8.2207, 6.5395, 4.2604],
    ]
    np.testing.assert_allclose(ends, expected, rtol=0, atol=6e-5)


def test_later_calls_on_a_gpu_continue_the_stream_to_a_millionth():
    # #184415 prints all digits of the first call for 4 numbers minus twice the third, seed 42.
    generator = TorchCudaGenerator(42)

    first, _, third = (generator.randn((4,)) for _ in range(3))

    printed = [1.2315161228179932, -0.292142391204834, -1.423011302947]
    np.testing.assert_allclose((first - 2 * third)[:3], printed, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "per_pass"), [(np.float32, 4), (np.float64, 2)])
def test_a_call_moves_the_stream_on_by_its_passes(dtype, per_pass):
    small = {"multiprocessors": 1, "threads_per_multiprocessor": 256}
    for passes in (1, 2, 3):
        ours, twin = TorchCudaGenerator(9, **small), TorchCudaGenerator(9, **small)

        ours.randn((256 * per_pass * passes,), dtype)
        for _ in range(passes):
            twin.randn((1,), dtype)

        assert ours.randn((4,)).tolist() == twin.randn((4,)).tolist()


def test_threads_that_make_no_whole_block_are_not_used():
    odd = TorchCudaGenerator(4, multiprocessors=2, threads_per_multiprocessor=300)
    even = TorchCudaGenerator(4, multiprocessors=2, threads_per_multiprocessor=256)

    assert odd.randn((3000,)).tolist() == even.randn((3000,)).tolist()


def test_an_empty_call_on_a_gpu_leaves_the_stream_where_it_was():
    generator = TorchCudaGenerator(4)

    assert generator.randn((0, 3)).shape == (0, 3)
    assert generator.randn((5,)).tolist() == TorchCudaGenerator(4).randn((5,)).tolist()


def test_all_64_bits_of_a_seed_count_on_a_gpu():
    low, high = TorchCudaGenerator(3), TorchCudaGenerator(2**32 + 3)

    assert low.randn((20,)).tolist() != high.randn((20,)).tolist()


def test_float64_on_a_gpu_takes_53_bits_from_two_words_for_each_pair():
    words = [0x12345678, 0x9ABCDEF0, 0x0F1E2D3C, 0x4B5A6978]
    radius_bits = words[0] ^ words[1] << 21
    angle_bits = words[2] ^ words[3] << 21

    first, second = _two_doubles(np.array(words, dtype=np.uint32)[:, None])

    radius = math.sqrt(-2 * math.log((radius_bits + 0.5) / 2**53))
    angle = 2 * math.pi * (angle_bits + 0.5) / 2**53
    assert first[0] == pytest.approx(radius * math.sin(angle), rel=1e-14)
    assert second[0] == pytest.approx(radius * math.cos(angle), rel=1e-14)


def test_the_smallest_and_largest_words_make_finite_numbers():
    words = np.array([[0, 0xFFFFFFFF]] * 4, dtype=np.uint32)

    numbers = [*_four_floats(words), *_two_doubles(words)]

    assert np.isfinite(numbers).all()
    radius, angle = math.sqrt(-2 * math.log(2**-33)), math.pi / 2**32  # half a step off zero
    assert numbers[0][0] == pytest.approx(radius * math.sin(angle), rel=1e-6)
    assert numbers[1][0] == pytest.approx(radius, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"multiprocessors": 0}, "multiprocessors must be 1 or more, got 0"),
        ({"threads_per_multiprocessor": 255}, "must be 256 or more, got 255"),
    ],
)
def test_an_impossible_gpu_is_refused_with_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        TorchCudaGenerator(0, **arguments)


def test_more_than_2_gib_from_one_call_on_a_gpu_are_refused():
    with pytest.raises(ValueError, match=r"536870913 numbers of float32 .* sample them in parts"):
        TorchCudaGenerator(0).randn((2**29 + 1,))


def test_numpy_noise_is_that_of_its_generator():
    noise = NumpyGenerator(7)

    expected = np.random.Generator(np.random.PCG64(7))
    np.testing.assert_array_equal(
        noise.randn((2, 3)), expected.standard_normal((2, 3), dtype=np.float32)
    )
    np.testing.assert_array_equal(noise.randn((5,), np.float64), expected.standard_normal(5))


def test_every_kind_of_noise_has_its_name():
    assert dict(NOISES) == {
        "torch-cpu": TorchCpuGenerator,
        "torch-cuda": TorchCudaGenerator,
        "numpy": NumpyGenerator,
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", NOISES)
def test_noise_is_standard_normal(kind, dtype):
    count = 200_000

    noise = np.sort(NOISES[kind](1).randn((count,), dtype).astype(np.float64))

    assert abs(noise.mean()) < 4 / math.sqrt(count)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / count)
    expected = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in noise[::100]])
    distance = np.abs(expected - np.arange(count)[::100] / count).max()
    assert distance < 1.95 / math.sqrt(count)  # Kolmogorov and Smirnov, level 0.001


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 5), (3, 0, 4)])
def test_noise_takes_any_shape(kind, shape):
    for dtype in (np.float32, np.float64):
        noise = NOISES[kind](0).randn(shape, dtype)

        assert noise.shape == shape
        assert noise.dtype == dtype
        assert np.isfinite(noise).all()


@pytest.mark.parametrize("kind", NOISES)
def test_successive_calls_give_other_numbers_and_the_same_seed_the_same_ones(kind):
    generator, twin = NOISES[kind](8), NOISES[kind](8)

    calls = [generator.randn((16,)).tolist() for _ in range(3)]

    assert calls == [twin.randn((16,)).tolist() for _ in range(3)]
    assert calls[0] != calls[1] != calls[2]


@pytest.mark.parametrize("kind", NOISES)
def test_one_generator_does_not_disturb_another(kind):
    first, second = NOISES[kind](1), NOISES[kind](1)

    first.randn((100,))

    assert second.randn((16,)).tolist() == NOISES[kind](1).randn((16,)).tolist()


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(kind, seed):
    with pytest.raises(ValueError, match=rf"between 0 and 2\*\*64 - 1, got {seed}"):
        NOISES[kind](seed)


@pytest.mark.parametrize("kind", NOISES)
def test_noise_of_another_type_is_refused(kind):
    with pytest.raises(ValueError, match="float32 or float64, not in float16"):
        NOISES[kind](0).randn((3,), np.float16)
