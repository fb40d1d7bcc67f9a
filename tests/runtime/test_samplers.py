"""What every sampler keeps to, whatever its formula: see `ldm_runtime.samplers.contract`."""

from itertools import pairwise

import numpy as np
import pytest

from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES, sampling_sigmas, training_sigmas
from tests.runtime.sampler_cases import (
    DETERMINISTIC,
    EXTRAPOLATING,
    SHAPE,
    STOCHASTIC,
    UNEVEN,
    curved_denoise,
    no_draw,
    normal_draw,
    run,
    sampler_named,
    some_latents,
)

FRESH = [(name, eta) for name, eta in STOCHASTIC if SAMPLERS[name].noise == "fresh"]


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - EXTRAPOLATING))
def test_a_step_to_sigma_zero_is_the_last_prediction_itself(name):
    predictions = []

    def denoise(latents, sigma):
        predictions.append(curved_denoise(latents, sigma))
        return predictions[-1]

    *_, result = run(name, some_latents(), UNEVEN, 0.0, normal_draw(SHAPE), denoise)

    np.testing.assert_array_equal(result, predictions[-1])


@pytest.mark.parametrize(("name", "eta"), FRESH)
def test_noise_is_drawn_once_for_every_step_that_ends_above_zero(name, eta):
    for sigmas in (UNEVEN, UNEVEN[:-1]):
        stretches = []

        def noise_sampler(*levels, stretches=stretches):
            stretches.append(levels)
            return np.zeros(SHAPE)

        run(name, some_latents(), sigmas, eta, noise_sampler)

        assert stretches == list(pairwise(UNEVEN))[:4]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_no_noise_is_drawn_at_eta_zero(name):
    results = run(name, some_latents(), UNEVEN, 0.0, no_draw)

    assert len(results) == len(UNEVEN) - 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_draws_are_the_only_source_of_randomness(name):
    record = SAMPLERS[name]

    def last(seed):
        noise_sampler = normal_draw(SHAPE, seed)
        return run(name, some_latents(), UNEVEN[:-1], record.default_eta, noise_sampler)[-1]

    np.testing.assert_array_equal(last(1), last(1))
    assert np.array_equal(last(1), last(2)) == (record.default_eta == 0)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not SAMPLERS[name].uses_eta])
def test_a_sampler_without_eta_ignores_it(name):
    results = [
        run(name, some_latents(), UNEVEN, eta, normal_draw(SHAPE, seed=3)) for eta in (0.0, 1.0)
    ]

    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_dtype_of_the_latents_stays_on_every_schedule(name, schedule, dtype):
    record = SAMPLERS[name]
    table = training_sigmas(np.linspace(0.99, 0.01, 50).tolist())
    sigmas = sampling_sigmas(table, 5, schedule, record.final_sigma)

    results = run(
        name,
        some_latents(dtype),
        sigmas,
        record.default_eta,
        normal_draw(SHAPE, dtype=dtype),
        denoise=lambda latents, sigma: latents * (1 / (1 + sigma)),
    )

    assert {result.dtype for result in results} == {np.dtype(dtype)}


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_array_is_written_to(name):
    def frozen(array):
        array.flags.writeable = False
        return array

    results = sampler_named(name)(
        lambda latents, sigma: frozen(curved_denoise(frozen(latents), sigma)),
        frozen(some_latents()),
        UNEVEN,
        eta=1.0,
        noise_sampler=lambda *_: frozen(np.ones(SHAPE)),
    )

    assert len([frozen(result) for result in results]) == len(UNEVEN) - 1


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SAMPLERS)
def test_runs_of_few_steps_give_finite_latents_after_each(name, num_steps):
    for sigmas in (UNEVEN[-num_steps - 1 :], UNEVEN[: num_steps + 1]):
        results = run(name, some_latents(), sigmas, 1.0, normal_draw(SHAPE))

        assert len(results) == num_steps
        assert np.isfinite(results).all()


@pytest.mark.parametrize(
    "name",
    ["ddim", "euler", "heun", "dpm2", "dpmpp_2s_ancestral", "plms", "lms", "ipndm", "deis"],
)
def test_a_step_between_equal_sigmas_as_ldm_s_quadratic_ones_moves_nothing(name):
    sigmas = [10.0, 4.0, 4.0, 3.0, 0.5, 0.5, 0.2]

    results = run(name, some_latents(), sigmas, 0.0, no_draw)

    np.testing.assert_allclose(results[1], results[0], rtol=1e-15)
    np.testing.assert_allclose(results[4], results[3], rtol=1e-15)
    assert np.isfinite(results[-1]).all()


def expected_calls(name):
    """A step to 0 looks at its start alone; PLMS looks at the end of its first step as well."""
    twice = SAMPLERS[name].calls_per_step - 1
    return (1 + twice) * (len(UNEVEN) - 1) - twice + (name == "plms")


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_denoiser_is_called_as_the_record_says_and_only_for_the_steps_asked_for(name):
    seen = []

    def denoise(latents, sigma):
        seen.append(sigma)
        return 0.5 * latents

    steps = sampler_named(name)(
        denoise, some_latents(), UNEVEN, eta=0.0, noise_sampler=normal_draw(SHAPE)
    )

    assert seen == []
    for index, _ in enumerate(steps):
        assert UNEVEN[index] in seen
        assert min(seen) >= UNEVEN[index + 1]
    assert len(seen) == expected_calls(name)


def test_the_registry_names_the_samplers_and_says_which_take_eta():
    eta_of = {name: (record.uses_eta, record.default_eta) for name, record in SAMPLERS.items()}

    ancestral, plain = (True, 1.0), (False, 0.0)
    assert eta_of == {
        "ddpm": (False, 1.0),
        "ddim": (True, 0.0),
        "plms": plain,
        "euler": plain,
        "euler_ancestral": ancestral,
        "heun": plain,
        "dpm2": plain,
        "dpm2_ancestral": ancestral,
        "lms": plain,
        "dpmpp_2s_ancestral": ancestral,
        "dpmpp_2m": plain,
        "dpmpp_sde": ancestral,
        "dpmpp_2m_sde": ancestral,
        "dpmpp_3m_sde": ancestral,
        "unipc": plain,
        "deis": plain,
        "ipndm": plain,
        "lcm": (False, 1.0),
        "tcd": (True, 0.3),
        "dpm_solver": plain,
    }


def test_every_record_names_a_schedule_that_exists():
    assert {record.schedule for record in SAMPLERS.values()} <= set(SCHEDULES)


def test_only_samplers_that_do_so_in_their_source_end_at_the_smallest_training_sigma():
    ends = {name for name, record in SAMPLERS.items() if record.final_sigma == "smallest"}

    assert ends == {"ddim", "plms", "deis", "tcd"}
