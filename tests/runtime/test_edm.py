"""Models of EDM: trained on a range of noise levels, without training timesteps."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ldm_runtime.errors import BundleError, RequestError
from ldm_runtime.latents.codec import from_unet_scale, to_unet_scale
from ldm_runtime.pipeline.denoiser import GuidedDenoiser
from ldm_runtime.requests.refiner import check_refiner
from ldm_runtime.requests.request import parse_request
from ldm_runtime.requests.resolution import resolve, sigma_table
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES
from ldm_runtime.specs.model import EdmSpec, timestep_range
from ldm_runtime.specs.plausible import implausible_fields
from ldm_runtime.testing import TINY_SPEC, autoencoder_spec

EDM = EdmSpec(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
SPEC = replace(
    TINY_SPEC,
    alphas_cumprod=(),
    edm=EDM,
    prediction_type="epsilon",
    defaults=replace(TINY_SPEC.defaults, sampler="dpmpp_2m", schedule="exponential"),
)
MEAN, STD = (-1.6574, 1.886, -1.383, 2.5155), (8.4927, 5.9022, 6.5498, 5.2299)
SIGMAS = [0.002, 0.1, 0.5, 3.7, 80.0]
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape)


def resolved(spec=SPEC, **fields):
    return resolve(parse_request({"prompt": "red", "seed": 5} | fields), spec)


def denoiser(network, prediction_type, edm=EDM):
    return GuidedDenoiser(
        network=network,
        training_sigmas=np.geomspace(edm.sigma_min, edm.sigma_max, 1000),
        context=None,
        guidance_scale=1.0,
        prediction_type=prediction_type,
        edm=edm,
    )


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize(("prediction_type", "sign"), [("epsilon", 1), ("v_prediction", -1)])
def test_x0_is_equation_7_of_the_paper(sigma_data, sigma, prediction_type, sign):
    """Karras et al. 2022 (arXiv:2206.00364), equation 7 with the column "Ours" of table 1."""
    edm = replace(EDM, sigma_data=sigma_data)
    noisy = normal(2, 4, 3, 3) * math.sqrt(sigma**2 + sigma_data**2)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / math.sqrt(sigma_data**2 + sigma**2)
    c_in = 1 / math.sqrt(sigma**2 + sigma_data**2)
    c_noise = 1 / 4 * math.log(sigma)

    def output(scaled, noise):
        return np.sin(scaled) + noise[:, None, None, None]

    expected = c_skip * noisy + c_out * output(c_in * noisy, np.float32([c_noise, c_noise]))
    denoise = denoiser(
        lambda latents, times, _: sign * output(latents, times), prediction_type, edm
    )

    np.testing.assert_allclose(denoise(noisy, sigma), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_output_that_training_asks_for_gives_back_the_clean_latents(sigma):
    """Equation 8: F is trained to be (x0 - c_skip * noisy) / c_out."""
    x0 = 0.5 * normal(2, 4, 3, 3)
    noisy, total = x0 + sigma * normal(*x0.shape), sigma**2 + 0.25
    target = (x0 - 0.25 / total * noisy) / (0.5 * sigma / math.sqrt(total))

    result = denoiser(lambda *_: target, "epsilon")(noisy, sigma)

    np.testing.assert_allclose(result, x0, atol=1e-9)


def test_v_prediction_of_sigma_data_1_is_that_of_a_training_schedule():
    latents, prediction = normal(1, 4, 2, 2), normal(1, 4, 2, 2)
    edm = denoiser(lambda *_: prediction, "v_prediction", replace(EDM, sigma_data=1.0))

    np.testing.assert_array_equal(edm(latents, 3.0), replace(edm, edm=None)(latents, 3.0))


def test_noise_levels_are_those_of_the_model_whatever_the_sampler():
    expected = [80.0 * (0.002 / 80.0) ** (index / 9) for index in range(10)]

    for sampler in ("dpmpp_2m", "euler", "dpmpp_2m_sde", "ddim"):
        request = resolved(sampler=sampler, num_inference_steps=10)
        assert request.schedule == "exponential"
        np.testing.assert_allclose(request.sigmas, [*expected, 0.0], rtol=1e-12)


def test_karras_noise_levels_are_equation_5_of_the_paper():
    ramp = np.arange(10) / 9
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)

    request = resolved(schedule="karras", num_inference_steps=10)

    np.testing.assert_allclose(request.sigmas[:-1], (high + ramp * (low - high)) ** 7, rtol=1e-12)


def test_a_model_without_a_schedule_of_its_own_has_that_of_the_paper():
    spec = replace(SPEC, defaults=replace(SPEC.defaults, schedule=None))

    assert resolved(spec).schedule == "karras"


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "tcd"])
def test_every_sampler_but_tcd_takes_a_model_of_edm(sampler):
    assert resolved(sampler=sampler).sampler == sampler


def test_a_sampler_of_training_timesteps_is_refused_with_those_that_can():
    with pytest.raises(
        RequestError,
        match=r"sampler: 'tcd' goes by training timesteps, of which this bundle has none: it is of "
        r"EDM, .*; choose ddpm, ddim, .* or unipc$",
    ):
        resolved(sampler="tcd")


@pytest.mark.parametrize(
    "schedule", sorted(SCHEDULES.keys() - {"karras", "exponential", "polyexponential"})
)
def test_schedules_of_training_timesteps_are_refused_with_those_that_can(schedule):
    with pytest.raises(
        RequestError,
        match=rf"schedule: '{schedule}' visits training timesteps, .*; choose karras, exponential "
        "or polyexponential$",
    ):
        resolved(schedule=schedule)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"zero_terminal_snr": True}, "zero_terminal_snr: .*training timesteps.*; leave it out"),
        ({"preset": "lightning-4"}, "schedule: 'trailing' visits training timesteps"),
    ],
)
def test_what_changes_training_timesteps_is_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        resolved(**fields)


def test_a_share_of_the_noise_schedule_is_one_of_the_range_of_log_sigma():
    request = resolved(num_inference_steps=10, denoising_end=0.5)

    middle = math.sqrt(0.002 * 80.0)
    made = [request.sigmas[index] for index in request.passes[0].steps]
    assert made == [sigma for sigma in request.sigmas if sigma >= middle]


def test_listed_noise_levels_need_no_timesteps():
    assert resolved(sigmas=[50.0, 3.0, 0.2]).sigmas == (50.0, 3.0, 0.2, 0.0)


def test_the_unet_is_told_a_quarter_of_log_sigma():
    assert timestep_range(SPEC) == (math.log(0.002) / 4, math.log(80.0) / 4)
    assert timestep_range(TINY_SPEC) == (0.0, 999.0)
    table = sigma_table(SPEC, zero_terminal_snr=False)
    assert (table[0], table[-1], len(table)) == (0.002, 80.0, 1000)


@pytest.mark.parametrize(
    "refiner",
    [
        TINY_SPEC,
        replace(SPEC, edm=replace(EDM, sigma_max=120.0)),
        SPEC.with_networks(
            autoencoder=replace(SPEC.autoencoder, latents_mean=MEAN, latents_std=STD)
        ),
    ],
)
def test_a_refiner_has_the_noise_levels_and_the_latents_of_the_model(refiner):
    check_refiner(SPEC, SPEC)

    with pytest.raises(BundleError, match=r"noise schedule|means of latents"):
        check_refiner(SPEC, refiner)


def test_latents_are_normalised_per_channel_and_back():
    """The formula of playground-v2.5: (z - mean) * 0.5 / std."""
    autoencoder = autoencoder_spec(latent_scale_factor=0.5, latents_mean=MEAN, latents_std=STD)
    z = normal(2, 4, 3, 5).astype(np.float32)

    latents = to_unet_scale(z, autoencoder)

    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        expected = (z[:, channel] - mean) * 0.5 / std
        np.testing.assert_allclose(latents[:, channel], expected, rtol=1e-5)
    assert latents.dtype == np.float32
    np.testing.assert_allclose(from_unet_scale(latents, autoencoder), z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"edm": replace(EDM, sigma_min=0.0)}, "edm"),
        ({"edm": replace(EDM, sigma_max=0.001)}, "edm"),
        ({"edm": replace(EDM, sigma_data=math.inf)}, "edm"),
        ({"edm": None}, "alphas_cumprod"),
        ({"alphas_cumprod": TINY_SPEC.alphas_cumprod}, "alphas_cumprod"),
        ({"prediction_type": "sample"}, "prediction_type"),
    ],
)
def test_a_model_has_noise_levels_or_a_training_schedule(changes, field):
    assert list(implausible_fields(SPEC)) == []
    assert list(implausible_fields(replace(SPEC, **changes))) == [field]


@pytest.mark.parametrize(
    ("mean", "std", "field"),
    [
        (MEAN[:3], STD[:3], "latents_mean"),
        ((*MEAN[:3], math.nan), STD, "latents_mean"),
        (MEAN, (), "latents_std"),
        (MEAN, (*STD[:3], 0.0), "latents_std"),
    ],
)
def test_statistics_of_latents_are_one_number_per_channel(mean, std, field):
    autoencoder = replace(SPEC.autoencoder, latents_mean=mean, latents_std=std)

    found = list(implausible_fields(SPEC.with_networks(autoencoder=autoencoder)))

    assert f"networks.autoencoder.{field}" in found
