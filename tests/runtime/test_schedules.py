import math
from itertools import pairwise

import numpy as np
import pytest

from ldm_runtime import schedules
from ldm_runtime.schedules import SCHEDULES, initial_scale, sampling_sigmas, training_sigmas

LENGTH = 1000


def stable_diffusion_alphas_cumprod():
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, LENGTH) ** 2)


@pytest.fixture(scope="module")
def table():
    return training_sigmas(stable_diffusion_alphas_cumprod().tolist())


def timesteps(sigmas, table):
    """Positions of exact table entries."""
    positions = np.searchsorted(table, sigmas)
    assert [float(table[position]) for position in positions] == list(sigmas)
    return positions.tolist()


def test_training_sigmas_are_the_ratio_of_noise_to_signal():
    sigmas = training_sigmas([0.8, 0.5, 0.2])

    assert sigmas.dtype == np.float64
    np.testing.assert_allclose(sigmas, [0.5, 1.0, 2.0], rtol=1e-15)


def test_training_sigmas_of_stable_diffusion_are_the_published_ones(table):
    assert (np.diff(table) > 0).all()
    assert table[0] == pytest.approx(0.0292, abs=5e-5)
    assert table[-1] == pytest.approx(14.6146, abs=5e-5)


@pytest.mark.parametrize(
    ("alphas_cumprod", "message"),
    [
        ([], "two or more"),
        ([0.5], "two or more"),
        ([[0.9, 0.5]], "shape \\(1, 2\\)"),
        ([1.0, 0.5], "alphas_cumprod\\[0\\] is 1.0"),
        ([0.9, 0.5, 0.0], "alphas_cumprod\\[2\\] is 0.0"),
        ([0.9, math.nan], "alphas_cumprod\\[1\\] is nan"),
        ([0.9, 0.4, 0.5], "value 2 is 0.5 after 0.4"),
        ([0.9, 0.5, 0.5], "value 2 is 0.5 after 0.5"),
    ],
)
def test_an_impossible_training_schedule_is_refused_with_the_value(alphas_cumprod, message):
    with pytest.raises(ValueError, match=message):
        training_sigmas(alphas_cumprod)


@pytest.mark.parametrize(
    ("schedule", "num_steps", "expected"),
    [
        ("leading", 1, [1]),
        ("leading", 4, [751, 501, 251, 1]),
        ("leading", 3, [667, 334, 1]),
        ("leading", 500, [*range(999, 0, -2)]),
        ("leading", 999, [*range(999, 0, -1)]),
        ("leading", 1000, [*range(999, -1, -1)]),
        ("trailing", 1, [999]),
        ("trailing", 4, [999, 749, 499, 249]),
        ("trailing", 3, [999, 666, 332]),
        ("trailing", 1000, [*range(999, -1, -1)]),
        ("linspace", 1, [999]),
        ("linspace", 2, [999, 0]),
        ("linspace", 4, [999, 666, 333, 0]),
        ("linspace", 1000, [*range(999, -1, -1)]),
        ("karras", 1, [999]),
        ("karras", 2, [999, 0]),
    ],
)
def test_a_schedule_visits_exact_entries_of_the_table(table, schedule, num_steps, expected):
    sigmas = SCHEDULES[schedule](table, num_steps)

    assert timesteps(sigmas, table) == expected


def test_leading_is_every_kth_timestep_plus_one_clipped_to_the_last(table):
    for num_steps in range(1, LENGTH):
        wanted = (np.arange(num_steps) * (LENGTH // num_steps))[::-1] + 1

        sigmas = SCHEDULES["leading"](table, num_steps)

        assert sigmas == table[np.minimum(wanted, LENGTH - 1)].tolist()


def test_linspace_takes_the_geometric_mean_half_way_between_two_timesteps(table):
    first, middle, last = SCHEDULES["linspace"](table, 3)

    assert (first, last) == (table[-1], table[0])
    assert middle == pytest.approx(math.sqrt(table[499] * table[500]), rel=1e-12)


def test_karras_sigmas_are_evenly_spaced_in_their_seventh_root(table):
    sigmas = SCHEDULES["karras"](table, 11)

    assert (sigmas[0], sigmas[-1]) == (table[-1], table[0])
    np.testing.assert_allclose(np.diff(np.power(sigmas, 1 / 7), 2), 0, atol=1e-14)


@pytest.mark.parametrize("final_sigma", ["zero", "smallest"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_strictly_decreases_in_plain_floats_to_zero_or_the_smallest(
    table, schedule, final_sigma
):
    for num_steps in range(1, LENGTH + 1):
        sigmas = sampling_sigmas(table, num_steps, schedule, final_sigma)

        assert len(sigmas) == num_steps + 1
        assert all(type(sigma) is float for sigma in sigmas)
        assert all(sigma > sigma_next for sigma, sigma_next in pairwise(sigmas))
        reaches_smallest = float(table[0]) in sigmas[:-1]
        ends_above = final_sigma == "smallest" and not reaches_smallest
        assert sigmas[-1] == (table[0] if ends_above else 0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float32_latents_stay_float32_times_a_sigma(table, schedule):
    sigmas = sampling_sigmas(table, 7, schedule, "smallest")
    latents = np.ones(3, dtype=np.float32)

    products = [latents * sigma for sigma in [*sigmas, initial_scale(sigmas, schedule)]]

    assert {product.dtype for product in products} == {np.dtype(np.float32)}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_shortest_training_schedule_works_up_to_its_length(schedule):
    table = training_sigmas([0.8, 0.2])

    runs = [sampling_sigmas(table, num_steps, schedule, "zero") for num_steps in (1, 2)]

    assert runs[1] == [*table[::-1].tolist(), 0.0]
    assert runs[0][0] in table
    assert runs[0][1:] == [0.0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_steps": 0}, "0 steps are impossible; this model can make 1 to 1000"),
        ({"num_steps": -3}, "-3 steps are impossible"),
        ({"num_steps": 1001}, "1001 steps are impossible"),
        ({"schedule": "karas"}, "'karas'; choose one of leading, trailing, linspace, karras"),
        ({"final_sigma": "one"}, "'one'; choose zero or smallest"),
    ],
)
def test_an_impossible_run_is_refused_with_the_value_and_the_choices(table, changed, message):
    good = {"num_steps": 20, "schedule": "leading", "final_sigma": "zero"}

    with pytest.raises(ValueError, match=message):
        sampling_sigmas(table, **(good | changed))


def test_first_latents_have_unit_variance_for_leading_and_the_largest_sigma_for_the_others(table):
    sigmas = [2.0, 1.0, 0.0]

    scales = {schedule: initial_scale(sigmas, schedule) for schedule in SCHEDULES}

    assert scales.pop("leading") == math.sqrt(5)
    assert scales == dict.fromkeys(scales, 2.0)


def test_the_initial_scale_of_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="'lead'; choose one of"):
        initial_scale([1.0, 0.0], "lead")


def test_every_schedule_is_registered_under_its_own_name():
    assert {name: getattr(schedules, name) for name in SCHEDULES} == dict(SCHEDULES)
