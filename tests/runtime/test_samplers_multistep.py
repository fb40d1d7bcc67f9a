"""Multistep samplers against the formulas of their sources, in their coordinates."""

import math
from itertools import pairwise

import numpy as np
import pytest

from ldm_runtime.schedules import sampling_sigmas, training_sigmas
from ldm_runtime.testing import TINY_SPEC
from tests.runtime.sampler_cases import (
    DATA_MEAN,
    DATA_STD,
    UNEVEN,
    assert_same_steps,
    curved_denoise,
    ideal_denoise,
    no_draw,
    run,
    some_latents,
    to_alpha,
)

ABOVE_ZERO = UNEVEN[:-1]


def mean_slope_of_equal_steps(known):
    """Adams-Bashforth, by the number of slopes known, the last the newest."""
    match known:
        case [e]:
            return e
        case [e1, e]:
            return (3 * e - e1) / 2
        case [e2, e1, e]:
            return (23 * e - 16 * e1 + 5 * e2) / 12
        case [*_, e3, e2, e1, e]:
            return (55 * e - 59 * e1 + 37 * e2 - 9 * e3) / 24


def multistep_as_in_ldm(latents, sigmas, improved_start):
    """CompVis' PLMSSampler, in variance-preserving latents z."""
    z, old = latents * to_alpha(sigmas[0]), []

    def epsilon(z, sigma):
        return (z / to_alpha(sigma) - curved_denoise(z / to_alpha(sigma), sigma)) / sigma

    def moved(z, e, sigma, sigma_prev):
        a, a_prev = to_alpha(sigma) ** 2, to_alpha(sigma_prev) ** 2
        x0 = (z - math.sqrt(1 - a) * e) / math.sqrt(a)
        return math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev) * e

    for sigma, sigma_prev in pairwise(sigmas):
        old.append(epsilon(z, sigma))
        e = mean_slope_of_equal_steps(old)
        if improved_start and len(old) == 1:
            e = (e + epsilon(moved(z, e, sigma, sigma_prev), sigma_prev)) / 2
        z = moved(z, e, sigma, sigma_prev)
        yield z / to_alpha(sigma_prev)


def test_plms_is_that_of_ldm_with_its_improved_first_step():
    results = run("plms", some_latents(), UNEVEN, 0.0, no_draw)

    assert_same_steps(results, multistep_as_in_ldm(some_latents(), UNEVEN, improved_start=True))


def test_ipndm_is_plms_with_a_plain_first_step():
    results = run("ipndm", some_latents(), UNEVEN, 0.0, no_draw)

    assert_same_steps(results, multistep_as_in_ldm(some_latents(), UNEVEN, improved_start=False))


def lagrange(knots, index):
    others = [knot for knot in knots if knot != knots[index]]
    basis = (
        np.polynomial.Polynomial.fromroots(others) if others else np.polynomial.Polynomial([1.0])
    )
    return basis / basis(knots[index])


def polynomial_weight(knots, index, end):
    """The integral of a Lagrange polynomial of sigma, from its antiderivative."""
    antiderivative = lagrange(knots, index).integ()
    return antiderivative(end) - antiderivative(knots[0])


def exponential_weight(knots, index, end):
    """The integral over rho of a Lagrange polynomial p of u = log rho.

    The antiderivative of p(u) e^u is (p - p' + p'' - ...)(u) e^u.
    """
    logs = np.log(knots).tolist()
    series = lagrange(logs, index)
    total = sum((-1) ** order * series.deriv(order) for order in range(1, len(knots))) + series
    return total(math.log(end)) * end - total(logs[0]) * knots[0]


def multistep_of_any_length(x, sigmas, order, weight):
    slopes = []
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        slopes = [(x - curved_denoise(x, sigma)) / sigma, *slopes][:order]
        knots = sigmas[max(index + 1 - order, 0) : index + 1][::-1]
        x = x + sum(weight(knots, j, sigma_next) * slope for j, slope in enumerate(slopes))
        yield x


def test_lms_is_that_of_k_diffusion_with_exact_integrals_down_to_zero():
    results = run("lms", some_latents(), UNEVEN, 0.0, no_draw)

    expected = multistep_of_any_length(some_latents(), UNEVEN, 4, polynomial_weight)
    assert_same_steps(results, expected)


def test_deis_integrates_the_polynomial_in_log_rho_exactly():
    results = run("deis", some_latents(), ABOVE_ZERO, 0.0, no_draw)

    expected = multistep_of_any_length(some_latents(), ABOVE_ZERO, 3, exponential_weight)
    assert_same_steps(results, expected)


def test_deis_stays_exact_in_the_long_steps_of_a_schedule_without_terminal_signal():
    sigmas = [5000.0, 30.0, 0.002]

    results = run("deis", some_latents(), sigmas, 0.0, no_draw)

    expected = list(multistep_of_any_length(some_latents(), sigmas, 3, exponential_weight))
    np.testing.assert_allclose(results[-1], expected[-1], rtol=1e-10, atol=1e-8)


def dpmpp_2m_as_in_the_paper(latents, sigmas):
    """Algorithm 2 of arXiv:2211.01095 in variance-preserving latents z, lambda = log(alpha / s)."""
    z = latents * to_alpha(sigmas[0])
    last = None
    for sigma, sigma_next in pairwise(sigmas):
        alpha_next = to_alpha(sigma_next)
        std, std_next = sigma * to_alpha(sigma), sigma_next * alpha_next
        h = math.log(sigma) - math.log(sigma_next)  # lambda_next - lambda
        x0 = curved_denoise(z / to_alpha(sigma), sigma)
        d = x0
        if last is not None:
            last_x0, last_h = last
            r = last_h / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last_x0
        z = std_next / std * z - alpha_next * (math.exp(-h) - 1) * d
        last = x0, h
        yield z / alpha_next


def test_dpmpp_2m_is_the_paper_s_update_on_uneven_steps():
    results = run("dpmpp_2m", some_latents(), ABOVE_ZERO, 0.0, no_draw)

    assert_same_steps(results, dpmpp_2m_as_in_the_paper(some_latents(), ABOVE_ZERO))


@pytest.mark.parametrize("name", ["dpmpp_2m", "lms", "ipndm", "deis"])
def test_a_multistep_sampler_starts_with_an_euler_step(name):
    [result] = run(name, some_latents(), UNEVEN[:2], 0.0, no_draw)

    [expected] = run("euler", some_latents(), UNEVEN[:2], 0.0, no_draw)
    np.testing.assert_allclose(result, expected, rtol=1e-13)


def test_lms_counts_a_repeated_sigma_once():
    with_repeat = run("lms", some_latents(), [10.0, 4.0, 4.0, 3.0, 0.5], 0.0, no_draw)

    without = run("lms", some_latents(), [10.0, 4.0, 3.0, 0.5], 0.0, no_draw)
    np.testing.assert_allclose(with_repeat[-1], without[-1], rtol=1e-13)


def test_a_single_step_of_plms_calls_the_denoiser_once():
    seen = []

    def denoise(latents, sigma):
        seen.append(sigma)
        return 0.5 * latents

    run("plms", some_latents(), [4.0, 3.0], 0.0, no_draw, denoise)

    assert seen == [4.0]


@pytest.mark.parametrize(("steps", "rounding"), [(100, 1e-4), (1000, 3e-3)])
def test_the_long_last_step_of_lms_magnifies_rounding_only_in_many_steps(steps, rounding):
    table = training_sigmas(TINY_SPEC.alphas_cumprod)
    sigmas = sampling_sigmas(table, steps, "karras", "zero")
    latents = np.random.default_rng(0).standard_normal((4, 8, 8)) * sigmas[0]

    exact, rounded = (
        run("lms", latents.astype(dtype), sigmas, 0.0, no_draw, ideal_denoise)[-1]
        for dtype in (np.float64, np.float32)
    )

    wanted = DATA_MEAN + (latents - DATA_MEAN) * DATA_STD / math.hypot(DATA_STD, sigmas[0])
    assert abs(exact - wanted).max() < 1e-4
    assert (abs(rounded - wanted).max() < rounding) == (steps == 100)
