import math
from itertools import pairwise

import numpy as np
import pytest

from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.samplers.dpm_solver import dpmpp_2m
from ldm_runtime.samplers.first_order import ddim, euler
from ldm_runtime.schedules import SCHEDULES, sampling_sigmas, training_sigmas

DATA_MEAN, DATA_STD = 1.5, 0.5
UNEVEN = [10.0, 4.0, 3.0, 0.5, 0.2, 0.0]  # neighbouring steps differ in log sigma
STOCHASTIC = [("ddim", 0.5), ("ddim", 1.0), ("euler_ancestral", 0.5), ("euler_ancestral", 1.0)]


def ideal_denoise(latents, sigma):
    """Best possible denoiser when the data is Gaussian with DATA_MEAN and DATA_STD."""
    return DATA_MEAN + (latents - DATA_MEAN) * (DATA_STD**2 / (DATA_STD**2 + sigma**2))


def curved_denoise(latents, sigma):
    """Some smooth function that no two sigmas share."""
    return (0.3 + 0.1 * sigma) / (1 + latents * latents) - 0.05 * sigma * latents


def no_draw(sigma, sigma_next):
    raise AssertionError("a deterministic sampler must not draw noise")


def normal_draw(shape, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return lambda sigma, sigma_next: rng.standard_normal(shape).astype(dtype)


def some_latents(dtype=np.float64):
    return np.linspace(-20.0, 20.0, 16).reshape(2, 2, 2, 2).astype(dtype)


def uneven_grid(num_steps):
    """Sigmas from 10 to 0.02 whose steps in log sigma alternate between 1 and 2 units."""
    widths = np.tile([1.0, 2.0], num_steps // 2)
    depth = np.concatenate([[0.0], np.cumsum(widths)]) / widths.sum()
    return (10.0 * (0.02 / 10.0) ** depth).tolist()


def final_error(sampler, num_steps):
    latents, sigmas = some_latents(), uneven_grid(num_steps)
    spread = np.hypot(DATA_STD, sigmas[-1]) / np.hypot(DATA_STD, sigmas[0])
    exact = DATA_MEAN + (latents - DATA_MEAN) * spread

    *_, result = sampler(ideal_denoise, latents, sigmas, eta=0.0, draw=no_draw)

    return np.abs(result - exact).max()


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("dpmpp_2m", 2)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(name, order):
    sampler = SAMPLERS[name].function

    ratio = final_error(sampler, 256) / final_error(sampler, 512)

    assert ratio == pytest.approx(2**order, rel=0.1)


def test_ddim_with_eta_zero_equals_euler_to_rounding():
    pairs = zip(
        ddim(curved_denoise, some_latents(), UNEVEN, eta=0.0, draw=no_draw),
        euler(curved_denoise, some_latents(), UNEVEN, eta=0.0, draw=no_draw),
        strict=True,
    )

    for from_ddim, from_euler in pairs:
        np.testing.assert_allclose(from_ddim, from_euler, rtol=1e-14)


def test_an_euler_step_follows_the_slope_from_its_start():
    latents, sigma, sigma_next = some_latents(), 4.0, 3.0

    [result] = euler(curved_denoise, latents, [sigma, sigma_next], eta=0.0, draw=no_draw)

    slope = (latents - curved_denoise(latents, sigma)) / sigma
    np.testing.assert_allclose(result, latents + (sigma_next - sigma) * slope, rtol=1e-13)


def test_euler_ignores_eta():
    results = [
        list(euler(curved_denoise, some_latents(), UNEVEN, eta=eta, draw=no_draw))
        for eta in (0.0, 1.0)
    ]

    np.testing.assert_array_equal(*results)


def ddim_as_in_the_paper(denoise, latents, sigmas, eta, draw):
    """Equations 12 and 16 of arXiv:2010.02502, in variance-preserving latents z."""
    z = latents / math.hypot(1, sigmas[0])
    for sigma, sigma_prev in pairwise(sigmas):
        a, a_prev = 1 / (1 + sigma**2), 1 / (1 + sigma_prev**2)
        x0 = denoise(z / math.sqrt(a), sigma)
        epsilon = (z - math.sqrt(a) * x0) / math.sqrt(1 - a)
        std = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)
        z = math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev - std**2) * epsilon
        z = z + std * draw(math.nan, math.nan)
        yield z / math.sqrt(a_prev)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_the_paper_s_update_for_every_eta(eta):
    latents, sigmas = some_latents(), UNEVEN[:-1]
    shape = latents.shape

    results = ddim(curved_denoise, latents, sigmas, eta=eta, draw=normal_draw(shape))

    expected = ddim_as_in_the_paper(curved_denoise, latents, sigmas, eta, normal_draw(shape))
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-11, atol=1e-12)


def test_an_eta_above_one_adds_no_more_noise_than_the_next_sigma():
    latents = some_latents()

    [result] = ddim(curved_denoise, latents, [4.0, 3.0], eta=2.0, draw=lambda *_: 0 * latents + 1)

    np.testing.assert_allclose(result, curved_denoise(latents, 4.0) + 3.0, rtol=1e-14)


def dpmpp_2m_as_in_the_paper(denoise, latents, sigmas):
    """Algorithm 2 of arXiv:2211.01095 in variance-preserving latents z, lambda = log(alpha / s)."""
    z = latents / math.hypot(1, sigmas[0])
    last = None
    for sigma, sigma_next in pairwise(sigmas):
        alpha_next = 1 / math.hypot(1, sigma_next)
        std, std_next = sigma / math.hypot(1, sigma), sigma_next * alpha_next
        h = math.log(sigma) - math.log(sigma_next)  # lambda_next - lambda
        x0 = denoise(z * math.hypot(1, sigma), sigma)
        d = x0
        if last is not None:
            last_x0, last_h = last
            r = last_h / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last_x0
        z = std_next / std * z - alpha_next * (math.exp(-h) - 1) * d
        last = x0, h
        yield z / alpha_next


def test_dpmpp_2m_is_the_paper_s_update_on_uneven_steps():
    latents, sigmas = some_latents(), UNEVEN[:-1]

    results = dpmpp_2m(curved_denoise, latents, sigmas, eta=0.0, draw=no_draw)

    expected = dpmpp_2m_as_in_the_paper(curved_denoise, latents, sigmas)
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-11, atol=1e-12)


def test_dpmpp_2m_starts_with_an_euler_step():
    [result] = dpmpp_2m(curved_denoise, some_latents(), UNEVEN[:2], eta=0.0, draw=no_draw)

    [expected] = euler(curved_denoise, some_latents(), UNEVEN[:2], eta=0.0, draw=no_draw)
    np.testing.assert_allclose(result, expected, rtol=1e-14)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_to_sigma_zero_is_the_last_prediction_itself(name):
    predictions = []

    def denoise(latents, sigma):
        predictions.append(curved_denoise(latents, sigma))
        return predictions[-1]

    *_, result = SAMPLERS[name].function(
        denoise, some_latents(), UNEVEN, eta=0.0, draw=normal_draw((2, 2, 2, 2))
    )

    np.testing.assert_array_equal(result, predictions[-1])


@pytest.mark.parametrize("final_sigma", [0.0, 0.3])
@pytest.mark.parametrize(("name", "eta"), STOCHASTIC)
def test_a_stochastic_sampler_reaches_the_mean_and_variance_of_the_data(name, eta, final_sigma):
    shape, num_steps = (40_000,), 150
    sigmas = np.geomspace(10.0, 0.3, num_steps).tolist()
    if final_sigma == 0:
        sigmas = [*sigmas[:-1], *np.geomspace(0.3, 0.01, num_steps).tolist(), 0.0]
    draw = normal_draw(shape, seed=7)
    latents = DATA_MEAN + math.hypot(DATA_STD, sigmas[0]) * draw(math.inf, sigmas[0])

    *_, result = SAMPLERS[name].function(ideal_denoise, latents, sigmas, eta=eta, draw=draw)

    variance = DATA_STD**2 + final_sigma**2
    # Five standard errors of the sample mean; 3.5 of the sample variance and the steps' own error.
    assert result.mean() == pytest.approx(DATA_MEAN, abs=5 * math.sqrt(variance / shape[0]))
    assert result.var() == pytest.approx(variance, rel=0.025)


@pytest.mark.parametrize(("name", "eta"), STOCHASTIC)
def test_noise_is_drawn_once_for_every_step_that_ends_above_zero(name, eta):
    draws = []

    def draw(sigma, sigma_next):
        draws.append(1)
        return np.zeros((2, 2, 2, 2))

    for sigmas, expected in [(UNEVEN, 4), (UNEVEN[:-1], 4)]:
        draws.clear()

        list(SAMPLERS[name].function(curved_denoise, some_latents(), sigmas, eta=eta, draw=draw))

        assert len(draws) == expected


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_draws_are_the_only_source_of_randomness(name):
    record = SAMPLERS[name]

    def last(seed):
        draw = normal_draw((2, 2, 2, 2), seed)
        *_, result = record.function(
            curved_denoise, some_latents(), UNEVEN[:-1], eta=record.default_eta, draw=draw
        )
        return result

    np.testing.assert_array_equal(last(1), last(1))
    assert np.array_equal(last(1), last(2)) == (record.default_eta == 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_dtype_of_the_latents_stays_on_every_schedule(name, schedule, dtype):
    record = SAMPLERS[name]
    table = training_sigmas(np.linspace(0.99, 0.01, 50).tolist())
    sigmas = sampling_sigmas(table, 5, schedule, record.final_sigma)
    draw = normal_draw((2, 2, 2, 2), dtype=dtype)

    results = list(
        record.function(
            lambda latents, sigma: latents * (1 / (1 + sigma)),
            some_latents(dtype),
            sigmas,
            eta=record.default_eta,
            draw=draw,
        )
    )

    assert {result.dtype for result in results} == {np.dtype(dtype)}


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_array_is_written_to(name):
    def frozen(array):
        array.flags.writeable = False
        return array

    def denoise(latents, sigma):
        return frozen(curved_denoise(frozen(latents), sigma))

    results = SAMPLERS[name].function(
        denoise,
        frozen(some_latents()),
        UNEVEN,
        eta=1.0,
        draw=lambda *_: frozen(np.ones((2, 2, 2, 2))),
    )

    assert len([frozen(result) for result in results]) == len(UNEVEN) - 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_denoiser_is_called_once_a_step_and_only_when_the_step_is_asked_for(name):
    record, seen = SAMPLERS[name], []

    def denoise(latents, sigma):
        seen.append(sigma)
        return 0.5 * latents

    run = record.function(denoise, some_latents(), UNEVEN, eta=0.0, draw=normal_draw((2, 2, 2, 2)))

    assert seen == []
    for step, _ in enumerate(run, start=1):
        assert seen == UNEVEN[:step]
    assert record.calls_per_step * (len(UNEVEN) - 1) == len(seen)


def test_the_registry_names_the_samplers_and_only_some_take_eta():
    eta_of = {name: (record.uses_eta, record.default_eta) for name, record in SAMPLERS.items()}

    assert eta_of == {
        "ddim": (True, 0.0),
        "euler": (False, 0.0),
        "euler_ancestral": (True, 1.0),
        "dpmpp_2m": (False, 0.0),
    }
    assert {record.schedule for record in SAMPLERS.values()} <= set(SCHEDULES)


def test_only_ddim_ends_at_the_smallest_training_sigma():
    ends = {name: record.final_sigma for name, record in SAMPLERS.items()}

    assert ends.pop("ddim") == "smallest"
    assert set(ends.values()) == {"zero"}
