"""Presets of distilled models: their rows, and what a request with one becomes."""

from dataclasses import replace

import numpy as np
import pytest

from ldm_runtime import Generator
from ldm_runtime.errors import RequestError
from ldm_runtime.pipeline.image_files import read_metadata
from ldm_runtime.requests.call_arguments import request_from
from ldm_runtime.requests.presets import PRESET_FIELDS, PRESETS
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve, sigma_table
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES, timestep_of
from ldm_runtime.testing import TINY_SPEC, tiny_spec
from tests.runtime.task_cases import PICTURE

#: The timesteps of 1000 that the publishers of the models name.
PUBLISHED = {
    "turbo": [999],
    "lightning-1": [999],
    "lightning-2": [999, 499],
    "lightning-4": [999, 749, 499, 249],
    "lightning-8": [999, 874, 749, 624, 499, 374, 249, 124],
    "hyper-1": [800],
    "hyper-2": [999, 499],
    "hyper-4": [999, 749, 499, 249],
    "hyper-8": [999, 874, 749, 624, 499, 374, 249, 124],
    "lcm": [999, 759, 499, 259],
    "tcd": [999, 759, 499, 259],
    "dmd2": [999, 749, 499, 249],
    "dmd2-1": [399],
}


def spec_of(name):
    return replace(TINY_SPEC, prediction_type=PRESETS[name].prediction_type or "epsilon")


def settings_of(name):
    return {field: getattr(PRESETS[name], field) for field in PRESET_FIELDS}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_visits_the_published_timesteps(name):
    request = resolve(GenerationRequest("red", preset=name), spec_of(name))

    table = sigma_table(TINY_SPEC, zero_terminal_snr=False)
    assert [timestep_of(sigma, table) for sigma in request.sigmas[:-1]] == PUBLISHED[name]


@pytest.mark.parametrize("row", PRESETS.values(), ids=lambda row: row.name)
def test_a_row_names_a_sampler_a_schedule_an_eta_that_it_takes_and_its_source(row):
    record = SAMPLERS[row.sampler]
    assert row.schedule in SCHEDULES
    assert record.uses_eta or row.eta == record.default_eta
    assert row.guidance_scale == 1
    assert row.models
    assert row.source.startswith("https://huggingface.co/")


@pytest.mark.parametrize("name", PRESETS)
def test_a_request_with_a_preset_is_the_request_written_out(name):
    spec = spec_of(name)

    request = resolve(GenerationRequest("red", seed=7, preset=name), spec)

    assert request == resolve(GenerationRequest("red", seed=7, **settings_of(name)), spec)
    assert request.as_request().preset is None
    assert resolve(request, spec) == request


@pytest.fixture(scope="module")
def generator(tiny_bundle):
    with Generator(tiny_bundle, threads=1) as generator:
        yield generator


@pytest.mark.parametrize("name", ["lcm", "tcd", "hyper-1"])
def test_an_image_of_a_preset_is_that_of_its_settings_to_the_last_bit(generator, name):
    result = generator("red", seed=3, num_images=2, preset=name)

    written_out = generator("red", seed=3, num_images=2, **settings_of(name))
    assert [each.tobytes() for each in result.images] == [
        each.tobytes() for each in written_out.images
    ]
    np.testing.assert_array_equal(result.latents, written_out.latents)


def test_a_saved_image_records_the_settings_and_not_the_preset(generator, tmp_path):
    result = generator("red", seed=3, preset="lcm")
    result.save(tmp_path / "a.png")

    recorded = read_metadata(tmp_path / "a.png")["request"]

    assert recorded["preset"] is None
    assert {name: recorded[name] for name in PRESET_FIELDS} == settings_of("lcm")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_inference_steps": 8}, {"num_inference_steps": 8, "schedule": "consistency"}),
        ({"guidance_scale": 1.5}, {"guidance_scale": 1.5, "sampler": "lcm"}),
        ({"schedule": "trailing"}, {"schedule": "trailing", "num_inference_steps": 4}),
        ({"sampler": "tcd"}, {"sampler": "tcd", "eta": 0.3, "schedule": "consistency"}),
        ({"sampler": "heun"}, {"sampler": "heun", "eta": 0.0, "num_inference_steps": 4}),
        ({"sampler": "Euler a Karras"}, {"schedule": "karras", "eta": 1.0}),
        ({"sigmas": (9, 3)}, {"schedule": "custom", "num_inference_steps": 2, "sampler": "lcm"}),
    ],
)
def test_a_field_that_is_given_wins_over_the_preset(given, expected):
    request = resolve(GenerationRequest("red", preset="lcm", **given), TINY_SPEC)

    assert {name: getattr(request, name) for name in expected} == expected


def test_a_preset_of_another_prediction_than_the_bundle_s_is_refused():
    request = GenerationRequest("red", preset="lightning-1")

    with pytest.raises(RequestError) as raised:
        resolve(request, replace(TINY_SPEC, prediction_type="epsilon"))

    assert str(raised.value) == (
        "preset: 'lightning-1' is for a UNet that predicts sample, and that of this bundle "
        "predicts epsilon; choose another, or export the checkpoint again with --preset lightning-1"
    )


def test_an_unknown_preset_lists_them_with_a_suggestion():
    with pytest.raises(RequestError, match=r"'lightning4' \(did you mean lightning-4.*dmd2-1$"):
        GenerationRequest("red", preset="lightning4")


def test_a_model_that_samples_nothing_has_no_presets():
    with pytest.raises(RequestError, match="preset: means nothing to this bundle"):
        resolve(GenerationRequest(image=PICTURE, preset="lcm"), tiny_spec("autoencoder"))


def test_a_preset_replaces_the_settings_of_a_resolved_request_but_not_of_an_open_one():
    fields = {"num_inference_steps": 7, "sigmas": None, "seed": 1}
    made = resolve(GenerationRequest("red", **fields), TINY_SPEC)
    listed = resolve(GenerationRequest("red", sigmas=(9, 3), seed=1), TINY_SPEC)

    for given, steps in [(made, 4), (listed, 4), (GenerationRequest("red", **fields), 7)]:
        request = resolve(request_from(given, {"preset": "dmd2"}), TINY_SPEC)

        assert (request.sampler, request.schedule, request.seed) == ("lcm", "trailing", 1)
        assert request.num_inference_steps == steps

    changed = resolve(request_from(made, {"preset": "dmd2", "num_inference_steps": 2}), TINY_SPEC)
    assert (changed.num_inference_steps, changed.sampler) == (2, "lcm")
