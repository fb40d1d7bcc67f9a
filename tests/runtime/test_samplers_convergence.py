"""Where samplers end on a Gaussian, whose ideal denoiser and exact solution are known."""

import math
from itertools import pairwise

import numpy as np
import pytest

from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import earlier_sigma
from tests.runtime.sampler_cases import (
    DATA_MEAN,
    DATA_STD,
    DETERMINISTIC,
    STOCHASTIC,
    TABLE,
    UNEVEN,
    draw_for,
    ideal_denoise,
    no_draw,
    normal_draw,
    run,
    some_latents,
)

HIGHEST, LOWEST = 2.0, 0.2  # around DATA_STD, where the solution bends most
EQUAL_STEPS = {"plms", "ipndm"}  # their weights take all steps for equally long
OWN_ORDER = {"lms": 4, "deis": 3}  # of their polynomials, which the first steps lack points for


def sigmas_at(depths):
    """Sigmas at depths from 0 to 1 in log sigma."""
    return (HIGHEST * (LOWEST / HIGHEST) ** np.asarray(depths)).tolist()


def even_grid(num_steps):
    return sigmas_at(np.linspace(0, 1, num_steps + 1))


def uneven_grid(num_steps):
    """Sigmas whose steps in log sigma alternate between 1 and 2 units."""
    widths = np.tile([1.0, 2.0], num_steps // 2)
    return sigmas_at(np.concatenate([[0.0], np.cumsum(widths)]) / widths.sum())


def finely_started_grid(num_steps):
    """An even grid whose first step is divided: each part is twice the one before."""
    halvings = range(2 * int(math.log2(num_steps)), 0, -1)
    return sigmas_at(
        [0.0, *(0.5**k / num_steps for k in halvings), *np.arange(1, num_steps + 1) / num_steps]
    )


def final_error(name, sigmas):
    latents = some_latents()
    shrinkage = np.hypot(DATA_STD, sigmas[-1]) / np.hypot(DATA_STD, sigmas[0])
    exact = DATA_MEAN + (latents - DATA_MEAN) * shrinkage

    *_, result = run(name, latents, sigmas, 0.0, no_draw, ideal_denoise)

    return np.abs(result - exact).max()


def measured_order(name, grid, num_steps=384):
    """Both numbers of steps are multiples of 3, by which DPM-Solver shares them out."""
    return math.log2(final_error(name, grid(num_steps)) / final_error(name, grid(2 * num_steps)))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_error_falls_with_the_number_of_steps_to_the_power_of_the_order(name):
    assert measured_order(name, even_grid) == pytest.approx(SAMPLERS[name].order, abs=0.12)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_steps_of_changing_length_cost_only_those_their_order_that_take_them_for_equal(name):
    order = 1 if name in EQUAL_STEPS else SAMPLERS[name].order

    assert measured_order(name, uneven_grid) == pytest.approx(order, abs=0.12)


@pytest.mark.parametrize(("name", "order"), OWN_ORDER.items())
def test_a_fine_start_shows_the_order_of_the_polynomial_itself(name, order):
    assert measured_order(name, finely_started_grid, 128) == pytest.approx(order, abs=0.12)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_single_step_is_one_of_euler_or_better(name):
    sigmas = [2.0, 1.9]

    assert final_error(name, sigmas) <= final_error("euler", sigmas) * (1 + 1e-12)


@pytest.mark.parametrize("final_sigma", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "eta"), [case for case in STOCHASTIC if case[0] not in ("lcm", "tcd")]
)
def test_a_stochastic_sampler_reaches_the_mean_and_variance_of_the_data(name, eta, final_sigma):
    shape, num_steps = (40_000,), 150 if SAMPLERS[name].order == 1 else 40
    sigmas = np.geomspace(10.0, 0.3, num_steps).tolist()
    if final_sigma == 0:
        sigmas = [*sigmas[:-1], *np.geomspace(0.3, 0.01, num_steps).tolist(), 0.0]
    start = normal_draw(shape, seed=7)(math.inf, sigmas[0])
    latents = DATA_MEAN + math.hypot(DATA_STD, sigmas[0]) * start

    *_, result = run(name, latents, sigmas, eta, draw_for(name, shape, seed=8), ideal_denoise)

    variance = DATA_STD**2 + final_sigma**2
    # Five standard errors of the sample mean; 3.5 of the sample variance and the steps' own error.
    assert result.mean() == pytest.approx(DATA_MEAN, abs=5 * math.sqrt(variance / shape[0]))
    assert result.var() == pytest.approx(variance, rel=0.025)


def ideal_consistency(latents, sigma):
    """Where the probability-flow equation takes latents from `sigma` to 0."""
    return DATA_MEAN + (latents - DATA_MEAN) * (DATA_STD / math.hypot(DATA_STD, sigma))


@pytest.mark.parametrize("final_sigma", [0.0, 0.3])
def test_lcm_reaches_the_mean_and_variance_of_the_data_with_a_consistency_model(final_sigma):
    shape, sigmas = (40_000,), [10.0, 2.0, 0.5, final_sigma]
    noise_sampler = normal_draw(shape, seed=7)
    latents = DATA_MEAN + math.hypot(DATA_STD, sigmas[0]) * noise_sampler(math.inf, sigmas[0])

    *_, result = run("lcm", latents, sigmas, 1.0, noise_sampler, ideal_consistency)

    variance = DATA_STD**2 + final_sigma**2
    assert result.mean() == pytest.approx(DATA_MEAN, abs=5 * math.sqrt(variance / shape[0]))
    assert result.var() == pytest.approx(variance, rel=0.025)


def ideal_trajectory(sigmas, eta):
    """A model whose steps with TCD end on the trajectory of the probability-flow equation."""
    ends = {sigma: earlier_sigma(TABLE, end, 1 - eta) for sigma, end in pairwise(sigmas)}

    def denoise(latents, sigma):
        share = ends[sigma] / sigma
        on_trajectory = np.hypot(DATA_STD, ends[sigma]) / np.hypot(DATA_STD, sigma)
        return DATA_MEAN + (latents - DATA_MEAN) * (on_trajectory - share) / (1 - share)

    return denoise


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_tcd_reaches_the_mean_and_variance_with_a_trajectory_consistency_model(eta):
    shape, sigmas = (40_000,), [10.0, 2.0, 0.5, 0.3]
    noise_sampler = normal_draw(shape, seed=7)
    latents = DATA_MEAN + math.hypot(DATA_STD, sigmas[0]) * noise_sampler(math.inf, sigmas[0])

    *_, result = run("tcd", latents, sigmas, eta, noise_sampler, ideal_trajectory(sigmas, eta))

    variance = DATA_STD**2 + sigmas[-1] ** 2
    assert result.mean() == pytest.approx(DATA_MEAN, abs=5 * math.sqrt(variance / shape[0]))
    assert result.var() == pytest.approx(variance, rel=0.025)


def test_ddim_with_eta_zero_equals_euler_to_rounding():
    from_ddim = run("ddim", some_latents(), UNEVEN, 0.0, no_draw)

    from_euler = run("euler", some_latents(), UNEVEN, 0.0, no_draw)

    np.testing.assert_allclose(from_ddim, from_euler, rtol=1e-14)


def test_tcd_with_eta_zero_is_ddim_without_noise_to_the_last_bit():
    from_tcd = run("tcd", some_latents(), UNEVEN, 0.0, no_draw)

    np.testing.assert_array_equal(from_tcd, run("ddim", some_latents(), UNEVEN, 0.0, no_draw))
