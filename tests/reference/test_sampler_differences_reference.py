"""Where a diffusers scheduler and the source that we follow differ: the difference and the match.

Ours follow the papers, CompVis and k-diffusion. `test_samplers_sources` compares them with those
formulas, and `sampler_twin_table` makes each scheduler do as its source does; here is what they do
by themselves.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    IPNDMScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
)

from ldm_runtime.pipeline.denoiser import to_x0
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import (
    SCHEDULES,
    earlier_sigma,
    sampling_sigmas,
    timestep_of,
    training_sigmas,
)
from tests.reference.sampler_twin_table import (
    LDM_DDIM,
    LDM_PLMS,
    TWINS,
    deis_twins,
    dpm2_ancestral_twins,
    dpm2_twins,
    with_options,
)
from tests.reference.sampler_twins import (
    CONTEXT,
    KARRAS,
    LEADING,
    STABLE_DIFFUSION,
    TOLERANCE,
    TRAILING,
    Twin,
    largest_difference,
    make_noise_sampler,
    network,
)

pytestmark = [
    pytest.mark.reference,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to NumPy functions.
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]

TABLE = training_sigmas(DDIMScheduler(**STABLE_DIFFUSION).alphas_cumprod.tolist())


def twin_of(name, schedule):
    return next(twin for twin in TWINS if (twin.name, twin.schedule) == (name, schedule))


def test_plms_of_diffusers_extrapolates_v_where_ldm_extrapolates_epsilon():
    twin = twin_of("plms", "leading")
    by_itself = replace(twin, their_prediction_type=None)

    assert largest_difference(by_itself, 20, "v_prediction") > 1e-2
    assert largest_difference(twin, 20, "v_prediction") <= TOLERANCE
    assert largest_difference(by_itself, 20, "epsilon") <= TOLERANCE


@pytest.mark.parametrize(
    ("scheduler", "options"), [(DDIMScheduler, LDM_DDIM), (PNDMScheduler, LDM_PLMS)]
)
def test_ddim_and_plms_of_diffusers_step_past_the_timesteps_they_visit(scheduler, options):
    theirs = scheduler(**STABLE_DIFFUSION, **options, **TRAILING)
    theirs.set_timesteps(7)
    latents, epsilon = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)

    result = theirs.step(epsilon, 999, latents).prev_sample

    visited = SCHEDULES["trailing"](TABLE, 7)
    assert [timestep_of(sigma, TABLE) for sigma in visited[:2]] == [999, 856]
    reached = math.hypot(1, TABLE[999]) / float(result)  # sqrt(1 + sigma^2): epsilon is 0
    assert reached == pytest.approx(math.hypot(1, TABLE[999 - 1000 // 7]), rel=1e-6)
    assert reached != pytest.approx(math.hypot(1, visited[1]), rel=1e-3)


@pytest.mark.parametrize("name", ["ddim", "plms"])
def test_uneven_strides_match_once_theirs_is_made_to_visit_them(name):
    twin = twin_of(name, "trailing")

    assert largest_difference(twin, 7, "epsilon") > 1e-3
    assert largest_difference(replace(twin, custom_sigmas=True), 7, "epsilon") <= TOLERANCE


def test_ddpm_of_diffusers_adds_noise_of_1e_10_in_its_last_step_and_ours_none():
    scheduler = DDPMScheduler(**STABLE_DIFFUSION, **LEADING, clip_sample=False)
    scheduler.set_timesteps(7)
    latents = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    noise = torch.Generator().manual_seed(0)

    result = scheduler.step(latents, 1, latents, generator=noise).prev_sample

    assert float(result.std()) == pytest.approx(1e-10, rel=0.05)


def boundary_scalings(timestep):
    """c_skip and c_out of the latent consistency models of arXiv:2310.04378 as distilled."""
    scaled, data_std = 10.0 * timestep, 0.5
    return data_std**2 / (scaled**2 + data_std**2), scaled / math.hypot(scaled, data_std)


def test_lcm_of_diffusers_makes_the_network_a_consistency_function_where_ours_leaves_that_out():
    """The last step from timestep 1, where it makes the largest difference."""
    scheduler = LCMScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(timesteps=[1])
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)
    epsilon = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)
    ours = latents.numpy() * math.hypot(1, TABLE[1])
    x0 = to_x0(epsilon.numpy(), ours, float(TABLE[1]), "epsilon")

    result = scheduler.step(epsilon, scheduler.timesteps[0], latents).prev_sample.numpy()

    c_skip, c_out = boundary_scalings(1)
    assert np.abs(result - x0).max() > 1e-4
    np.testing.assert_allclose(result, c_out * x0 + c_skip * latents.numpy(), rtol=0, atol=1e-6)


def test_the_scalings_of_lcm_make_no_difference_at_the_timesteps_it_is_distilled_at():
    scheduler = LCMScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(50)

    distilled = scheduler.timesteps.tolist()

    assert min(distilled) == 19
    for timestep in distilled:
        c_skip, c_out = boundary_scalings(timestep)
        assert c_skip < 1e-5
        assert 1 - c_out < 1e-5


@pytest.mark.parametrize("scheduler", [LCMScheduler, TCDScheduler])
def test_consistency_visits_the_timesteps_of_lcm_and_tcd_for_every_number_of_steps(scheduler):
    theirs = scheduler(**STABLE_DIFFUSION)

    for num_steps in range(1, 51):
        theirs.set_timesteps(num_steps)
        ours = [timestep_of(sigma, TABLE) for sigma in SCHEDULES["consistency"](TABLE, num_steps)]
        assert ours == theirs.timesteps.tolist()


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_steps", [1, 4, 8, 50])
def test_tcd_is_that_of_diffusers_by_itself(num_steps, eta):
    by_itself = Twin(name="tcd", scheduler=TCDScheduler, schedule="consistency", eta=eta)

    assert largest_difference(by_itself, num_steps, "epsilon") <= TOLERANCE


def test_every_share_of_a_timestep_is_cut_off_as_by_tcd_of_diffusers():
    visited = torch.arange(999, 0, -20)
    for eta in np.arange(0.0, 1.0, 0.05).tolist():
        theirs = torch.floor((1 - eta) * visited).to(dtype=torch.long)

        ours = [earlier_sigma(TABLE, float(TABLE[t]), 1 - eta) for t in visited.tolist()]

        assert ours == TABLE[theirs.numpy()].tolist()


EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}


def edm_runs(num_steps, sigma_schedule):
    """Latents after every step of `dpmpp_2m` and of the scheduler of Playground 2.5."""
    theirs = EDMDPMSolverMultistepScheduler(**EDM, sigma_schedule=sigma_schedule)
    theirs.set_timesteps(num_steps)
    theirs.sigmas = theirs.sigmas.double()

    def predict(latents, sigma):
        noise_time = 1000 * (0.25 * math.log(sigma) + 1) / 3
        return network(latents / math.hypot(sigma, 0.5), np.full(2, noise_time), CONTEXT[:2])

    def denoise(latents, sigma):
        """Karras et al. 2022 (arXiv:2206.00364), table 1, "Ours"."""
        total = math.hypot(sigma, 0.5)
        return (0.5 / total) ** 2 * latents + 0.5 * sigma / total * predict(latents, sigma)

    sigmas = theirs.sigmas.tolist()
    first = make_noise_sampler(0)() * sigmas[0]
    mine = SAMPLERS["dpmpp_2m"].function(denoise, first, sigmas, eta=0.0, noise_sampler=None)
    yield from zip(mine, edm_steps(theirs, predict, torch.from_numpy(first)), strict=True)


def edm_steps(scheduler, predict, latents):
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        prediction = torch.from_numpy(predict(latents.numpy(), sigma))
        latents = scheduler.step(prediction, timestep, latents).prev_sample
        yield latents.numpy()


@pytest.mark.parametrize("sigma_schedule", ["karras", "exponential"])
@pytest.mark.parametrize("num_steps", [2, 7, 20])
def test_dpmpp_2m_is_the_edm_solver_of_diffusers_with_the_preconditioning_in_the_denoiser(
    num_steps, sigma_schedule
):
    for mine, theirs in edm_runs(num_steps, sigma_schedule):
        assert np.abs(mine - theirs).max() <= TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_the_grid_of_edm_is_a_schedule_here_of_a_table_with_its_ends(schedule):
    theirs = EDMDPMSolverMultistepScheduler(**EDM, sigma_schedule=schedule)
    theirs.set_timesteps(20)

    ours = sampling_sigmas(np.geomspace(0.002, 80, 1000), 20, schedule, "zero")

    np.testing.assert_allclose(ours, theirs.sigmas, rtol=3e-6)


def test_karras_timesteps_are_rounded_by_dpm2_of_diffusers_but_not_those_in_between():
    scheduler = KDPM2DiscreteScheduler(**STABLE_DIFFUSION, **KARRAS)
    scheduler.set_timesteps(7)
    starts, middles = scheduler.timesteps[0::2], scheduler.timesteps[1::2]
    by_itself = with_options(replace(dpm2_twins()[0], options={}), "karras", KARRAS)

    assert torch.equal(starts, starts.round())
    assert not torch.equal(middles, middles.round())
    assert largest_difference(by_itself, 7, "epsilon") > 10 * TOLERANCE
    assert largest_difference(twin_of("dpm2", "karras"), 7, "epsilon") <= TOLERANCE


def test_sigma_down_of_dpm2_ancestral_of_diffusers_cancels_in_long_steps():
    leading = dpm2_ancestral_twins()[0]
    scheduler, _, sigmas = leading.build(2, "epsilon")

    exact = sigmas[1] ** 2 / sigmas[0]
    cancelled = abs(float(scheduler.sigmas_down[0]) / exact - 1)

    assert 1e-5 < cancelled < 1e-2
    assert TOLERANCE < largest_difference(leading, 2, "v_prediction") < 1e-5
    assert largest_difference(leading, 7, "v_prediction") <= TOLERANCE


def test_deis_of_diffusers_lowers_its_order_at_the_end_of_short_runs():
    """The paper has one order from the third step on."""
    trailing = deis_twins()[0]
    by_itself = replace(trailing, options=trailing.options | {"lower_order_final": True})

    assert largest_difference(by_itself, 7, "epsilon") > 1e-3
    assert largest_difference(by_itself, 20, "epsilon") <= TOLERANCE
    assert largest_difference(trailing, 7, "epsilon") <= TOLERANCE


def test_deis_of_diffusers_ends_its_karras_sigmas_with_a_step_of_no_length():
    scheduler = DEISMultistepScheduler(**STABLE_DIFFUSION, **KARRAS)
    scheduler.set_timesteps(7)

    assert scheduler.sigmas[-1] == scheduler.sigmas[-2]
    assert sampling_sigmas(TABLE, 7, "karras", "smallest")[-1] == 0


def test_ipndm_of_diffusers_has_a_schedule_of_its_own_and_none_of_the_model_s():
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(4)

    sigmas = scheduler.betas / scheduler.alphas

    expected = [math.sin(math.pi / 2 * step) ** 2 for step in (1, 0.75, 0.5, 0.25, 0)]
    np.testing.assert_allclose(scheduler.betas, expected, atol=1e-6)
    assert float(sigmas[0]) > 1000 > TABLE[-1]
