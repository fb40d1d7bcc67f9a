"""Samplers against the formulas of their sources, written out plainly and in their coordinates."""

import math
from itertools import pairwise

import numpy as np
import pytest

from tests.runtime.sampler_cases import (
    SHAPE,
    TABLE,
    UNEVEN,
    assert_same_steps,
    curved_denoise,
    no_draw,
    normal_draw,
    run,
    some_latents,
    to_alpha,
)

ABOVE_ZERO = UNEVEN[:-1]


def test_an_euler_step_follows_the_slope_from_its_start():
    latents, sigma, sigma_next = some_latents(), 4.0, 3.0

    [result] = run("euler", latents, [sigma, sigma_next], 0.0, no_draw)

    slope = (latents - curved_denoise(latents, sigma)) / sigma
    np.testing.assert_allclose(result, latents + (sigma_next - sigma) * slope, rtol=1e-13)


def ddim_as_in_the_paper(latents, sigmas, eta, noise_sampler):
    """Equations 12 and 16 of arXiv:2010.02502, in variance-preserving latents z."""
    z = latents * to_alpha(sigmas[0])
    for sigma, sigma_prev in pairwise(sigmas):
        a, a_prev = 1 / (1 + sigma**2), 1 / (1 + sigma_prev**2)
        x0 = curved_denoise(z / math.sqrt(a), sigma)
        epsilon = (z - math.sqrt(a) * x0) / math.sqrt(1 - a)
        std = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)
        z = math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev - std**2) * epsilon
        z = z + std * noise_sampler(math.nan, math.nan)
        yield z / math.sqrt(a_prev)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_the_paper_s_update_for_every_eta(eta):
    results = run("ddim", some_latents(), ABOVE_ZERO, eta, normal_draw(SHAPE))

    expected = ddim_as_in_the_paper(some_latents(), ABOVE_ZERO, eta, normal_draw(SHAPE))
    assert_same_steps(results, expected)


def test_an_eta_above_one_adds_no_more_noise_than_the_next_sigma():
    latents = some_latents()

    [result] = run("ddim", latents, [4.0, 3.0], 2.0, lambda *_: 0 * latents + 1)

    np.testing.assert_allclose(result, curved_denoise(latents, 4.0) + 3.0, rtol=1e-14)


def ddpm_as_in_the_paper(latents, sigmas, noise_sampler):
    """Equations 6 and 7 of arXiv:2006.11239; no noise in the last step."""
    z = latents * to_alpha(sigmas[0])
    for sigma, sigma_prev in pairwise(sigmas):
        a, a_prev = 1 / (1 + sigma**2), 1 / (1 + sigma_prev**2)
        beta = 1 - a / a_prev
        x0 = curved_denoise(z / math.sqrt(a), sigma)
        z = (
            math.sqrt(a_prev) * beta / (1 - a) * x0
            + math.sqrt(1 - beta) * (1 - a_prev) / (1 - a) * z
        )
        if sigma_prev > 0:
            z = z + math.sqrt((1 - a_prev) / (1 - a) * beta) * noise_sampler(sigma, sigma_prev)
        yield z / math.sqrt(a_prev)


def test_ddpm_is_the_paper_s_posterior_with_its_own_variance():
    results = run("ddpm", some_latents(), UNEVEN, 1.0, normal_draw(SHAPE))

    assert_same_steps(results, ddpm_as_in_the_paper(some_latents(), UNEVEN, normal_draw(SHAPE)))


def lcm_as_in_the_paper(latents, sigmas, noise_sampler):
    """Multistep sampling of arXiv:2310.04378: z = alpha f(z) + sigma noise, f the consistency."""
    z = latents * to_alpha(sigmas[0])
    for sigma, sigma_next in pairwise(sigmas):
        z = to_alpha(sigma_next) * curved_denoise(z / to_alpha(sigma), sigma)
        if sigma_next > 0:
            z = z + sigma_next * to_alpha(sigma_next) * noise_sampler(sigma, sigma_next)
        yield z / to_alpha(sigma_next)


def test_lcm_is_the_paper_s_multistep_sampling():
    results = run("lcm", some_latents(), UNEVEN, 1.0, normal_draw(SHAPE))

    assert_same_steps(results, lcm_as_in_the_paper(some_latents(), UNEVEN, normal_draw(SHAPE)))


def tcd_as_in_the_paper(latents, timesteps, gamma, noise_sampler):
    """Algorithm 4 of arXiv:2402.19159 in its own coordinates, down to timestep 0."""
    alphas = [to_alpha(sigma) for sigma in TABLE]
    x = latents * alphas[timesteps[0]]
    for t, t_next in pairwise([*timesteps, 0]):
        s = math.floor((1 - gamma) * t_next)
        x0 = curved_denoise(x / alphas[t], TABLE[t])
        noise = (x - alphas[t] * x0) / math.sqrt(1 - alphas[t] ** 2)
        x = alphas[s] * x0 + math.sqrt(1 - alphas[s] ** 2) * noise
        if t_next > s:
            ratio = alphas[t_next] / alphas[s]
            x = ratio * x + math.sqrt(1 - ratio**2) * noise_sampler(TABLE[t], TABLE[t_next])
        yield x / alphas[t_next]


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_is_the_paper_s_strategic_stochastic_sampling(gamma):
    timesteps = [999, 759, 499, 259]
    sigmas = TABLE[[*timesteps, 0]].tolist()

    results = run("tcd", some_latents(), sigmas, gamma, normal_draw(SHAPE))

    expected = tcd_as_in_the_paper(some_latents(), timesteps, gamma, normal_draw(SHAPE))
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-9, atol=1e-11)


def heun_as_in_the_paper(x, sigmas):
    """Algorithm 1 of arXiv:2206.00364 for sigma(t) = t and s(t) = 1, line by line."""
    for t, t_next in pairwise(sigmas):
        d = (x - curved_denoise(x, t)) / t
        x_next = x + (t_next - t) * d
        if t_next != 0:
            d_next = (x_next - curved_denoise(x_next, t_next)) / t_next
            x_next = x + (t_next - t) * (d / 2 + d_next / 2)
        x = x_next
        yield x


def test_heun_is_the_paper_s_algorithm():
    results = run("heun", some_latents(), UNEVEN, 0.0, no_draw)

    assert_same_steps(results, heun_as_in_the_paper(some_latents(), UNEVEN))


def ancestral_step(sigma, sigma_next, eta):
    """k-diffusion's get_ancestral_step."""
    variance = sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2
    up = min(sigma_next, eta * math.sqrt(variance))
    return math.sqrt(sigma_next**2 - up**2), up


def dpm2_ancestral_as_in_k_diffusion(x, sigmas, eta, noise_sampler):
    """sample_dpm_2_ancestral of k-diffusion."""
    for sigma, sigma_next in pairwise(sigmas):
        down, up = ancestral_step(sigma, sigma_next, eta)
        d = (x - curved_denoise(x, sigma)) / sigma
        if down == 0:
            x = x + d * (down - sigma)
        else:
            middle = math.exp((math.log(sigma) + math.log(down)) / 2)
            x_middle = x + d * (middle - sigma)
            d_middle = (x_middle - curved_denoise(x_middle, middle)) / middle
            x = x + d_middle * (down - sigma) + up * noise_sampler(sigma, sigma_next)
        yield x


def dpmpp_2s_ancestral_as_in_k_diffusion(x, sigmas, eta, noise_sampler):
    """sample_dpmpp_2s_ancestral of k-diffusion, in t = -log sigma."""
    for sigma, sigma_next in pairwise(sigmas):
        down, up = ancestral_step(sigma, sigma_next, eta)
        x0 = curved_denoise(x, sigma)
        if down == 0:
            x = x0
        else:
            t, h = -math.log(sigma), math.log(sigma / down)
            middle = math.exp(-(t + h / 2))
            x_middle = middle / sigma * x - math.expm1(-h / 2) * x0
            x0_middle = curved_denoise(x_middle, middle)
            x = down / sigma * x - math.expm1(-h) * x0_middle
            x = x + up * noise_sampler(sigma, sigma_next)
        yield x


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("dpm2_ancestral", dpm2_ancestral_as_in_k_diffusion),
        ("dpmpp_2s_ancestral", dpmpp_2s_ancestral_as_in_k_diffusion),
    ],
)
def test_ancestral_samplers_of_two_stages_are_those_of_k_diffusion(name, source, eta):
    results = run(name, some_latents(), UNEVEN, eta, normal_draw(SHAPE))

    assert_same_steps(results, source(some_latents(), UNEVEN, eta, normal_draw(SHAPE)))


def test_dpm2_is_its_ancestral_variant_without_noise():
    results = run("dpm2", some_latents(), UNEVEN, 0.0, no_draw)

    np.testing.assert_array_equal(
        results, run("dpm2_ancestral", some_latents(), UNEVEN, 0.0, no_draw)
    )
