"""DPM-Solver, the stochastic samplers and UniPC against their diffusers schedulers, step by step.

`dpm_twin_table` says which is whose and what theirs needs to do the same. The tests at the end
show where diffusers differs from the papers, CompVis or k-diffusion, whose formulas are written
out in `test_samplers_dpm` and `test_samplers_stochastic` of the runtime's tests.
"""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from diffusers import DPMSolverSinglestepScheduler

from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.samplers.dpm_solver import singlestep_orders
from ldm_runtime.schedules import sampling_sigmas, timestep_of
from tests.reference.dpm_twin_table import (
    DPM_SOLVER,
    DPM_TWINS,
    TO_THE_SMALLEST,
    do_all,
    keep_double_precision,
    visit_leading_timesteps,
)
from tests.reference.sampler_twins import (
    PREDICTION_TYPES,
    TOLERANCE,
    largest_difference,
)

pytestmark = [
    pytest.mark.reference,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to np.array.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # The noise-prediction form, which LDM ships, is one of the things diffusers will remove.
    pytest.mark.filterwarnings("ignore:.*dpmsolver.* is deprecated:FutureWarning"),
]


def every(twins):
    """Parametrize by twin and number of steps."""
    cases = [
        pytest.param(twin, count, id=f"{twin}, {twin.scheduler.__name__}, {count} steps")
        for twin in twins
        for count in twin.num_steps
    ]
    return pytest.mark.parametrize(("twin", "num_steps"), cases)


def with_correction(*names):
    """The twins of some samplers with an eta of the default, which get a correction."""
    return [t for t in DPM_TWINS if t.name in names and t.eta == SAMPLERS[t.name].default_eta]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@every(DPM_TWINS)
def test_every_step_equals_that_of_the_diffusers_twin(twin, num_steps, prediction_type):
    assert largest_difference(twin, num_steps, prediction_type) <= twin.difference


def test_every_sampler_of_these_modules_has_twins_on_three_schedules():
    names = {"dpm_solver", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc"}

    schedules = {name: {twin.schedule for twin in DPM_TWINS if twin.name == name} for name in names}

    assert all(found >= {"leading", "trailing", "karras"} for found in schedules.values())
    assert {twin.difference for twin in DPM_TWINS} == {TOLERANCE}


def swap_uncond_and_cond(denoise):
    return replace(denoise, context=np.roll(denoise.context, 2, axis=0))


def shift_timestep_by_one(denoise):
    return replace(denoise, network=lambda x, t, context: denoise.network(x, t + 1, context))


def raise_sigma_by_a_thousandth(denoise):
    return lambda latents, sigma: denoise(latents, 1.001 * sigma)


@pytest.mark.parametrize(
    "plant", [swap_uncond_and_cond, shift_timestep_by_one, raise_sigma_by_a_thousandth]
)
@pytest.mark.parametrize("twin", DPM_TWINS, ids=str)
def test_a_planted_bug_is_seen_far_above_the_tolerance(twin, plant):
    assert largest_difference(twin, 7, "epsilon", plant) > 100 * TOLERANCE


@pytest.mark.parametrize("twin", [t for t in DPM_TWINS if t.eta], ids=str)
def test_a_hundredth_less_noise_is_seen_far_above_the_tolerance(twin):
    """Ours takes its eta from the twin, theirs has 1 by nature."""
    assert largest_difference(replace(twin, eta=0.99), 7, "epsilon") > 100 * TOLERANCE


@pytest.mark.parametrize("twin", with_correction("dpm_solver"), ids=str)
def test_diffusers_weighs_the_second_point_of_a_third_order_step_otherwise(twin):
    """Without the correction all agree but runs with a third-order step, at that point already."""
    theirs = replace(twin, prepare=lambda scheduler, noise_sampler: None)

    differences = {n: largest_difference(theirs, n, "epsilon") for n in (1, 2, 3, 7)}

    has_third_order = {n: 3 in singlestep_orders(n - twin.without_zero) for n in differences}
    assert {n: d > 100 * TOLERANCE for n, d in differences.items()} == has_third_order


@pytest.mark.parametrize("twin", with_correction("dpmpp_3m_sde"), ids=str)
def test_diffusers_weighs_the_curvature_of_third_order_steps_with_noise_otherwise(twin):
    """Without the correction all agree but runs that reach a third step above 0."""
    kept = [visit_leading_timesteps] if twin.schedule == "leading" else []
    theirs = replace(twin, prepare=do_all(keep_double_precision, *kept))

    differences = {n: largest_difference(theirs, n, "epsilon") for n in (2, 3, 4, 7)}

    assert {n for n, d in differences.items() if d > 100 * TOLERANCE} == {4, 7}
    assert max(differences[n] for n in (2, 3)) <= TOLERANCE


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@every(TO_THE_SMALLEST)
def test_runs_to_the_smallest_training_sigma_equal_their_twins(twin, num_steps, prediction_type):
    assert largest_difference(twin, num_steps, prediction_type) <= TOLERANCE


@pytest.mark.parametrize(("num_steps", "differs"), [(7, True), (14, True), (15, False)])
def test_dpmpp_2m_ends_a_short_run_above_zero_by_a_second_order_step_unlike_compvis(
    num_steps, differs
):
    """CompVis (stable-diffusion 21f890f, dpm_solver/sampler.py) passes `lower_order_final=True`.

    That is a last step of first order in fewer than 15 steps; Stability's sampler does the same.
    """
    [ours] = [twin for twin in TO_THE_SMALLEST if twin.name == "dpmpp_2m"]
    compvis = replace(ours, options=ours.options | {"lower_order_final": True})

    difference = largest_difference(compvis, num_steps, "epsilon")

    assert (difference > 100 * TOLERANCE) == differs
    assert largest_difference(ours, num_steps, "epsilon") <= TOLERANCE


def test_singlestep_orders_are_those_of_diffusers_that_end_above_zero():
    scheduler = DPMSolverSinglestepScheduler(**DPM_SOLVER.options)

    for count in range(1, 60):
        points = [range(1, order + 1) for order in singlestep_orders(count)]
        assert list(chain(*points)) == scheduler.get_order_list(count)


def test_dpm_solver_to_zero_adds_compvis_denoise_where_diffusers_counts_the_last_step_in():
    scheduler = DPMSolverSinglestepScheduler(solver_order=3, lower_order_final=True)

    agree = {
        count
        for count in range(1, 30)
        if [*chain(*(range(1, order + 1) for order in singlestep_orders(count - 1))), 1]
        == scheduler.get_order_list(count)
    }

    assert agree == {1, *(count for count in range(2, 30) if count % 3 != 1)}


def test_the_noise_prediction_of_diffusers_refuses_a_final_sigma_of_zero():
    with pytest.raises(ValueError, match="`final_sigmas_type` zero is not supported"):
        DPMSolverSinglestepScheduler(algorithm_type="dpmsolver", final_sigmas_type="zero")


@pytest.mark.parametrize("num_steps", [5, 20, 50])
def test_one_more_step_on_linspace_visits_the_sigmas_of_compvis_time_uniform(num_steps):
    """CompVis has S + 1 times from 1 to 1 / 1000, and the logarithm of alpha linear between."""
    _, table, _ = DPM_SOLVER.build(5, "epsilon")

    ours = sampling_sigmas(table, num_steps + 1, "linspace", "zero")

    *above_zero, end = ours
    timesteps = 1000 * np.linspace(1, 1 / 1000, num_steps + 1) - 1
    log_alphas = np.interp(timesteps, range(1000), -np.log1p(table**2) / 2)
    theirs = np.sqrt(np.expm1(-2 * log_alphas))
    whole = np.isclose(timesteps, np.round(timesteps))
    assert end == 0
    np.testing.assert_allclose([timestep_of(s, table) for s in above_zero], timesteps, atol=1e-9)
    np.testing.assert_allclose(above_zero, theirs, rtol=1e-3)
    np.testing.assert_allclose(np.array(above_zero)[whole], theirs[whole], rtol=1e-12)
