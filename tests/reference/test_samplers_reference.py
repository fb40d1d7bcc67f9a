"""Our samplers and schedules against their diffusers schedulers, step by step.

Both sides must agree to 1e-6 of the largest latent after every step. The samplers' rows are in
`sampler_twin_table`; how schedulers differ from our sources is shown by
`test_sampler_differences_reference`, and how they space their steps by the end of this file:

* `DPMSolverMultistepScheduler` spaces "leading" over num_steps + 1 points and so visits other
  timesteps than DDIM and Euler do. As its twin it gets ours through `timesteps=`.
* It also rounds Karras timesteps to whole ones for the network, where k-diffusion and
  `EulerDiscreteScheduler` pass fractions. As its twin it meets a network that rounds them itself.
* "linspace" is interpolated linearly in sigma by diffusers and in log sigma by k-diffusion, so
  only step counts that land on whole timesteps agree; one step starts at the first timestep in
  diffusers and at the last in k-diffusion.
* DDIM and DPM-Solver of diffusers start from unit variance whatever the spacing; ours start from
  noise times the largest sigma except for "leading", as k-diffusion and diffusers' Euler do.
* "leading" with a step for every training timestep runs off the table of diffusers, and
  "trailing" makes one step too many there for some numbers, such as 61, from rounding errors.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)

from ldm_runtime.schedules import (
    SCHEDULES,
    initial_scale,
    sampling_sigmas,
    timestep_of,
    training_sigmas,
)
from tests.reference.sampler_twin_table import LDM_DDIM, TWINS
from tests.reference.sampler_twins import (
    CONTEXT,
    KARRAS,
    LEADING,
    PREDICTION_TYPES,
    STABLE_DIFFUSION,
    TOLERANCE,
    TRAILING,
    largest_difference,
)

pytestmark = [
    pytest.mark.reference,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to NumPy functions.
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]

ONE_OF_EACH = {twin.name: twin for twin in TWINS if twin.schedule == "trailing"}.values()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("twin", "num_steps"), [(twin, count) for twin in TWINS for count in twin.num_steps], ids=str
)
def test_every_step_equals_that_of_the_diffusers_twin(twin, num_steps, prediction_type):
    difference = largest_difference(twin, num_steps, prediction_type)

    assert difference <= twin.difference


def test_every_sampler_here_is_compared_on_three_schedules():
    for name in {twin.name for twin in TWINS}:
        schedules = {twin.schedule for twin in TWINS if twin.name == name}
        assert schedules == {"leading", "trailing", "karras"}


def swap_uncond_and_cond(denoise):
    return replace(denoise, context=np.concatenate([CONTEXT[2:], CONTEXT[:2]]))


def shift_timestep_by_one(denoise):
    return replace(denoise, network=lambda x, t, context: denoise.network(x, t + 1, context))


def raise_sigma_by_a_thousandth(denoise):
    return lambda latents, sigma: denoise(latents, 1.001 * sigma)


def forget_to_scale_the_input(denoise):
    def network(latents, timesteps, context):
        sigma = np.exp(np.interp(timesteps[0], range(1000), np.log(denoise.training_sigmas)))
        return denoise.network(latents * math.hypot(1, sigma), timesteps, context)

    return replace(denoise, network=network)


@pytest.mark.parametrize(
    "plant",
    [
        swap_uncond_and_cond,
        shift_timestep_by_one,
        raise_sigma_by_a_thousandth,
        forget_to_scale_the_input,
    ],
)
@pytest.mark.parametrize("twin", ONE_OF_EACH, ids=str)
def test_a_planted_bug_is_seen_far_above_the_tolerance(twin, plant):
    difference = largest_difference(twin, twin.num_steps[1], "epsilon", plant)

    assert difference > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("schedule", "options", "most"), [("leading", LEADING, 999), ("trailing", TRAILING, 1000)]
)
def test_a_schedule_visits_the_timesteps_of_diffusers_for_every_number_of_steps(
    schedule, options, most
):
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, **LDM_DDIM, **options)
    table = training_sigmas(scheduler.alphas_cumprod.tolist())

    for num_steps in range(1, most + 1):
        scheduler.set_timesteps(num_steps)
        ours = [timestep_of(sigma, table) for sigma in SCHEDULES[schedule](table, num_steps)]
        assert len(ours) == num_steps
        assert ours == scheduler.timesteps.tolist()[:num_steps]


def linspace_sigmas(num_steps):
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="linspace")
    scheduler.set_timesteps(num_steps)
    table = training_sigmas(scheduler.alphas_cumprod.tolist())
    return sampling_sigmas(table, num_steps, "linspace", "zero"), scheduler.sigmas.numpy(), table


@pytest.mark.parametrize("num_steps", [2, 4, 10, 28, 38, 112])
def test_linspace_equals_diffusers_where_all_timesteps_are_whole(num_steps):
    ours, theirs, _ = linspace_sigmas(num_steps)

    np.testing.assert_allclose(ours, theirs, rtol=5e-7)


def test_one_linspace_step_starts_at_the_last_timestep_where_diffusers_starts_at_the_first():
    ours, theirs, table = linspace_sigmas(1)

    assert ours[0] == table[-1]
    assert theirs[0] == pytest.approx(table[0], rel=1e-6)


def test_leading_is_spaced_over_one_more_point_by_the_dpm_solver_of_diffusers():
    scheduler = DPMSolverMultistepScheduler(**STABLE_DIFFUSION, **LEADING)
    table = training_sigmas(scheduler.alphas_cumprod.tolist())
    scheduler.set_timesteps(4)

    ours = [timestep_of(sigma, table) for sigma in SCHEDULES["leading"](table, 4)]

    assert ours == [751, 501, 251, 1]
    assert scheduler.timesteps.tolist() == [801, 601, 401, 201]


def test_karras_timesteps_are_rounded_by_the_dpm_solver_of_diffusers_but_not_by_its_euler():
    table = training_sigmas(DDIMScheduler(**STABLE_DIFFUSION).alphas_cumprod.tolist())
    ours = [timestep_of(sigma, table) for sigma in SCHEDULES["karras"](table, 7)]
    dpm_solver = DPMSolverMultistepScheduler(**STABLE_DIFFUSION, **KARRAS)
    euler = EulerDiscreteScheduler(**STABLE_DIFFUSION, **KARRAS)
    dpm_solver.set_timesteps(7)
    euler.set_timesteps(7)

    np.testing.assert_allclose(ours, euler.timesteps, atol=0.01)
    assert dpm_solver.timesteps.tolist() == [round(timestep) for timestep in ours]
    assert ours != [round(timestep) for timestep in ours]


def test_variance_preserving_schedulers_of_diffusers_start_from_unit_variance_when_trailing():
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, **LDM_DDIM, **TRAILING)
    table = training_sigmas(scheduler.alphas_cumprod.tolist())
    sigmas = sampling_sigmas(table, 20, "trailing", "smallest")

    theirs = float(scheduler.init_noise_sigma) * math.hypot(1, sigmas[0])

    assert initial_scale(sigmas, "leading") == theirs
    assert initial_scale(sigmas, "trailing") == sigmas[0]
    assert sigmas[0] / theirs == pytest.approx(0.9977, abs=5e-5)


def test_trailing_makes_as_many_steps_as_asked_for_where_diffusers_makes_one_more():
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, **LDM_DDIM, **TRAILING)
    table = training_sigmas(scheduler.alphas_cumprod.tolist())
    scheduler.set_timesteps(61)

    ours = SCHEDULES["trailing"](table, 61)

    assert (len(ours), len(scheduler.timesteps)) == (61, 62)


def test_leading_with_every_timestep_ends_inside_our_table_and_outside_that_of_diffusers():
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, **LDM_DDIM, **LEADING)
    table = training_sigmas(scheduler.alphas_cumprod.tolist())
    scheduler.set_timesteps(1000)

    ours = [timestep_of(sigma, table) for sigma in SCHEDULES["leading"](table, 1000)]

    assert scheduler.timesteps.tolist() == [*range(1000, 0, -1)]
    assert ours == [*range(999, -1, -1)]
