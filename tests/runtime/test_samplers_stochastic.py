import math
from itertools import pairwise

import numpy as np
import pytest

from ldm_runtime.noise.brownian import BrownianPath
from ldm_runtime.samplers.dpm_solver import dpmpp_2m
from ldm_runtime.samplers.two_stage import dpmpp_2s_ancestral
from tests.runtime.sampler_cases import (
    DATA_MEAN,
    DATA_STD,
    SHAPE,
    UNEVEN,
    curved_denoise,
    ideal_denoise,
    no_draw,
    run,
    some_latents,
)

NAMES = ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"]
ABOVE_ZERO = UNEVEN[:-1]


def even_grid(num_steps, last=0.5):
    """Sigmas from 10 to `last`, evenly spaced in log sigma."""
    return np.geomspace(10.0, last, num_steps + 1).tolist()


def ancestral(sigma, sigma_next, eta):
    """The sigmas to go down to and to add of k-diffusion."""
    up = eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
    return math.sqrt(sigma_next**2 - up**2), up


def dpmpp_sde_as_in_k_diffusion(sigmas, eta, noise_sampler):
    x = some_latents()
    for sigma, sigma_next in pairwise(sigmas):
        t, h = -math.log(sigma), math.log(sigma / sigma_next)
        middle = math.exp(-t - h / 2)
        down, up = ancestral(sigma, middle, eta)
        first = curved_denoise(x, sigma)
        x_2 = down / sigma * x - math.expm1(math.log(down / sigma)) * first
        x_2 = x_2 + up * noise_sampler(sigma, middle)
        second = curved_denoise(x_2, middle)
        down, up = ancestral(sigma, sigma_next, eta)
        x = down / sigma * x - math.expm1(math.log(down / sigma)) * second
        x = x + up * noise_sampler(sigma, sigma_next)
        yield x


def dpmpp_2m_sde_as_in_k_diffusion(sigmas, eta, noise_sampler):
    x, last, h_last = some_latents(), None, None
    for sigma, sigma_next in pairwise(sigmas):
        h = math.log(sigma / sigma_next)
        gain = -math.expm1(-h - eta * h)
        x0 = curved_denoise(x, sigma)
        x = sigma_next / sigma * math.exp(-eta * h) * x + gain * x0
        if last is not None:
            x = x + gain / 2 * (h / h_last) * (x0 - last)
        x = x + sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) * noise_sampler(sigma, sigma_next)
        last, h_last = x0, h
        yield x


def dpmpp_3m_sde_as_in_k_diffusion(sigmas, eta, noise_sampler):
    x, x0s, widths = some_latents(), [], []
    for sigma, sigma_next in pairwise(sigmas):
        h = math.log(sigma / sigma_next)
        h_eta = h * (1 + eta)
        x0s.insert(0, curved_denoise(x, sigma))
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * x0s[0]
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        slopes = [(x0s[i] - x0s[i + 1]) * h / width for i, width in enumerate(widths[:2])]
        if len(slopes) == 1:
            x = x + phi_2 * slopes[0]
        if len(slopes) == 2:
            r_0, r_1 = widths[0] / h, widths[1] / h
            d_2 = (slopes[0] - slopes[1]) / (r_0 + r_1)
            x = x + phi_2 * (slopes[0] + r_0 * d_2) - (phi_2 / h_eta - 0.5) * d_2
        x = x + sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) * noise_sampler(sigma, sigma_next)
        widths.insert(0, h)
        yield x


AS_IN_K_DIFFUSION = {
    "dpmpp_sde": dpmpp_sde_as_in_k_diffusion,
    "dpmpp_2m_sde": dpmpp_2m_sde_as_in_k_diffusion,
    "dpmpp_3m_sde": dpmpp_3m_sde_as_in_k_diffusion,
}


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_that_of_k_diffusion_for_every_eta(name, eta):
    results = run(name, some_latents(), ABOVE_ZERO, eta, BrownianPath(1, SHAPE))

    expected = AS_IN_K_DIFFUSION[name](ABOVE_ZERO, eta, BrownianPath(1, SHAPE))
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("final_sigma", [0.0, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_the_samples_have_the_mean_and_variance_of_the_data(name, final_sigma):
    shape = (20_000,)
    sigmas = np.geomspace(10.0, 0.3, 60).tolist()
    if final_sigma == 0:
        sigmas = [*sigmas[:-1], *np.geomspace(0.3, 0.01, 30).tolist(), 0.0]
    noise = np.random.default_rng(7).standard_normal(shape)
    latents = DATA_MEAN + math.hypot(DATA_STD, sigmas[0]) * noise

    *_, result = run(name, latents, sigmas, 1.0, BrownianPath(8, shape), ideal_denoise)

    variance = DATA_STD**2 + final_sigma**2
    # Five standard errors of the sample mean; 3.5 of the sample variance and the steps' own error.
    assert result.mean() == pytest.approx(DATA_MEAN, abs=5 * math.sqrt(variance / shape[0]))
    assert result.var() == pytest.approx(variance, rel=0.035)


@pytest.mark.parametrize("name", NAMES)
def test_with_less_noise_than_asked_for_the_variance_is_seen_to_be_wrong(name):
    path, latents = BrownianPath(8, (20_000,)), np.zeros(20_000)

    def weak(*stretch):
        return 0.9 * path(*stretch)

    *_, result = run(name, latents, even_grid(40), 1.0, weak, ideal_denoise)

    assert result.var() < 0.9 * (DATA_STD**2 + 0.5**2)


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_the_noise_of_a_run_adds_up_to_the_same_for_every_number_of_steps(name):
    totals = []
    for num_steps in (3, 17):
        path, total = BrownianPath(3, SHAPE), np.zeros(SHAPE)

        def noise_sampler(sigma, sigma_next, path=path, total=total):
            noise = path(sigma, sigma_next)
            total += math.sqrt(sigma - sigma_next) * noise
            return noise

        run(name, some_latents(), even_grid(num_steps), 1.0, noise_sampler)
        totals.append(total)

    np.testing.assert_allclose(*totals, atol=1e-5)


def test_dpmpp_sde_draws_the_half_and_the_whole_of_each_step():
    asked = []

    def noise_sampler(*stretch):
        asked.append(stretch)
        return np.zeros(SHAPE)

    run("dpmpp_sde", some_latents(), [9.0, 4.0, 1.0, 0.0], 1.0, noise_sampler)

    assert asked == [(9.0, 6.0), (9.0, 4.0), (4.0, 2.0), (4.0, 1.0)]


def distances_to_the_fine_run(name, make_path, counts=(8, 32, 128), fine=1024):
    """Root mean square distance of runs from one of many steps, for ever more steps."""
    ends = []
    for count in (*counts, fine):
        sigmas = even_grid(count, last=0.1)
        *_, end = run(name, np.zeros(200), sigmas, 1.0, make_path(), ideal_denoise)
        ends.append(end)
    return [float(np.sqrt(np.mean((end - ends[-1]) ** 2))) for end in ends[:-1]]


@pytest.mark.parametrize("name", NAMES)
def test_on_one_path_four_times_the_steps_come_more_than_twice_as_close(name):
    coarse, middle, fine = distances_to_the_fine_run(name, lambda: BrownianPath(5, (200,)))

    assert coarse / middle > 2
    assert middle / fine > 2
    assert fine < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_with_fresh_noise_in_every_run_more_steps_come_no_closer(name):
    seeds = iter(range(10))

    distances = distances_to_the_fine_run(name, lambda: BrownianPath(next(seeds), (200,)))

    assert min(distances) > 0.5


@pytest.mark.parametrize(
    ("name", "method"), [("dpmpp_2m_sde", dpmpp_2m), ("dpmpp_sde", dpmpp_2s_ancestral)]
)
@pytest.mark.parametrize("sigmas", [ABOVE_ZERO, UNEVEN])
def test_without_noise_it_is_the_method_for_the_probability_flow_equation(name, method, sigmas):
    results = run(name, some_latents(), sigmas, 0.0, no_draw)

    expected = method(curved_denoise, some_latents(), sigmas, eta=0.0, noise_sampler=no_draw)
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-13)
