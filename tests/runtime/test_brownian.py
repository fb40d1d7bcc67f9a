import math
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from ldm_runtime.noise.brownian import LARGEST_SIGMA, RESOLUTION, BrownianPath

MANY = (40_000,)
IMAGE = (1, 4, 64, 64)
STRETCHES = [
    (2.0**13, 1.0),
    (2.0**13 + 0.005, 2.0**13),
    (14.6, 0.0),
    (14.6, 12.1),
    (1.0, 0.5),
    (0.035, 0.03),
    (0.0301, 0.03),
    (0.005, 0.0),
]
HALVINGS = int(math.log2(LARGEST_SIGMA / RESOLUTION))


def increment(path, sigma, sigma_next):
    """W(sigma) - W(sigma_next)."""
    return math.sqrt(sigma - sigma_next) * path(sigma, sigma_next).astype(np.float64)


def largest_departure_from_normal(path, stretches=STRETCHES):
    """Worst mean, variance and kurtosis over some stretches, in their standard errors."""
    worst = 0.0
    for stretch in stretches:
        noise = path(*stretch).astype(np.float64)
        moments = [(noise, 0, 1), (noise**2, 1, 2), (noise**4, 3, 96)]
        for values, mean, variance in moments:
            worst = max(worst, abs(values.mean() - mean) / math.sqrt(variance / noise.size))
    return worst


def correlation(one, other):
    """In standard errors of that of independent noise."""
    return np.mean(one * other) * math.sqrt(one.size)


def run(num_steps):
    return np.geomspace(14.6, 0.03, num_steps + 1).tolist()


def test_an_increment_over_any_stretch_is_standard_normal():
    assert largest_departure_from_normal(BrownianPath(1, MANY)) < 4.5


class SameNoiseOnEveryLevel(BrownianPath):
    def _normal(self, node):
        return super()._normal(node.bit_length() % 2)


class MiddlesTooWild(BrownianPath):
    def _normal(self, node):
        return 1.1 * super()._normal(node)


class MiddlesWithoutNoise(BrownianPath):
    def _normal(self, node):
        return super()._normal(node) if node < 1000 else 0 * super()._normal(node)


@pytest.mark.parametrize("spoilt", [SameNoiseOnEveryLevel, MiddlesTooWild, MiddlesWithoutNoise])
def test_a_path_that_is_not_brownian_is_seen(spoilt):
    assert largest_departure_from_normal(spoilt(1, MANY)) > 20


@pytest.mark.parametrize("sigmas", [run(20), [0.045, 0.04, 0.035, 0.03], [8192.0, 5000.0, 1.0]])
def test_increments_over_stretches_that_do_not_overlap_are_independent(sigmas):
    path = BrownianPath(2, MANY)
    noises = [path(*stretch) for stretch in pairwise(sigmas)]

    worst = max(
        abs(correlation(noises[i], noises[j])) for i in range(len(noises)) for j in range(i)
    )

    assert worst < 4.5


def test_increments_over_stretches_that_overlap_share_the_noise_of_the_common_part():
    path = BrownianPath(3, MANY)

    shared = np.mean(path(4.0, 3.0) * path(4.0, 0.0))

    assert shared == pytest.approx(0.5, abs=0.02)  # sqrt(1 / 4)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_increments_add_up_to_the_same_whole_for_every_number_of_steps(num_steps):
    path = BrownianPath(4, (1000,))

    total = sum(increment(path, *stretch) for stretch in pairwise(run(num_steps)))

    whole = increment(BrownianPath(4, (1000,)), 14.6, 0.03)
    np.testing.assert_allclose(total, whole, atol=1e-6 * np.abs(whole).max())


def test_the_order_of_the_questions_does_not_matter():
    forwards, backwards = BrownianPath(5, IMAGE), BrownianPath(5, IMAGE)
    stretches = [*pairwise(run(9)), (14.6, 0.03), (8.0, 4.0), (0.75, 0.5)]

    answers = [forwards(*stretch) for stretch in stretches]

    for stretch, answer in reversed([*zip(stretches, answers, strict=True)]):
        np.testing.assert_array_equal(backwards(*stretch), answer)
        np.testing.assert_array_equal(BrownianPath(5, IMAGE)(*stretch), answer)


def test_paths_of_neighbouring_seeds_are_independent():
    noises = [BrownianPath(seed, MANY)(9.0, 1.0) for seed in (0, 1, 2, 2**64 - 1)]

    worst = max(abs(correlation(noises[i], noises[j])) for i in range(4) for j in range(i))

    assert worst < 4.5


def test_a_seed_means_the_same_path_on_every_machine_and_with_every_numpy():
    noise = BrownianPath(42, (2, 2))(14.6, 0.03)

    expected = [[0.81658471, 0.59995109], [-0.03171493, -1.86812901]]
    np.testing.assert_allclose(noise, expected, rtol=1e-6)


def test_noise_is_float32_and_belongs_to_the_caller():
    path = BrownianPath(6, IMAGE)

    noise = path(2.0, 1.0)
    noise[:] = 7

    assert (noise.dtype, noise.shape) == (np.float32, IMAGE)
    assert not np.any(path(2.0, 1.0) == 7)


def test_a_point_costs_a_bounded_number_of_draws_and_the_next_one_fewer():
    costs, counting = [], BrownianPath(7, (1,))
    draw = counting._normal

    def counted(node):
        costs[-1] += 1
        return draw(node)

    counting._normal = counted
    for stretch in pairwise(run(50)):
        costs.append(0)
        counting(*stretch)

    assert costs[0] <= 2 * HALVINGS
    assert np.mean(costs[1:]) <= 22
    assert max(costs[1:]) <= 30


def test_a_path_keeps_no_more_memory_than_its_docstring_says():
    tracemalloc.start()
    path = BrownianPath(8, IMAGE)
    for stretch in pairwise(run(30)):
        path(*stretch)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert kept <= 5.5e6


@pytest.mark.parametrize(
    "stretch",
    [(1.0, 1.0), (1.0, 2.0), (1.0, -0.1), (LARGEST_SIGMA, 1.0), (math.nan, 1.0), (1.0, math.nan)],
)
def test_a_stretch_that_is_none_is_refused_with_its_ends(stretch):
    with pytest.raises(ValueError, match=rf"from sigma {stretch[0]} to {stretch[1]}.*below 16384"):
        BrownianPath(0, (1,))(*stretch)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match=f"got {seed}"):
        BrownianPath(seed, (1,))
