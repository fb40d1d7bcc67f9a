import math

import numpy as np
import pytest

from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.samplers.dpm_solver import dpm_solver, dpmpp_2m, singlestep_orders
from ldm_runtime.samplers.first_order import euler
from ldm_runtime.samplers.unipc import unipc
from tests.runtime.sampler_cases import (
    DATA_MEAN,
    DATA_STD,
    curved_denoise,
    ideal_denoise,
    no_draw,
    some_latents,
)

UNEVEN = [10.0, 4.0, 3.0, 0.5, 0.2, 0.12, 0.05, 0.02]  # neighbouring steps differ in log sigma


def ours(sampler, sigmas, denoise=curved_denoise):
    return list(sampler(denoise, some_latents(), sigmas, eta=0.0, noise_sampler=no_draw))


def assert_equal_steps(results, expected, rtol=1e-10):
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=rtol, atol=1e-11)


def even_grid(num_steps, last=0.5):
    """Sigmas from 10 to `last`, evenly spaced in log sigma."""
    return (10.0 * (last / 10.0) ** np.linspace(0, 1, num_steps + 1)).tolist()


def uneven_grid(num_steps):
    """Sigmas from 10 to 0.5 with steps in log sigma that alternate between 1 and 2 units."""
    widths = np.tile([1.0, 2.0], num_steps // 2)
    depths = np.concatenate([[0.0], np.cumsum(widths)]) / widths.sum()
    return (10.0 * 0.05**depths).tolist()


def final_error(sampler, sigmas):
    spread = math.hypot(DATA_STD, sigmas[-1]) / math.hypot(DATA_STD, sigmas[0])
    exact = DATA_MEAN + (some_latents() - DATA_MEAN) * spread
    return np.abs(ours(sampler, sigmas, ideal_denoise)[-1] - exact).max()


class VariancePreserving:
    """alpha, sigma and lambda of the papers, and their two models, at sigmas of ours."""

    def __init__(self, sigmas):
        self.alpha = [1 / math.hypot(1, sigma) for sigma in sigmas]
        self.sigma = [sigma / math.hypot(1, sigma) for sigma in sigmas]
        self.lam = [-math.log(sigma) for sigma in sigmas]

    def data(self, z, at):
        return curved_denoise(z / self.alpha[at], self.sigma[at] / self.alpha[at])

    def noise(self, z, at):
        return (z - self.alpha[at] * self.data(z, at)) / self.sigma[at]


def dpm_solver_as_in_compvis(sigmas):
    """DPM-Solver-1, -2 and -3 of arXiv:2206.00927 with free r_1 and r_2, in its latents z."""
    vp = VariancePreserving(sigmas)
    z = some_latents() * vp.alpha[0]
    s = 0
    for order in singlestep_orders(len(sigmas) - 1):
        points = []
        h = vp.lam[s + order] - vp.lam[s]
        eps = vp.noise(z, s)
        for k in range(1, order + 1):
            r = (vp.lam[s + k] - vp.lam[s]) / h
            u = vp.alpha[s + k] / vp.alpha[s] * z
            u = u - vp.sigma[s + k] * math.expm1(r * h) * eps
            if k > 1:
                r_last = (vp.lam[s + k - 1] - vp.lam[s]) / h
                change = vp.noise(points[-1], s + k - 1) - eps
                if order == 2:
                    u = u - vp.sigma[s + k] / (2 * r_last) * math.expm1(h) * change
                else:
                    phi = math.expm1(r * h) / (r * h) - 1
                    u = u - r / r_last * vp.sigma[s + k] * phi * change
            points.append(u)
            yield u / vp.alpha[s + k]
        z, s = points[-1], s + order


@pytest.mark.parametrize("num_steps", range(1, 8))
def test_dpm_solver_is_the_paper_s_and_compvis_update_on_uneven_steps(num_steps):
    sigmas = UNEVEN[: num_steps + 1]

    assert_equal_steps(ours(dpm_solver, sigmas), dpm_solver_as_in_compvis(sigmas))


@pytest.mark.parametrize("num_steps", range(1, 8))
def test_dpm_solver_ends_at_zero_with_the_denoised_latents_of_a_run_that_ends_above(num_steps):
    above = UNEVEN[:num_steps]

    results = ours(dpm_solver, [*above, 0.0])

    expected = [some_latents(), *ours(dpm_solver, above)]
    assert_equal_steps(results, [*expected[1:], curved_denoise(expected[-1], above[-1])], 0)


def test_dpm_solver_spends_one_call_on_every_sigma_for_every_number_of_steps():
    for num_steps in range(1, 50):
        seen, sigmas = [], even_grid(num_steps)

        def denoise(latents, sigma, seen=seen):
            seen.append(sigma)
            return 0.5 * latents

        assert len(ours(dpm_solver, sigmas, denoise)) == num_steps
        assert seen == sigmas[:-1]
        assert sum(singlestep_orders(num_steps)) == num_steps


def test_singlestep_orders_are_three_but_for_the_rest():
    orders = {count: singlestep_orders(count) for count in range(9)}

    assert orders == {
        0: [],
        1: [1],
        2: [2],
        3: [2, 1],
        4: [3, 1],
        5: [3, 2],
        6: [3, 2, 1],
        7: [3, 3, 1],
        8: [3, 3, 2],
    }


@pytest.mark.parametrize(
    ("grid", "counts", "order"),
    [
        (even_grid, (128, 512), 3),  # two more than a multiple of three: no first-order step
        (even_grid, (256, 1024), 2),  # one more
        (even_grid, (240, 960), 2),  # a multiple
        (uneven_grid, (256, 1024), 2),
    ],
)
def test_dpm_solver_converges_with_the_order_that_its_docstring_says(grid, counts, order):
    coarse, fine = (final_error(dpm_solver, grid(count)) for count in counts)

    assert coarse / fine == pytest.approx(4**order, rel=0.1)


def unipc_as_in_the_paper(sigmas):
    """UniPC-2 of arXiv:2302.04867 with B_2(h) and data prediction, in its latents z."""
    vp = VariancePreserving(sigmas)
    z = corrected = some_latents() * vp.alpha[0]
    models, last = [], len(sigmas) - 1
    for i in range(1, last + 1):
        models.append(vp.data(z, i - 1))
        if i > 1:
            z = unified_step(vp, corrected, i - 1, models[:-1], models[-1])
        corrected = z
        order = 1 if i in (1, last) else 2
        z = unified_step(vp, corrected, i, models[-order:], None)
        yield z / vp.alpha[i]


def unified_step(vp, z, i, models, end_model):
    """UniP of order len(models), or UniC with the model at the end, for the step to sigma i."""
    models = models[-2:]
    h = vp.lam[i] - vp.lam[i - 1]
    now, b_h = models[-1], math.expm1(-h)
    r, differences = [], []
    if len(models) == 2:
        r.append((vp.lam[i - 2] - vp.lam[i - 1]) / h)
        differences.append((models[0] - now) / r[0])
    if end_model is not None:
        r.append(1.0)
        differences.append(end_model - now)
    z = vp.sigma[i] / vp.sigma[i - 1] * z - vp.alpha[i] * b_h * now
    if differences:
        rho = [0.5] if len(r) == 1 else np.linalg.solve([[1.0, 1.0], r], moments(-h, b_h))
        z = z - vp.alpha[i] * b_h * sum(w * d for w, d in zip(rho, differences, strict=True))
    return z


def moments(hh, b_h):
    """n! h phi_{n+1}(h) / B(h) for n = 1 and 2."""
    h_phi_2 = math.expm1(hh) / hh - 1
    return [h_phi_2 / b_h, 2 * (h_phi_2 / hh - 1 / 2) / b_h]


@pytest.mark.parametrize("num_steps", range(1, 8))
def test_unipc_is_the_paper_s_update_on_uneven_steps(num_steps):
    sigmas = UNEVEN[: num_steps + 1]

    assert_equal_steps(ours(unipc, sigmas), unipc_as_in_the_paper(sigmas))


@pytest.mark.parametrize("grid", [even_grid, uneven_grid])
def test_unipc_converges_with_order_two_as_its_last_step_has_it(grid):
    ratio = final_error(unipc, grid(256)) / final_error(unipc, grid(512))

    assert ratio == pytest.approx(4, rel=0.05)


def test_the_corrector_of_unipc_gains_an_order_where_the_last_step_hardly_matters():
    """Down to 0.02 the last step covers next to nothing of what the data is like."""
    error = final_error(unipc, even_grid(128, last=0.02))

    assert final_error(unipc, even_grid(64, last=0.02)) / error > 8
    assert final_error(dpmpp_2m, even_grid(128, last=0.02)) / error > 10


@pytest.mark.parametrize("name", ["dpm_solver", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("sigmas", [[10.0, 0.5], [10.0, 0.0]])
def test_a_single_step_is_one_of_euler(name, sigmas):
    assert_equal_steps(ours(SAMPLERS[name].function, sigmas), ours(euler, sigmas))


@pytest.mark.parametrize("name", ["dpm_solver", "unipc"])
def test_two_steps_to_zero_are_two_of_euler(name):
    """The first and the last step of UniPC are first order, but its first is then corrected."""
    sigmas = [10.0, 0.5, 0.0]
    first, last = ours(SAMPLERS[name].function, sigmas)

    assert_equal_steps([first, last], ours(euler, sigmas))


MULTISTEP = ["dpm_solver", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc"]


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_sigma_that_is_visited_twice_repeats_the_latents_and_changes_nothing(name):
    function = SAMPLERS[name].function

    results = ours(function, [9.0, 4.0, 3.0, 3.0, 3.0, 0.5, 0.5, 0.0])

    first, second, third, last = ours(function, [9.0, 4.0, 3.0, 0.5, 0.0])
    expected = [first, second, second, second, third, third, last]
    np.testing.assert_array_equal(results, expected)


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_run_that_begins_with_a_repeat_has_a_prediction_to_show(name):
    function, asked = SAMPLERS[name].function, []

    def denoise(latents, sigma):
        asked.append(sigma)
        return latents / (1 + sigma)

    steps = function(
        denoise, np.ones(3), [3.0, 3.0, 3.0, 0.5, 0.0], eta=0.0, noise_sampler=lambda *_: 0.0
    )

    assert (next(steps) == next(steps)).all()
    assert asked == [3.0]
    assert len(list(steps)) == 2
    assert asked[:3] == [3.0, 3.0, 0.5]
