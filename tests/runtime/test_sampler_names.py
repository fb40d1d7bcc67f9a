"""Names of samplers in other programs, against those programs' own tables."""

import math

import numpy as np
import pytest

from ldm_runtime.errors import RequestError
from ldm_runtime.requests.request import GenerationRequest, parse_request
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import sampling_sigmas, training_sigmas
from ldm_runtime.testing import TINY_SPEC

#: Label, function of k-diffusion and schedule of A1111's samplers, as its module
#: `sd_samplers_kdiffusion.py` has them at 01a40c6.
A1111 = [
    ("Euler a", "sample_euler_ancestral", None),
    ("Euler", "sample_euler", None),
    ("LMS", "sample_lms", None),
    ("Heun", "sample_heun", None),
    ("DPM2", "sample_dpm_2", None),
    ("DPM2 a", "sample_dpm_2_ancestral", None),
    ("DPM++ 2S a", "sample_dpmpp_2s_ancestral", None),
    ("DPM++ 2M", "sample_dpmpp_2m", None),
    ("DPM++ SDE", "sample_dpmpp_sde", None),
    ("DPM++ 2M SDE", "sample_dpmpp_2m_sde", None),
    ("DPM++ 3M SDE", "sample_dpmpp_3m_sde", None),
    ("LMS Karras", "sample_lms", "karras"),
    ("DPM2 Karras", "sample_dpm_2", "karras"),
    ("DPM2 a Karras", "sample_dpm_2_ancestral", "karras"),
    ("DPM++ 2S a Karras", "sample_dpmpp_2s_ancestral", "karras"),
    ("DPM++ 2M Karras", "sample_dpmpp_2m", "karras"),
    ("DPM++ SDE Karras", "sample_dpmpp_sde", "karras"),
    ("DPM++ 2M SDE Karras", "sample_dpmpp_2m_sde", "karras"),
    ("DPM++ 3M SDE Exponential", "sample_dpmpp_3m_sde", "exponential"),
]
#: Samplers whose source names another program than k-diffusion, which has them too.
ELSEWHERE = {"sample_euler": "euler"}


def by_source(function):
    """The sampler whose record names a function of k-diffusion as its source."""
    found = [name for name, each in SAMPLERS.items() if f"{function};" in f"{each.source};"]
    return found[0] if len(found) == 1 else ELSEWHERE[function]


@pytest.mark.parametrize(("label", "function", "schedule"), A1111)
def test_a_name_of_a1111_is_the_sampler_of_its_function_in_k_diffusion(label, function, schedule):
    request = GenerationRequest(sampler=label)

    assert (request.sampler, request.schedule) == (by_source(function), schedule)
    assert GenerationRequest(sampler=function).sampler == request.sampler
    assert parse_request({"sampler": label}) == request


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("euler_a", "euler_ancestral"),
        ("dpm++2m", "dpmpp_2m"),
        ("dpm++2s_a", "dpmpp_2s_ancestral"),
        ("uni_pc", "unipc"),
        ("k_dpm_2_a", "dpm2_ancestral"),
        ("DDIM", "ddim"),
        ("PLMS", "plms"),
    ],
)
def test_names_of_other_command_lines_are_known(name, expected):
    assert GenerationRequest(sampler=name).sampler == expected


@pytest.mark.parametrize(
    "name", ["DPM fast", "DPM adaptive", "DPM++ 2M SDE Heun", "DPMSolverSinglestepScheduler", "a"]
)
def test_a_sampler_that_is_not_here_is_unknown_by_every_name(name):
    with pytest.raises(RequestError, match="unknown sampler"):
        GenerationRequest(sampler=name)


def test_a_schedule_that_is_given_wins_over_that_of_the_sampler_s_name():
    given = GenerationRequest(sampler="DPM++ 2M Karras", schedule="Exponential")
    listed = GenerationRequest(prompt="", sampler="DPM++ 2M Karras", sigmas=(9.0, 1.0))

    assert (given.sampler, given.schedule) == ("dpmpp_2m", "exponential")
    assert resolve(listed, TINY_SPEC).sigmas == (9.0, 1.0, 0.0)


@pytest.mark.parametrize("name", ["Uniform", "normal"])
def test_the_uniform_schedule_is_that_of_k_diffusion(name):
    table = np.asarray(training_sigmas(np.linspace(0.999, 0.005, 1000)))
    schedule = GenerationRequest(schedule=name).schedule

    sigmas = sampling_sigmas(table, 7, schedule, "zero")

    timesteps = np.linspace(999, 0, 7)  # k-diffusion's get_sigmas and t_to_sigma
    expected = np.exp(np.interp(timesteps, np.arange(1000), np.log(table)))
    np.testing.assert_allclose(sigmas[:-1], expected, rtol=1e-9)
    assert math.isclose(sigmas[-1], 0)


def test_other_types_are_refused_as_before():
    with pytest.raises(RequestError, match="unknown sampler 3; choose"):
        parse_request({"sampler": 3})


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"sampler": "eulr"}, "unknown sampler 'eulr' (did you mean euler"),
        ({"num_inference_step": 5}, "unknown field (did you mean num_inference_steps?)"),
        ({"steps": 5}, "unknown field (did you mean num_inference_steps?)"),
        ({"cfg_scale": 5}, "unknown field (did you mean guidance_scale?)"),
        ({"mask": "m.png"}, "unknown field (did you mean mask_image?)"),
        ({"zzz": 5}, "unknown field; a request has prompt"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_one_that_is_close(fields, hint):
    with pytest.raises(RequestError) as caught:
        parse_request(fields)

    assert hint in str(caught.value)
