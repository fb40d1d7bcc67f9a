"""The flag --preset: a bundle's sampling defaults and prediction type, and who stated them."""

from dataclasses import replace

import pytest

from ldm_export.cli import _options, build_parser, main
from ldm_export.detection.detect import detect
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import ExportError
from ldm_export.golden.prediction import confirmed
from ldm_export.golden.requests import golden_requests
from ldm_runtime.bundle.manifest import PredictionRecord
from ldm_runtime.requests.presets import PRESET_FIELDS, PRESETS
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from tests.export.ldm_layouts import CELEBA
from tests.export.sd_layout import SD1, autoencoder_shapes, checkpoint

CONFIG = {
    "model": {"params": {"parameterization": "v"}},
    "sampling": {"sampler": "dpmpp_2m", "schedule": "karras", "num_inference_steps": 30},
}


def detected(layout=SD1, config=None, **flags):
    return detect(checkpoint(layout), config=config, overrides=Overrides(**flags)).spec


def sources_of(spec):
    return {each.field: each.source for each in spec.assumptions}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_the_sampling_defaults_of_a_bundle(name):
    spec = detected(preset=name)

    preset, sources = PRESETS[name], sources_of(spec)
    for field in PRESET_FIELDS:
        assert getattr(spec.defaults, field) == getattr(preset, field)
        assert sources[f"defaults.{field}"] == f"preset {name}"
    assert spec.prediction_type == preset.prediction_type or preset.prediction_type is None


@pytest.mark.parametrize("name", PRESETS)
def test_a_request_to_the_bundle_without_fields_is_one_with_the_preset(name):
    spec = detected(preset=name)

    request = resolve(GenerationRequest("red", seed=1), spec)

    assert request == resolve(GenerationRequest("red", seed=1, preset=name), spec)


def test_a_preset_wins_over_the_configuration_and_leaves_it_the_rest():
    spec = detected(config=CONFIG, preset="lcm")

    assert (spec.defaults.sampler, spec.defaults.num_inference_steps) == ("lcm", 4)
    assert spec.prediction_type == "v_prediction"
    assert sources_of(spec)["prediction_type"] == "config"


def test_the_prediction_of_a_preset_is_recorded_as_its_own_unless_a_flag_states_one():
    own, stated = (
        detected(config=CONFIG, preset="lightning-1", **flags)
        for flags in ({}, {"prediction_type": "epsilon"})
    )

    assert (own.prediction_type, stated.prediction_type) == ("sample", "epsilon")
    assert sources_of(own)["prediction_type"] == "preset lightning-1"
    assert sources_of(stated)["prediction_type"] == "flag"


def test_a_measurement_that_contradicts_a_preset_names_it():
    deviations = {"epsilon": 0.04, "v_prediction": 0.5, "sample": 0.5}
    record = PredictionRecord(key="", deviations=deviations, measured="epsilon")

    with pytest.raises(ExportError, match=r"not sample .*, which the preset lightning-1 says; exp"):
        confirmed(detected(preset="lightning-1"), record)


def test_a_model_without_guidance_takes_a_preset():
    assert detected(CELEBA, preset="lightning-4").defaults.sampler == "euler"


def test_an_unknown_preset_is_an_error_that_lists_them():
    with pytest.raises(
        ExportError, match=r"^--preset: unknown preset 'turbos' \(did you mean turb"
    ):
        detected(preset="turbos")


def test_an_autoencoder_has_no_preset():
    whole = checkpoint()
    tensors = {name: whole[f"first_stage_model.{name}"] for name in autoencoder_shapes(SD1)}

    with pytest.raises(ExportError, match=r"--preset lcm does not go .* for autoencoder"):
        detect(tensors, overrides=Overrides(preset="lcm"))


def test_a_preset_that_the_training_schedule_is_too_short_for_is_an_error():
    short = {"model": {"params": {"timesteps": 3, "linear_end": 0.9}}}

    with pytest.raises(ExportError, match=r"^--preset lightning-4: num_inference_steps: 4 steps"):
        detect(checkpoint(schedule=False), config=short, overrides=Overrides(preset="lightning-4"))


def test_the_golden_requests_of_a_distilled_model_have_no_more_steps_than_its_schedule():
    spec = detected(preset="turbo")
    few = replace(spec, defaults=replace(spec.defaults, schedule="turbo"))

    requests = golden_requests(few, 10**6)

    assert {each.num_inference_steps for each in requests} == {10}
    assert "turbo" in {each.schedule for each in requests}


def test_the_flag_reaches_the_options_of_the_export():
    args = build_parser().parse_args(["a.ckpt", "engines", "--preset", "hyper-4"])
    args.ckpt, args.out = args.paths

    assert _options(args).overrides.preset == "hyper-4"


def test_a_misspelt_preset_is_one_line_with_the_names(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["a.ckpt", "engines", "--preset", "hyper4"])

    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert "unknown value 'hyper4' (did you mean hyper-4" in error
    assert ", ".join(PRESETS) in error
