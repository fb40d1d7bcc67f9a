import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from ldm_runtime.pipeline.denoiser import GuidedDenoiser, rescale_guidance, to_x0
from ldm_runtime.schedules import timestep_of
from ldm_runtime.specs.model import PredictionType

TABLE = np.geomspace(0.03, 15.0, 12)
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


class FakeNetwork:
    """Predicts a different multiple of its input for each row of the context, and records it."""

    def __init__(self):
        self.calls = []

    def __call__(self, latents, timesteps, context):
        self.calls.append((latents, timesteps, context))
        return latents * context[:, :1, :1, None]


def rows(*values):
    """Context of shape (rows, 2, 3) whose rows are constant."""
    return np.broadcast_to(
        np.asarray(values, dtype=np.float32)[:, None, None], (len(values), 2, 3)
    ).copy()


class UnevenNetwork(FakeNetwork):
    """Adds each row's constant to its input at one pixel, so that guidance changes the spread."""

    def __call__(self, latents, timesteps, context):
        self.calls.append((latents, timesteps, context))
        prediction = latents.copy()
        prediction[:, 0, 0, 0] += 5 * context[:, 0, 0]
        return prediction


def guided(network, **changes):
    denoiser = GuidedDenoiser(
        network=network,
        training_sigmas=TABLE,
        context=rows(0.25, 0.5),
        guidance_scale=3.0,
        prediction_type="epsilon",
    )
    return replace(denoiser, **changes)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_a_perfect_prediction_gives_back_the_clean_latents(prediction_type):
    x0, noise, sigma = normal(2, 4, 3, 3), normal(2, 4, 3, 3), 1.7
    alpha, beta = 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)  # a^2 + b^2 = 1
    perfect = {"epsilon": noise, "v_prediction": alpha * noise - beta * x0, "sample": x0}

    result = to_x0(perfect[prediction_type], x0 + sigma * noise, sigma, prediction_type)

    np.testing.assert_allclose(result, x0, atol=2e-6)
    assert result.dtype == np.float32


@pytest.mark.parametrize("sigma", [14.6, 157.0, 4096.0])
def test_v_prediction_is_exact_in_float32_where_almost_no_signal_is_left(sigma):
    x0, noise = normal(2, 4, 8, 8).astype(np.float64), normal(2, 4, 8, 8).astype(np.float64)
    norm = math.hypot(1, sigma)
    velocity = ((noise - sigma * x0) / norm).astype(np.float32)
    latents = (x0 + sigma * noise).astype(np.float32)

    result = to_x0(velocity, latents, sigma, "v_prediction")

    assert result.dtype == np.float32
    np.testing.assert_allclose(result, x0, atol=1e-6)  # epsilon loses 1e-3 at 4096


def test_a_network_after_zero_signal_gets_unit_variance_and_the_last_timestep():
    network, sigma = FakeNetwork(), 4096.0
    denoise = guided(network, training_sigmas=np.append(TABLE, sigma), context=rows(0.1, 0.2))

    denoise(normal(1, 4, 64, 64) * sigma, sigma)

    [(batch, timesteps, _)] = network.calls
    assert batch.std() == pytest.approx(1.0, rel=0.02)
    np.testing.assert_array_equal(timesteps, np.full(2, len(TABLE), dtype=np.float32))


def test_a_table_entry_is_a_whole_timestep():
    timesteps = [timestep_of(float(sigma), TABLE) for sigma in TABLE]

    assert timesteps == [float(index) for index in range(len(TABLE))]


def test_a_sigma_between_two_entries_is_interpolated_in_log_sigma():
    sigma = float(TABLE[4] ** 0.75 * TABLE[5] ** 0.25)

    assert timestep_of(sigma, TABLE) == pytest.approx(4.25, rel=1e-12)


@pytest.mark.parametrize(("sigma", "expected"), [(1e-9, 0.0), (0.0, 0.0), (99.0, 11.0)])
def test_a_sigma_outside_the_table_is_the_first_or_the_last_timestep(sigma, expected):
    assert timestep_of(sigma, TABLE) == expected


def test_guidance_moves_from_the_first_half_of_the_context_to_the_second():
    latents, sigma = normal(1, 4, 3, 3), float(TABLE[7])

    x0 = guided(FakeNetwork())(latents, sigma)

    epsilon = (0.25 + 3.0 * (0.5 - 0.25)) * latents / math.hypot(1, sigma)
    np.testing.assert_allclose(x0, latents - sigma * epsilon, rtol=1e-5)


def test_the_network_gets_unit_variance_latents_and_the_timestep_for_every_row_in_one_call():
    network, latents, sigma = FakeNetwork(), normal(2, 4, 3, 3), float(TABLE[7])
    context = rows(0.1, 0.2, 0.3, 0.4)

    guided(network, context=context)(latents, sigma)

    [(batch, timesteps, seen_context)] = network.calls
    np.testing.assert_array_equal(timesteps, np.full(4, 7, dtype=np.float32))
    np.testing.assert_allclose(batch[:2], latents / math.sqrt(1 + sigma**2), rtol=1e-6)
    np.testing.assert_array_equal(batch[2:], batch[:2])
    assert seen_context is context
    assert batch.dtype == timesteps.dtype == np.float32


def test_each_image_is_guided_by_its_own_rows():
    latents, sigma = normal(2, 4, 3, 3), float(TABLE[3])

    both = guided(FakeNetwork(), context=rows(0.1, 0.2, 0.7, 0.9))(latents, sigma)

    first = guided(FakeNetwork(), context=rows(0.1, 0.7))(latents[:1], sigma)
    second = guided(FakeNetwork(), context=rows(0.2, 0.9))(latents[1:], sigma)
    np.testing.assert_array_equal(both, np.concatenate([first, second]))


def test_guidance_scale_one_is_one_call_of_half_the_size():
    network, latents, sigma = FakeNetwork(), normal(2, 4, 3, 3), float(TABLE[3])

    x0 = guided(network, context=rows(0.5, 0.25), guidance_scale=1.0)(latents, sigma)

    assert [len(batch) for batch, _, _ in network.calls] == [2]
    factors = 1 - sigma / math.hypot(1, sigma) * rows(0.5, 0.25)[:, :1, :1, None]
    np.testing.assert_allclose(x0, factors * latents, rtol=1e-5)


def test_guidance_scale_zero_is_the_unconditional_model():
    latents, sigma = normal(1, 4, 3, 3), float(TABLE[3])

    x0 = guided(FakeNetwork(), guidance_scale=0.0)(latents, sigma)

    plain = guided(FakeNetwork(), context=rows(0.25), guidance_scale=1.0)(latents, sigma)
    np.testing.assert_array_equal(x0, plain)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_guidance_acts_on_the_raw_prediction_and_keeps_float32(prediction_type):
    latents, sigma = normal(1, 4, 3, 3), 0.9

    x0 = guided(FakeNetwork(), prediction_type=prediction_type)(latents, sigma)

    prediction = latents / math.hypot(1, sigma)  # 0.25 + 3 * (0.5 - 0.25) is 1
    np.testing.assert_allclose(
        x0, to_x0(prediction, latents, sigma, prediction_type), rtol=1e-5, atol=1e-6
    )
    assert x0.dtype == np.float32


def test_swapped_halves_of_the_context_are_noticed():
    latents, sigma = normal(1, 4, 3, 3), float(TABLE[7])
    epsilon = (0.25 + 3.0 * (0.5 - 0.25)) * latents / math.hypot(1, sigma)

    swapped = guided(FakeNetwork(), context=rows(0.5, 0.25))(latents, sigma)

    assert np.abs(swapped - (latents - sigma * epsilon)).max() > 0.1


@pytest.mark.parametrize(
    ("guidance_scale", "image_guidance_scale", "values", "factor"),
    [
        (3.0, 1.5, (0.1, 0.3, 0.7), 0.1 + 1.5 * (0.3 - 0.1) + 3.0 * (0.7 - 0.3)),
        (1.0, 1.5, (0.1, 0.3, 0.7), 0.1 + 1.5 * (0.3 - 0.1) + (0.7 - 0.3)),
        (0.0, 1.5, (0.1, 0.3, 0.7), 0.1 + 1.5 * (0.3 - 0.1)),
        (3.0, 0.0, (0.1, 0.3, 0.7), 0.1 + 3.0 * (0.7 - 0.3)),
        (3.0, 1.0, (0.3, 0.7), 0.3 + 3.0 * (0.7 - 0.3)),
        (3.0, 3.0, (0.1, 0.7), 0.1 + 3.0 * (0.7 - 0.1)),
        (0.0, 0.0, (0.1, 0.7), 0.1),
        (1.0, 1.0, (0.7,), 0.7),
    ],
)
def test_prompt_and_image_guide_in_one_call_without_samples_that_weigh_nothing(
    guidance_scale, image_guidance_scale, values, factor
):
    """Brooks et al. 2023, equation 3, of predictions without both, without the prompt, and full."""
    network, latents, sigma = FakeNetwork(), normal(2, 4, 3, 3), float(TABLE[7])
    denoise = guided(
        network,
        context=np.repeat(rows(*values), 2, axis=0),
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
    )

    x0 = denoise(latents, sigma)

    assert [len(batch) for batch, _, _ in network.calls] == [2 * len(values)]
    expected = latents - sigma * factor * latents / math.hypot(1, sigma)
    np.testing.assert_allclose(x0, expected, rtol=1e-4, atol=1e-5)


def test_outside_its_interval_an_image_does_not_guide_either():
    network, latents, context = FakeNetwork(), normal(1, 4, 3, 3), rows(0.1, 0.3, 0.7)
    denoise = guided(
        network, context=context, image_guidance_scale=1.5, guidance_interval=(1.0, 5.0)
    )

    unguided = denoise(latents, 9.0)
    denoise(latents, 3.0)

    assert [len(batch) for batch, _, _ in network.calls] == [1, 3]
    never = guided(FakeNetwork(), context=context[2:], guidance_scale=1.0)
    np.testing.assert_array_equal(unguided, never(latents, 9.0))


def test_guidance_outside_its_interval_is_off_and_costs_half():
    network, latents, sigmas = FakeNetwork(), normal(2, 4, 3, 3), [9.0, 5.0, 3.0, 1.0, 0.5]
    context = rows(0.1, 0.2, 0.7, 0.9)
    denoise = guided(network, context=context, guidance_interval=(1.0, 5.0))

    results = [denoise(latents, sigma) for sigma in sigmas]

    assert [len(batch) for batch, _, _ in network.calls] == [2, 4, 4, 4, 2]
    assert [denoise.is_guided(sigma) for sigma in sigmas] == [False, True, True, True, False]
    always = guided(FakeNetwork(), context=context)
    never = guided(FakeNetwork(), context=context[2:], guidance_scale=1.0)
    expected = [(always if 1 <= sigma <= 5 else never)(latents, sigma) for sigma in sigmas]
    np.testing.assert_array_equal(results, expected)


def test_the_network_sees_two_context_arrays_in_all_so_that_they_can_be_kept_on_a_device():
    network, latents = FakeNetwork(), normal(1, 4, 3, 3)
    context = rows(0.1, 0.2)
    denoise = guided(network, context=context, guidance_interval=(1.0, 5.0))

    for sigma in (9.0, 7.0, 3.0, 2.0, 0.5):
        denoise(latents, sigma)

    first, second, third, fourth, fifth = (seen for _, _, seen in network.calls)
    assert first is second is fifth
    assert third is fourth is context
    np.testing.assert_array_equal(first, context[1:])


def test_an_interval_changes_nothing_where_guidance_scale_is_one():
    network, context = FakeNetwork(), rows(0.5, 0.25)
    denoise = guided(network, context=context, guidance_scale=1.0, guidance_interval=(1.0, 5.0))

    for sigma in (9.0, 3.0):
        denoise(normal(2, 4, 3, 3), sigma)

    assert [len(batch) for batch, _, _ in network.calls] == [2, 2]
    assert all(seen is context for _, _, seen in network.calls)


def test_full_rescaling_gives_the_spread_of_the_conditional_prediction_to_each_image():
    latents = normal(2, 4, 3, 3) * np.array([1.0, 4.0], dtype=np.float32)[:, None, None, None]
    denoise = guided(UnevenNetwork(), context=rows(0.1, 0.2, 0.7, 0.9), prediction_type="sample")

    plain = denoise(latents, 1.0)
    rescaled = replace(denoise, guidance_rescale=1.0)(latents, 1.0)
    conditional = replace(denoise, context=denoise.context[2:], guidance_scale=1.0)(latents, 1.0)

    axes = (1, 2, 3)
    np.testing.assert_allclose(rescaled.std(axis=axes), conditional.std(axis=axes), rtol=1e-5)
    factors = conditional.std(axis=axes) / plain.std(axis=axes)
    np.testing.assert_allclose(rescaled, plain * factors[:, None, None, None], rtol=1e-5)
    assert abs(factors[0] - factors[1]) > 0.05
    assert rescaled.dtype == np.float32


def test_rescaling_in_part_mixes_the_two_and_none_changes_no_bit():
    latents = normal(1, 4, 3, 3)
    denoise = guided(UnevenNetwork(), prediction_type="sample")

    none, half, full = (
        replace(denoise, guidance_rescale=share)(latents, 1.0) for share in (0.0, 0.5, 1.0)
    )

    np.testing.assert_allclose(half, (none + full) / 2, rtol=1e-5)
    np.testing.assert_array_equal(none, denoise(latents, 1.0))
    assert np.abs(full - none).max() > 0.1


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_rescaling_acts_on_the_raw_prediction(prediction_type):
    latents, sigma, context = normal(1, 4, 3, 3), 0.9, rows(0.25, 0.5)

    x0 = guided(UnevenNetwork(), prediction_type=prediction_type, guidance_rescale=0.7)(
        latents, sigma
    )

    batch = latents / math.hypot(1, sigma)
    uncond, cond = (UnevenNetwork()(batch, None, row[None]) for row in context)
    prediction = rescale_guidance(uncond + 3.0 * (cond - uncond), cond, 0.7)
    np.testing.assert_allclose(
        x0, to_x0(prediction, latents, sigma, prediction_type), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("context_rows", "guidance_scale", "message"),
    [
        ((0.1,), 3.0, "context has batch size 1, but 1 latents at guidance scale 3.0 need 2"),
        ((0.1, 0.2), 1.0, "context has batch size 2, but 1 latents at guidance scale 1.0 need 1"),
    ],
)
@pytest.mark.parametrize("guidance_interval", [None, (5.0, 9.0)])
def test_a_context_of_another_length_is_refused_before_the_network_runs(
    context_rows, guidance_scale, message, guidance_interval
):
    network = FakeNetwork()
    denoiser = guided(
        network,
        context=rows(*context_rows),
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
    )

    with pytest.raises(ValueError, match=message):
        denoiser(normal(1, 4, 3, 3), 1.0)

    assert network.calls == []


def test_without_context_the_network_is_run_once_a_row_and_never_guided():
    calls = []

    def network(latents, timesteps, context):
        calls.append((latents.shape, timesteps.shape, context))
        return 0.5 * latents

    denoise = guided(network, context=None, guidance_scale=1.0)
    latents = normal(3, 4, 2, 2)

    found = denoise(latents, 1.0)

    assert calls == [((3, 4, 2, 2), (3,), None)]
    np.testing.assert_allclose(found, latents - 0.5 * latents / math.sqrt(2), rtol=1e-6)


def test_guidance_without_context_is_refused():
    denoise = guided(FakeNetwork(), context=None, guidance_scale=2.0)

    with pytest.raises(ValueError, match=r"guidance scale 2\.0 needs a context"):
        denoise(normal(1, 4, 2, 2), 1.0)
