"""Checkpoints of EDM: their marks, and what their UNet is measured to predict."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ldm_export.detection.detect import detect
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import ExportError, WeightsError
from ldm_export.golden.prediction import confirmed, measure_prediction
from ldm_export.graphs.onnx_export import sample_inputs
from ldm_export.hyperparameters.tiny_autoencoder import read_tiny_autoencoder
from ldm_runtime.specs.model import Assumption, EdmSpec
from ldm_runtime.specs.networks import AutoencoderSpec
from ldm_runtime.testing import FakeEngine, autoencoder_spec
from tests.export.sd_layout import SD2, SDXL, TINY, checkpoint, sdxl_checkpoint, with_values
from tests.export.small_systems import small_system

MEAN, STD = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
STATISTICS = {
    "edm_mean": with_values(np.float32(MEAN).reshape(1, 4, 1, 1)),
    "edm_std": with_values(np.float32(STD).reshape(1, 4, 1, 1)),
}
RANGE = {
    "edm_vpred.sigma_max": with_values(np.float32(100.0)),
    "edm_vpred.sigma_min": with_values(np.float32(0.25)),
}
EDIT = replace(SDXL, in_channels=8)


def sources(spec):
    return {each.field: each.source for each in spec.assumptions}


def test_playground_is_marked_by_the_statistics_of_its_latents():
    detection = detect(sdxl_checkpoint() | STATISTICS)
    spec = detection.spec

    assert (spec.family, spec.task, spec.prediction_type) == (
        "playground-v2.5",
        "text-to-image",
        "epsilon",
    )
    assert spec.edm == EdmSpec(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    assert spec.alphas_cumprod == ()
    np.testing.assert_allclose(spec.autoencoder.latents_mean, MEAN, rtol=1e-6)
    np.testing.assert_allclose(spec.autoencoder.latents_std, STD, rtol=1e-6)
    assert spec.autoencoder.latent_scale_factor == 0.5
    defaults = spec.defaults
    assert (defaults.sampler, defaults.schedule, defaults.guidance_scale) == (
        "dpmpp_2m",
        "karras",
        3.0,
    )
    assert sources(spec)["autoencoder.latents_std"] == "file"
    assert detection.unused["edm_mean"] == "statistics of latents, recorded in the bundle"


@pytest.mark.parametrize(("layout", "family"), [(SDXL, "cosxl"), (EDIT, "cosxl-edit")])
def test_cosxl_is_marked_by_its_range_of_noise_levels(layout, family):
    spec = detect(sdxl_checkpoint(layout) | RANGE).spec

    assert (spec.family, spec.prediction_type) == (family, "v_prediction")
    assert spec.edm == EdmSpec(sigma_min=0.25, sigma_max=100.0, sigma_data=1.0)
    assert spec.scales_image == (family == "cosxl-edit")
    assert spec.autoencoder.latent_scale_factor == 0.13025
    assert (spec.defaults.height, spec.defaults.schedule) == (1024, "exponential")
    assert sources(spec)["edm.sigma_max"] == "file"
    assert sources(spec)["edm.sigma_data"] == "family"


def test_the_lowest_noise_level_of_cosxl_may_be_missing():
    marks = {name: RANGE[name] for name in ("edm_vpred.sigma_max",)}

    spec = detect(sdxl_checkpoint() | marks).spec

    assert (spec.edm.sigma_min, spec.edm.sigma_max) == (0.002, 100.0)
    assert sources(spec)["edm.sigma_min"] == "family"


def test_sdxl_and_its_instruct_pix2pix_are_not_of_edm():
    for layout in (SDXL, EDIT):
        spec = detect(sdxl_checkpoint(layout)).spec
        assert (spec.edm, spec.scales_image, len(spec.alphas_cumprod)) == (None, False, 1000)


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"edm_mean": STATISTICS["edm_mean"]}, "4 means of latents and 0 standard deviations"),
        (STATISTICS | {"edm_std": with_values([1.0, 1.0, 0.0, 1.0])}, "the second above 0"),
        (RANGE | {"edm_vpred.sigma_max": with_values([1.0, 2.0])}, "one positive number"),
        (
            RANGE | {"edm_vpred.sigma_max": with_values(0.1)},
            "from 0.25 to 0.1 .*must be the higher",
        ),
        ({name: with_values(np.ones(3)) for name in STATISTICS}, "latents_mean cannot be"),
    ],
)
def test_marks_that_cannot_be_are_an_error(marks, message):
    with pytest.raises(WeightsError, match=message):
        detect(sdxl_checkpoint() | marks)


@pytest.mark.parametrize("marks", [STATISTICS, RANGE], ids=["statistics", "range"])
@pytest.mark.parametrize(
    ("tensors", "family"),
    [
        (checkpoint(TINY), "stable-diffusion-1"),
        (checkpoint(SD2), "stable-diffusion-2"),
        (sdxl_checkpoint(replace(SDXL, in_channels=9)), "stable-diffusion-xl-inpainting"),
    ],
    ids=["sd1", "sd2", "sdxl-inpainting"],
)
def test_marks_in_a_file_of_a_family_without_edm_are_ignored_on_request_alone(
    marks, tensors, family
):
    """They change what every step computes, so that it is for the user to say they do not count."""
    with pytest.raises(WeightsError, match=rf"no component .*{min(marks)}.*--ignore 'PATTERN'"):
        detect(tensors | marks)

    spec = detect(tensors | marks, overrides=Overrides(ignore=("edm_*",))).spec
    assert (spec.family, spec.edm, len(spec.alphas_cumprod)) == (family, None, 1000)
    assert spec.autoencoder.latents_mean == ()


def test_a_model_of_edm_does_not_predict_x0():
    with pytest.raises(WeightsError, match="a model of EDM predicts epsilon"):
        detect(sdxl_checkpoint() | RANGE, overrides=Overrides(prediction_type="sample"))


def test_a_preset_of_training_timesteps_is_refused():
    with pytest.raises(ExportError, match="--preset lcm: schedule: 'consistency' visits training"):
        detect(sdxl_checkpoint() | STATISTICS, overrides=Overrides(preset="lcm"))


def test_a_tiny_decoder_knows_nothing_of_statistics_of_latents():
    autoencoder = autoencoder_spec(latents_mean=tuple(MEAN), latents_std=tuple(STD))

    with pytest.raises(WeightsError, match=r"normalised per channel .*; leave --tiny-decoder out"):
        read_tiny_autoencoder({}, autoencoder)


def edm_model(prediction_type, edm):
    """Return a small model of EDM, whose prediction type its family says."""
    system = small_system("unconditional", seed=0)
    spec = replace(system.spec, alphas_cumprod=(), edm=edm, prediction_type=prediction_type)
    assumption = Assumption(field="prediction_type", value=prediction_type, source="family")
    return replace(spec, assumptions=(assumption,))


class OracleOfEdm:
    """Networks of which the UNet is told the clean latents, in place of a trained one."""

    def __init__(self, spec, sign):
        self.spec, self.sign, self.timesteps = spec, sign, []
        self.latents = []

    def __call__(self, component):
        return FakeEngine(self.encode if component == "vae_encoder" else self.predict)

    def encode(self, inputs):
        """Latents of unit variance that differ from image to image, times sigma_data."""
        rng = np.random.default_rng(len(self.latents))
        side = inputs["image"].shape[2] // self.spec.autoencoder.factor
        latents = rng.standard_normal((1, 3, side, side)).astype(np.float32)
        self.latents.append(latents)
        scaled = latents * self.spec.sigma_data / self.spec.autoencoder.latent_scale_factor
        return {"moments": scaled}

    def predict(self, inputs):
        """F of the paper for the clean latents, from c_noise alone: equation 8."""
        sigma = math.exp(4 * float(inputs["timesteps"][0]))
        self.timesteps.append(float(inputs["timesteps"][0]))
        sigma_data = self.spec.sigma_data
        total = math.hypot(sigma, sigma_data)
        x0 = sigma_data * np.concatenate(self.latents)
        noisy = total * inputs["latents"]
        f = (x0 - (sigma_data / total) ** 2 * noisy) / (sigma * sigma_data / total)
        return {"prediction": np.float32(self.sign * f)}


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize(("predicted", "sign"), [("epsilon", 1), ("v_prediction", -1)])
def test_the_output_of_a_model_of_edm_is_measured(sigma_data, predicted, sign, caplog):
    edm = EdmSpec(sigma_min=0.002, sigma_max=80.0, sigma_data=sigma_data)
    spec = edm_model(predicted, edm)

    record = measure_prediction(spec, None, OracleOfEdm(spec, sign), "key")

    assert record.measured == predicted
    assert record.deviations[predicted] < 0.05
    assert record.deviations.keys() == {"epsilon", "v_prediction"}
    assert "standard deviation" not in caplog.text
    (assumption,) = confirmed(spec, record).assumptions
    assert assumption.source == "family, measured"


def test_a_measurement_that_contradicts_a_family_of_edm_ends_the_export():
    edm = EdmSpec(sigma_min=0.002, sigma_max=80.0, sigma_data=1.0)
    spec = edm_model("v_prediction", edm)
    record = measure_prediction(spec, None, OracleOfEdm(spec, 1), "key")

    with pytest.raises(ExportError, match=r"measured to predict epsilon .* and not v_prediction"):
        confirmed(spec, record)


def test_graphs_are_measured_on_noise_levels_and_latents_of_the_model():
    edm = EdmSpec(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    spec = edm_model("epsilon", edm)
    autoencoder = replace(
        spec.network(AutoencoderSpec),
        latents_mean=(100.0, 0.0, -100.0),
        latents_std=(9.0, 1.0, 4.0),
    )
    spec = spec.with_networks(autoencoder=autoencoder)

    for _, inputs in sample_inputs("unet", spec):
        assert math.log(0.002) / 4 <= inputs["timesteps"].min()
        assert inputs["timesteps"].max() <= math.log(80) / 4
    for _, inputs in sample_inputs("vae_decoder", spec):
        np.testing.assert_allclose(
            inputs["latents"].mean(axis=(0, 2, 3)), (100.0, 0.0, -100.0), atol=1.5
        )
        spread = inputs["latents"].std(axis=(0, 2, 3)) * autoencoder.latent_scale_factor
        np.testing.assert_allclose(spread, (4.5, 0.5, 2.0), rtol=0.15)
