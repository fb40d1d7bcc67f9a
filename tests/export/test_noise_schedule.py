from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm_export.detection.noise_schedule import ListedBetas, ScheduleFormula, read_schedule
from ldm_export.errors import WeightsError
from ldm_runtime.schedules import rescale_zero_terminal_snr
from tests.export.sd_layout import scaled_linear, with_values

FORMULA = ScheduleFormula(
    linear_start=0.00085, linear_end=0.012, num_train_timesteps=1000, source="family"
)
FROM_CONFIG = ScheduleFormula(
    linear_start=0.00085, linear_end=0.012, num_train_timesteps=1000, source="config"
)


def test_without_buffers_the_formula_is_used_in_float64():
    schedule = read_schedule({}, FORMULA)

    assert schedule.formula is FORMULA
    assert str(FORMULA) == "scaled-linear from 0.00085 to 0.012 in 1000 steps"
    np.testing.assert_allclose(schedule.alphas_cumprod, scaled_linear(), rtol=1e-14)
    sigma_max = (1 / schedule.alphas_cumprod[-1] - 1) ** 0.5
    assert sigma_max == pytest.approx(14.6146, abs=1e-4)
    assert type(schedule.alphas_cumprod[0]) is float


def test_float32_values_are_taken_as_they_are():
    own = np.linspace(0.9, 0.1, 10).astype(np.float32)

    schedule = read_schedule({"alphas_cumprod": with_values(own)}, FORMULA)

    assert schedule.formula is None
    assert schedule.alphas_cumprod == tuple(float(value) for value in own)


def test_betas_do_where_there_are_no_cumulative_products():
    betas = np.array([0.1, 0.2, 0.5])

    schedule = read_schedule({"betas": with_values(betas, "float64")}, FORMULA)

    assert schedule.alphas_cumprod == pytest.approx((0.9, 0.72, 0.36), rel=1e-15)


def test_noise_levels_do_where_there_is_nothing_else():
    alphas = np.array([0.9, 0.72, 0.36])
    sigmas = with_values(np.sqrt((1 - alphas) / alphas), "float64")

    schedule = read_schedule({"denoiser.sigmas": sigmas}, FORMULA)

    assert schedule.formula is None
    assert schedule.alphas_cumprod == pytest.approx(alphas, rel=1e-15)


COARSE = ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


def stored_as(dtype, alphas, name="alphas_cumprod"):
    """Return a buffer of a schedule, rounded by torch."""
    exact = {
        "alphas_cumprod": alphas,
        "betas": 1 - alphas / np.concatenate([[1], alphas[:-1]]),
        "denoiser.sigmas": np.sqrt((1 - alphas) / np.maximum(alphas, 1e-99)),
    }
    rounded = torch.tensor(exact[name]).to(getattr(torch, dtype)).float()
    return {name: with_values(rounded.numpy(), dtype)}


def ending_in_noise():
    signal = np.sqrt(scaled_linear())
    return ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize("name", ["alphas_cumprod", "betas", "denoiser.sigmas"])
def test_coarse_values_only_confirm_the_formula(name, dtype):
    schedule = read_schedule(stored_as(dtype, scaled_linear(), name), FORMULA)

    assert schedule.formula is FORMULA
    assert schedule.alphas_cumprod == tuple(FORMULA.alphas_cumprod().tolist())


@pytest.mark.parametrize("dtype", COARSE)
def test_coarse_values_that_contradict_the_formula_are_an_error(dtype):
    other = stored_as(dtype, scaled_linear(0.0015, 0.0195))

    with pytest.raises(WeightsError, match=r"the family's schedule \(.*--config with the right"):
        read_schedule(other, FORMULA)


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize("name", ["alphas_cumprod", "betas"])
def test_coarse_values_that_end_in_noise_confirm_only_what_is_stated_to(name, dtype):
    tensors = stored_as(dtype, ending_in_noise(), name)

    with pytest.raises(WeightsError, match=rf"^{name}, stored as {dtype}, .*--zero-terminal-snr"):
        read_schedule(tensors, FORMULA)
    schedule = read_schedule(tensors, FORMULA, may_be_rescaled=True)

    assert schedule.ends_in_noise
    assert schedule.alphas_cumprod == rescale_zero_terminal_snr(FORMULA.alphas_cumprod().tolist())


def test_the_last_value_of_a_formula_may_vanish_in_a_coarse_type():
    upscaler = replace(FORMULA, linear_start=0.0001, linear_end=0.02)
    tensors = stored_as("float8_e4m3fn", upscaler.alphas_cumprod())

    schedule = read_schedule(tensors, upscaler)

    assert tensors["alphas_cumprod"].values[-1] == 0
    assert not schedule.ends_in_noise


def test_a_configuration_that_contradicts_the_buffers_is_an_error():
    other = scaled_linear(0.0015, 0.0195).astype(np.float32)
    tensors = {"alphas_cumprod": with_values(other)}

    with pytest.raises(WeightsError, match="contradicts the config's schedule"):
        read_schedule(tensors, FROM_CONFIG)
    with pytest.raises(WeightsError, match="500 timesteps"):
        read_schedule({"alphas_cumprod": with_values(other[:500])}, FROM_CONFIG)


def test_a_configuration_that_agrees_leaves_the_checkpoints_own_values():
    own = scaled_linear().astype(np.float32)

    schedule = read_schedule({"alphas_cumprod": with_values(own)}, FROM_CONFIG)

    assert schedule.formula is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, 0.9], "decrease strictly"),
        ([0.9, 0.9], "decrease strictly"),
        ([1.0, 0.5], "decrease strictly"),
        ([0.9, -0.1], "decrease strictly"),
        ([0.9, 0.0, 0.0], "decrease strictly"),
        ([0.9, float("nan")], "decrease strictly"),
        ([[0.9, 0.5]], r"shape \(1, 2\)"),
        ([], r"shape \(0,\)"),
    ],
)
def test_buffers_that_are_no_schedule_are_an_error(values, message):
    tensors = {"alphas_cumprod": with_values(np.array(values, np.float32))}

    with pytest.raises(WeightsError, match=message):
        read_schedule(tensors, FORMULA)


def test_integer_buffers_are_an_error():
    with pytest.raises(WeightsError, match="stored as int64"):
        read_schedule({"betas": with_values(np.array([1]), "int64")}, FORMULA)


def test_a_schedule_that_ends_in_noise_ends_at_a_value_that_can_be_divided_by():
    own = np.append(np.linspace(0.9, 0.1, 9), 0.0)

    schedule = read_schedule({"alphas_cumprod": with_values(own, "float64")}, FROM_CONFIG)

    assert schedule.ends_in_noise
    assert schedule.alphas_cumprod == (*own[:-1].tolist(), 2.0**-24)


def test_listed_betas_give_the_schedule_that_ddpm_makes_of_them():
    betas = np.linspace(1e-3, 0.2, 7)
    listed = ListedBetas(betas=tuple(betas.tolist()))

    schedule = read_schedule({}, listed)

    expected = [np.prod(1 - betas[: step + 1]) for step in range(7)]
    np.testing.assert_allclose(schedule.alphas_cumprod, expected, rtol=1e-14)
    assert str(schedule.formula) == "7 listed betas from 0.001 to 0.2"


def test_listed_betas_that_contradict_the_buffers_are_an_error():
    listed = ListedBetas(betas=(0.1, 0.2, 0.5))

    with pytest.raises(WeightsError, match=r"contradicts the config's schedule \(3 listed betas"):
        read_schedule({"betas": with_values(np.array([0.1, 0.2, 0.4]), "float64")}, listed)


@pytest.mark.parametrize("name", ["alphas_cumprod", "betas"])
def test_a_schedule_that_ends_in_nothing_but_noise_gets_the_finite_end_of_the_runtime(name):
    alphas = ending_in_noise()
    betas = 1 - alphas / np.concatenate([[1.0], alphas[:-1]])
    stored = {"alphas_cumprod": alphas, "betas": betas}[name]

    schedule = read_schedule({name: with_values(stored, "float64")}, FORMULA)

    expected = rescale_zero_terminal_snr(scaled_linear().tolist())
    np.testing.assert_allclose(schedule.alphas_cumprod, expected, rtol=1e-9)
    assert schedule.alphas_cumprod[-1] == 2.0**-24
