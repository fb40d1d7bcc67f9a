"""Schedules against diffusers, and against the formulas of LDM, k-diffusion and ComfyUI.

The formulas are written here as those projects state them, in their library and precision. LDM:
`make_ddim_timesteps` (CompVis/latent-diffusion, ldm/modules/diffusionmodules/util.py). k-diffusion:
`get_sigmas_*` (crowsonkb/k-diffusion, k_diffusion/sampling.py). ComfyUI: `normal_scheduler` and
`beta_scheduler` (comfy/samplers.py). sgm: `generate_roughly_equally_spaced_steps`
(Stability-AI/generative-models, sgm/modules/diffusionmodules/discretizer.py).
"""

import math

import mpmath
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import (
    rescale_zero_terminal_snr as their_rescale,
)
from scipy.stats import beta

from ldm_runtime.schedules import (
    SCHEDULES,
    initial_scale,
    rescale_zero_terminal_snr,
    sampling_sigmas,
    training_sigmas,
)
from ldm_runtime.schedules.beta_quantiles import beta_quantiles
from ldm_runtime.schedules.ramps import karras, polyexponential

# Its arrays come from torch tensors without the keyword NumPy 2 asks for.
THEIR_WARNING = "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings(THEIR_WARNING)]

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LENGTH = 1000


@pytest.fixture(scope="module")
def table():
    return euler_table(EulerDiscreteScheduler(**STABLE_DIFFUSION))


def euler_table(scheduler):
    return training_sigmas(scheduler.alphas_cumprod.tolist())


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("leading", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("trailing", {"timestep_spacing": "trailing"}),
        ("karras", {"use_karras_sigmas": True}),
        ("exponential", {"use_exponential_sigmas": True}),
    ],
)
def test_sigmas_and_the_initial_scale_are_those_of_the_euler_scheduler(table, schedule, options):
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, **options)
    for num_steps in (2, 3, 7, 20, 50):
        scheduler.set_timesteps(num_steps)

        sigmas = sampling_sigmas(table, num_steps, schedule, "zero")

        np.testing.assert_allclose(sigmas, scheduler.sigmas, rtol=5e-7)  # theirs are float32
        scale = initial_scale(sigmas, schedule)
        assert scale == pytest.approx(float(scheduler.init_noise_sigma), rel=5e-7)


def test_linspace_interpolates_the_logarithm_as_k_diffusion_and_not_the_sigma_as_diffusers(table):
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="linspace")
    scheduler.set_timesteps(20)
    positions = torch.linspace(LENGTH - 1, 0, 20)

    sigmas = SCHEDULES["linspace"](table, 20)

    np.testing.assert_allclose(sigmas, k_diffusion_sigma(table, positions), rtol=2e-6)
    differences = np.abs(scheduler.sigmas[:-1].numpy() / sigmas - 1)
    assert 1e-5 < differences.max() < 1e-3


def k_diffusion_sigma(table, positions):
    """k-diffusion's `t_to_sigma`, and ComfyUI's `ModelSamplingDiscrete.sigma`, in float32."""
    log_sigmas = torch.tensor(table, dtype=torch.float32).log()
    low, high, weight = positions.floor().long(), positions.ceil().long(), positions.frac()
    return ((1 - weight) * log_sigmas[low] + weight * log_sigmas[high]).exp().numpy()


@pytest.mark.parametrize("num_steps", [1, 2, 5, 20, 100])
def test_the_ramps_are_those_of_k_diffusion(table, num_steps):
    low, high = float(table[0]), float(table[-1])
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    falling = torch.linspace(1, 0, num_steps, dtype=torch.float64)
    ends = math.log(high), math.log(low)

    for rho in (7.0, 3.0):
        theirs = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        np.testing.assert_allclose(karras(table, num_steps, rho), theirs, rtol=1e-13)
    theirs = torch.linspace(*ends, num_steps, dtype=torch.float64).exp()
    np.testing.assert_allclose(SCHEDULES["exponential"](table, num_steps), theirs, rtol=1e-13)
    for rho in (1.0, 2.0):
        theirs = (falling**rho * (ends[0] - ends[1]) + ends[1]).exp()
        np.testing.assert_allclose(polyexponential(table, num_steps, rho), theirs, rtol=1e-13)


@pytest.mark.parametrize("method", ["uniform", "quad"])
def test_ldms_schedules_are_its_timesteps_for_every_number_of_steps(table, method):
    schedule = {"uniform": "ldm", "quad": "ldm_quadratic"}[method]
    refused = 0
    for num_steps in range(1, LENGTH + 1):
        timesteps = ldm_timesteps(method, num_steps)
        try:
            theirs = table[timesteps][::-1].tolist()
        except IndexError:
            refused += 1
            with pytest.raises(ValueError, match="asks for timestep 1000"):
                SCHEDULES[schedule](table, num_steps)
        else:
            assert SCHEDULES[schedule](table, num_steps) == theirs
    assert refused == {"uniform": 599, "quad": 0}[method]


def ldm_timesteps(method, num_steps):
    if method == "uniform":
        stride = LENGTH // num_steps
        timesteps = np.asarray(list(range(0, LENGTH, stride)))
    else:
        timesteps = ((np.linspace(0, np.sqrt(LENGTH * 0.8), num_steps)) ** 2).astype(int)
    return timesteps + 1


def test_the_default_differs_from_ldm_exactly_where_ldm_makes_more_steps_or_none(table):
    for num_steps in range(1, LENGTH + 1):
        timesteps = ldm_timesteps("uniform", num_steps)

        same = len(timesteps) == num_steps and timesteps[-1] < LENGTH

        ours = SCHEDULES["leading"](table, num_steps)
        assert same == (ours == table[np.minimum(timesteps, LENGTH - 1)][::-1].tolist())


@pytest.mark.parametrize("num_steps", [1, 2, 3, 9, 20, 100, 999])
def test_sgm_uniform_is_comfyuis_and_sgms_is_cut_off_to_whole_timesteps(table, num_steps):
    positions = torch.linspace(LENGTH - 1, 0, num_steps + 1)[:-1]
    whole = np.linspace(LENGTH - 1, 0, num_steps, endpoint=False).astype(int)

    sigmas = SCHEDULES["sgm_uniform"](table, num_steps)

    np.testing.assert_allclose(sigmas, k_diffusion_sigma(table, positions), rtol=5e-6)
    assert (sigmas == table[whole].tolist()) == (999 % num_steps == 0)


def test_beta_visits_the_timesteps_of_comfyui_for_every_number_of_steps(table):
    """A timestep is the rounded quantile if the probability lies between those of its ends."""
    with mpmath.workdps(25):
        halves = [mpmath.mpf(2 * t + 1) / (2 * (LENGTH - 1)) for t in range(LENGTH - 1)]
        ends = [mpmath.betainc("0.6", "0.6", 0, half, regularized=True) for half in halves]
    for num_steps in range(1, 139):
        probabilities = 1 - np.linspace(0, 1, num_steps, endpoint=False)
        timesteps = np.searchsorted(table, SCHEDULES["beta"](table, num_steps))
        for probability, timestep in zip(probabilities.tolist(), timesteps, strict=True):
            if probability == 0.5:
                assert timestep == 500  # 499.5 rounds to the even one
                continue
            assert timestep == 0 or ends[timestep - 1] < probability
            assert timestep == LENGTH - 1 or probability < ends[timestep]


def test_quantiles_are_those_of_scipy():
    probabilities = np.concatenate([np.linspace(0, 1, 2001), np.logspace(-12, -1, 100)])
    for shape in (0.1, 0.5, 0.6, 0.9, 1.0):
        theirs = beta.ppf(probabilities, shape, shape)

        np.testing.assert_allclose(beta_quantiles(probabilities, shape), theirs, atol=1e-12)


def test_diffusers_beta_spreads_the_sigmas_where_ours_and_comfyuis_spreads_the_timesteps(table):
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, use_beta_sigmas=True)
    scheduler.set_timesteps(20)

    quantiles = beta_quantiles(1 - np.linspace(0, 1, 20), 0.6)
    sigmas = sampling_sigmas(table, 20, "beta", "zero")

    spread = table[0] + quantiles * (table[-1] - table[0])
    np.testing.assert_allclose(scheduler.sigmas[:-1], spread, rtol=1e-6)
    assert np.abs(scheduler.sigmas.numpy() - sigmas).max() > 1


def test_zero_terminal_snr_is_that_of_diffusers():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, LENGTH, dtype=torch.float64) ** 2
    theirs = torch.cumprod(1 - their_rescale(betas), 0).numpy()

    ours = rescale_zero_terminal_snr(torch.cumprod(1 - betas, 0).tolist())

    np.testing.assert_allclose(ours[:-1], theirs[:-1], rtol=1e-10)
    assert theirs[-1] == 0


def test_the_zero_becomes_the_small_number_of_the_euler_scheduler(table):
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, **options)
    scheduler.set_timesteps(20)
    alphas = EulerDiscreteScheduler(**STABLE_DIFFUSION).alphas_cumprod.tolist()

    sigmas = sampling_sigmas(
        training_sigmas(rescale_zero_terminal_snr(alphas)), 20, "trailing", "zero"
    )

    np.testing.assert_allclose(sigmas, scheduler.sigmas, rtol=1e-3)  # theirs rescale in float32
    assert sigmas[0] == pytest.approx(float(scheduler.sigmas[0]), rel=1e-6)
