import math
from itertools import pairwise

import numpy as np
import pytest

from ldm_runtime.schedules import (
    SCHEDULES,
    custom_sigmas,
    initial_scale,
    rescale_zero_terminal_snr,
    sampling_sigmas,
    training_sigmas,
)
from ldm_runtime.schedules.beta_quantiles import beta_quantiles
from ldm_runtime.schedules.ramps import karras, polyexponential

LENGTH = 1000
#: Every small number of steps, and the large ones at which a formula turns.
STEPS = [*range(1, 151), 250, 333, 334, 500, 501, 800, 801, 802, 998, 999, 1000]
#: Numbers of steps out of 1000 timesteps for which LDM's formula asks for timestep 1000.
OFF_THE_TABLE = {3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)}
#: The most steps of the schedules of distilled models, out of 1000 timesteps.
MOST_STEPS = {"consistency": 50, "turbo": 10, "from_800": 801, "from_399": 400}
ORDINARY = sorted(SCHEDULES.keys() - {"ldm", "ldm_quadratic", "beta", *MOST_STEPS})


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
        ("quadratic", 1, [801]),
        ("quadratic", 2, [801, 1]),
        ("quadratic", 5, [801, 451, 201, 51, 1]),
        ("quadratic", 1000, [*range(999, -1, -1)]),
        ("ldm", 1, [1]),
        ("ldm", 4, [751, 501, 251, 1]),
        ("ldm", 75, [*range(989, 0, -13)]),  # 77 steps
        ("ldm", 500, [*range(999, 0, -2)]),
        ("ldm_quadratic", 1, [1]),
        ("ldm_quadratic", 5, [801, 451, 201, 51, 1]),
        ("karras", 1, [999]),
        ("karras", 2, [999, 0]),
        ("exponential", 1, [999]),
        ("exponential", 2, [999, 0]),
        ("polyexponential", 1, [999]),
        ("polyexponential", 2, [999, 0]),
        ("sgm_uniform", 1, [999]),
        ("sgm_uniform", 3, [999, 666, 333]),
        ("sgm_uniform", 999, [*range(999, 0, -1)]),
        ("beta", 1, [999]),
        ("consistency", 1, [999]),
        ("consistency", 4, [999, 759, 499, 259]),
        ("consistency", 50, [*range(999, 0, -20)]),
        ("turbo", 1, [999]),
        ("turbo", 4, [999, 899, 799, 699]),
        ("turbo", 10, [*range(999, 0, -100)]),
        ("from_800", 1, [800]),
        ("from_800", 3, [800, 533, 266]),
        ("from_399", 1, [399]),
        ("from_399", 4, [399, 299, 199, 99]),
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


def test_karras_takes_another_exponent(table):
    sigmas = karras(table, 11, rho=3.0)

    np.testing.assert_allclose(np.diff(np.cbrt(sigmas), 2), 0, atol=1e-14)


def test_exponential_sigmas_fall_by_the_same_factor(table):
    sigmas = np.array(SCHEDULES["exponential"](table, 11))

    assert (sigmas[0], sigmas[-1]) == (table[-1], table[0])
    np.testing.assert_allclose(sigmas[1:] / sigmas[:-1], (table[0] / table[-1]) ** 0.1, rtol=1e-13)


def test_polyexponential_is_exponential_unless_given_another_exponent(table):
    assert SCHEDULES["polyexponential"](table, 11) == SCHEDULES["exponential"](table, 11)

    heights = np.log(np.array(polyexponential(table, 11, rho=2.0)) / table[0])

    np.testing.assert_allclose(heights / heights[0], np.linspace(1, 0, 11) ** 2, atol=1e-14)


def test_sgm_uniform_is_linspace_with_one_more_step_without_the_last(table):
    for num_steps in STEPS[:-1]:
        sigmas = SCHEDULES["sgm_uniform"](table, num_steps)

        longer = SCHEDULES["linspace"](table, num_steps + 1)
        np.testing.assert_allclose(sigmas, longer[:-1], rtol=1e-12)


def test_quadratic_is_ldms_as_long_as_that_repeats_no_timestep(table):
    for num_steps in range(2, 30):
        assert SCHEDULES["quadratic"](table, num_steps) == SCHEDULES["ldm_quadratic"](
            table, num_steps
        )

    assert timesteps(SCHEDULES["ldm_quadratic"](table, 50), table)[-4:] == [3, 2, 1, 1]
    assert timesteps(SCHEDULES["quadratic"](table, 50), table)[-4:] == [4, 3, 2, 1]


def test_quadratic_moves_only_the_timesteps_that_would_meet_another(table):
    ours = timesteps(SCHEDULES["quadratic"](table, 100), table)[::-1]
    ldms = timesteps(SCHEDULES["ldm_quadratic"](table, 100), table)[::-1]

    expected = ldms[:1]
    for timestep in ldms[1:]:
        expected.append(max(timestep, expected[-1] + 1))
    assert ours == expected
    assert ours[-1] == 801


def test_ldm_makes_as_many_steps_as_its_stride_gives_and_ours_as_many_as_asked(table):
    for num_steps in set(range(1, LENGTH + 1)) - OFF_THE_TABLE:
        stride = LENGTH // num_steps

        sigmas = sampling_sigmas(table, num_steps, "ldm", "smallest")

        assert timesteps(sigmas[:-1], table)[::-1] == [*range(1, LENGTH, stride)]
        assert sigmas[-1] == table[0]
    assert len(sampling_sigmas(table, 75, "ldm", "smallest")) == 77 + 1
    assert len(sampling_sigmas(table, 75, "leading", "smallest")) == 75 + 1


def test_ldm_refuses_the_numbers_of_steps_for_which_it_runs_off_the_table(table):
    for num_steps in OFF_THE_TABLE:
        with pytest.raises(ValueError, match=r"asks for timestep 1000, and the last .* is 999"):
            sampling_sigmas(table, num_steps, "ldm", "smallest")


def test_ldm_names_the_schedule_that_works_instead(table):
    with pytest.raises(ValueError, match="another number of steps, or the schedule leading"):
        sampling_sigmas(table, 1000, "ldm", "smallest")
    with pytest.raises(ValueError, match=r"timestep 2, and the last of this model is 1; .*quadrat"):
        sampling_sigmas(training_sigmas([0.8, 0.2]), 2, "ldm_quadratic", "smallest")


def test_beta_is_dense_at_both_ends_and_symmetric_but_for_the_first_step(table):
    steps = timesteps(SCHEDULES["beta"](table, 21), table)

    gaps = -np.diff(steps)
    assert gaps[0] < gaps[10] > gaps[-1]
    np.testing.assert_allclose(steps[1:] + np.array(steps[:0:-1]), 999, atol=1)


def test_beta_takes_the_middle_timestep_of_a_tie_that_rounds_to_even(table):
    assert timesteps(SCHEDULES["beta"](table, 2), table) == [999, 500]  # 499.5


def test_beta_refuses_more_steps_than_it_has_timesteps_for_and_names_the_most(table):
    for num_steps in (139, 500, 1000):
        message = f"beta would visit a timestep twice in {num_steps} steps; .* up to 138$"
        with pytest.raises(ValueError, match=message):
            sampling_sigmas(table, num_steps, "beta", "zero")

    assert len(sampling_sigmas(table, 138, "beta", "zero")) == 139


def test_the_most_steps_of_beta_are_right_for_short_training_schedules_too():
    for length in (2, 3, 7, 20, 45):
        table = training_sigmas(np.linspace(0.9, 0.1, length).tolist())
        works = []
        for num_steps in range(1, length + 1):
            try:
                sampling_sigmas(table, num_steps, "beta", "zero")
            except ValueError as error:
                named = int(str(error).rpartition(" ")[2])
                assert named == max(works)
            else:
                works.append(num_steps)


@pytest.mark.parametrize("schedule", ORDINARY)
def test_a_run_strictly_decreases_in_plain_floats_to_zero_or_the_smallest(table, schedule):
    for num_steps in STEPS:
        assert_run_is_sound(table, num_steps, schedule, num_steps)


def test_a_run_of_beta_and_of_ldm_strictly_decreases_where_it_is_possible(table):
    for num_steps in range(1, 139):
        assert_run_is_sound(table, num_steps, "beta", num_steps)
    for num_steps in set(STEPS) - OFF_THE_TABLE:
        assert_run_is_sound(table, num_steps, "ldm", -(-LENGTH // (LENGTH // num_steps)))


def test_only_ldm_quadratic_repeats_sigmas_and_never_rises(table):
    for num_steps in STEPS:
        sigmas = sampling_sigmas(table, num_steps, "ldm_quadratic", "smallest")

        assert len(sigmas) == num_steps + 1
        assert sigmas == sorted(sigmas, reverse=True)
        assert (len(set(sigmas)) < len(sigmas)) == (num_steps > 29)


def assert_run_is_sound(table, num_steps, schedule, count):
    for final_sigma in ("zero", "smallest"):
        sigmas = sampling_sigmas(table, num_steps, schedule, final_sigma)

        assert len(sigmas) == count + 1
        assert {type(sigma) for sigma in sigmas} == {float}
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


@pytest.mark.parametrize(("schedule", "most"), MOST_STEPS.items())
def test_a_schedule_of_distilled_models_makes_few_steps_and_says_how_many(table, schedule, most):
    sigmas = sampling_sigmas(table, most, schedule, "zero")

    assert all(sigma > sigma_next for sigma, sigma_next in pairwise(sigmas))
    for num_steps in (most + 1, 1000):
        with pytest.raises(ValueError, match=f"twice in {num_steps} steps; .* up to {most}$"):
            sampling_sigmas(table, num_steps, schedule, "zero")


def test_a_consistency_model_of_few_timesteps_visits_all_of_them():
    table = np.arange(1.0, 31.0)

    assert SCHEDULES["consistency"](table, 30) == table[::-1].tolist()


@pytest.mark.parametrize(
    "schedule", sorted(SCHEDULES.keys() - {"ldm", "ldm_quadratic", "from_399"})
)
def test_the_shortest_training_schedule_works_up_to_its_length(schedule):
    table = training_sigmas([0.8, 0.2])

    runs = [sampling_sigmas(table, num_steps, schedule, "zero") for num_steps in (1, 2)]

    if schedule == "sgm_uniform":  # leaves out the last of three
        assert runs[1] == pytest.approx([table[1], math.sqrt(table[1] * table[0]), 0.0])
    else:
        assert runs[1] == [*table[::-1].tolist(), 0.0]
    assert runs[0][0] in table
    assert runs[0][1:] == [0.0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_steps": 0}, "0 steps are impossible; this model can make 1 to 1000"),
        ({"num_steps": -3}, "-3 steps are impossible"),
        ({"num_steps": 1001}, "1001 steps are impossible"),
        ({"schedule": "karas"}, "'karas'; choose one of leading, trailing, linspace, quad"),
        ({"final_sigma": "one"}, "'one'; choose zero or smallest"),
    ],
)
def test_an_impossible_run_is_refused_with_the_value_and_the_choices(table, changed, message):
    good = {"num_steps": 20, "schedule": "leading", "final_sigma": "zero"}

    with pytest.raises(ValueError, match=message):
        sampling_sigmas(table, **(good | changed))


def test_first_latents_have_unit_variance_where_the_source_scales_them_so():
    sigmas = [2.0, 1.0, 0.0]

    scales = {schedule: initial_scale(sigmas, schedule) for schedule in SCHEDULES}

    assert {schedule for schedule, scale in scales.items() if scale == math.sqrt(5)} == {
        *("leading", "quadratic", "ldm", "ldm_quadratic", "sgm_uniform", "beta"),
        *MOST_STEPS,
    }
    assert set(scales.values()) == {math.sqrt(5), 2.0}


def test_the_initial_scale_of_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="'lead'; choose one of"):
        initial_scale([1.0, 0.0], "lead")


def test_every_schedule_is_registered_under_its_own_name():
    assert {name: schedule.__name__ for name, schedule in SCHEDULES.items()} == {
        name: name for name in SCHEDULES
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, 2.0, 0.5], [3.0, 2.0, 0.5, 0.0]),
        ([3.0, 2.0, 0.0], [3.0, 2.0, 0.0]),
        ((14,), [14.0, 0.0]),
        (np.array([2.0, 1.0], dtype=np.float32), [2.0, 1.0, 0.0]),
    ],
)
def test_given_sigmas_are_kept_and_end_at_zero(values, expected):
    sigmas = custom_sigmas(values)

    assert sigmas == expected
    assert {type(sigma) for sigma in sigmas} == {float}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "at least one value above 0"),
        ([0.0], "at least one value above 0"),
        ([3.0, 3.0], "must decrease, but value 1 is 3.0 after 3.0"),
        ([3.0, 2.0, 2.5, 0.0], "value 2 is 2.5 after 2.0"),
        ([3.0, 0.0, 0.0], r"sigmas\[1\] is 0.0, but .* only the last may be 0"),
        ([3.0, -1.0], r"sigmas\[1\] is -1.0"),
        ([math.inf, 1.0], r"sigmas\[0\] is inf"),
        ([3.0, math.nan, 0.0], r"sigmas\[1\] is nan"),
    ],
)
def test_impossible_given_sigmas_are_refused_with_the_value(values, message):
    with pytest.raises(ValueError, match=message):
        custom_sigmas(values)


def test_zero_terminal_snr_keeps_the_first_timestep_and_leaves_no_signal_in_the_last(table):
    alphas = stable_diffusion_alphas_cumprod()

    rescaled = rescale_zero_terminal_snr(alphas.tolist())

    assert {type(alpha) for alpha in rescaled} == {float}
    assert rescaled[0] == pytest.approx(alphas[0], rel=1e-14)
    assert rescaled[-1] == 2.0**-24
    sigmas = training_sigmas(rescaled)
    assert sigmas[-1] == pytest.approx(4096, rel=1e-7)
    assert (sigmas > table * (1 - 1e-14)).all()


def test_zero_terminal_snr_shifts_and_stretches_the_signal_linearly():
    alphas = np.array([0.81, 0.64, 0.36, 0.09])  # signals 0.9, 0.8, 0.6, 0.3

    rescaled = rescale_zero_terminal_snr(alphas.tolist())

    expected = np.array([0.6, 0.5, 0.3]) * (0.9 / 0.6)
    np.testing.assert_allclose(np.sqrt(rescaled[:-1]), expected, rtol=1e-14)


def test_zero_terminal_snr_still_decreases_where_almost_no_signal_was_left():
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, LENGTH) ** 2  # LDM's models
    alphas = np.cumprod(1 - betas)

    rescaled = rescale_zero_terminal_snr(alphas.tolist())

    assert rescaled[-1] == rescaled[-2] / 2 < 2.0**-24
    assert np.isfinite(training_sigmas(rescaled)).all()


def test_zero_terminal_snr_refuses_an_impossible_training_schedule():
    with pytest.raises(ValueError, match=r"alphas_cumprod\[0\] is 1.0"):
        rescale_zero_terminal_snr([1.0, 0.5])


def test_quantiles_of_the_beta_distribution_with_parameter_1_are_the_probabilities():
    probabilities = np.linspace(0, 1, 101)

    np.testing.assert_allclose(beta_quantiles(probabilities, 1.0), probabilities, atol=1e-15)


def test_quantiles_of_the_arcsine_distribution_are_squares_of_sines():
    probabilities = np.linspace(0, 1, 101)

    quantiles = beta_quantiles(probabilities, 0.5)

    np.testing.assert_allclose(quantiles, np.sin(np.pi / 2 * probabilities) ** 2, atol=1e-15)


#: From mpmath 1.3.0 with 40 digits: the root of betainc(0.6, 0.6, 0, x, regularized=True) - p.
QUANTILES = {
    1e-12: 1.8558824624914136e-20,
    1e-06: 1.855882462405306e-10,
    0.001: 1.8558738517452004e-5,
    0.01: 0.00086123882154290686,
    0.05: 0.012554456873611409,
    0.1: 0.039584405588780855,
    0.25: 0.17568037865269502,
    0.4: 0.36270099075321435,
    0.49: 0.48612891427816027,
    0.6: 0.63729900924678565,
    0.75: 0.82431962134730498,
    0.95: 0.98744554312638857,
    0.999: 0.99998144126148255,
}


def test_quantiles_agree_with_those_of_40_digits():
    quantiles = beta_quantiles(np.array([*QUANTILES]), 0.6)

    np.testing.assert_allclose(quantiles, [*QUANTILES.values()], rtol=1e-14)


def test_quantiles_of_the_ends_and_the_middle_are_exact():
    for shape in (0.3, 0.6, 0.9):
        assert beta_quantiles(np.array([0.0, 0.5, 1.0]), shape).tolist() == [0.0, 0.5, 1.0]
