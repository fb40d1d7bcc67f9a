import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_runtime.errors import BundleError, RequestError
from ldm_runtime.request import (
    MAX_SEED,
    GenerationRequest,
    parse_request,
    resolve,
    sigmas_of,
    size_step,
)
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.testing import TINY_SPEC


def resolved(**fields):
    return resolve(parse_request({"prompt": "a red circle", **fields}), TINY_SPEC)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 3),
        ("prompt", None),
        ("prompt", b"bytes"),
        ("prompt", "half a \ud800 pair"),
        ("negative_prompt", None),
        ("negative_prompt", ["red"]),
        ("height", "64"),
        ("height", 64.0),
        ("height", True),
        ("height", 0),
        ("width", -8),
        ("width", 10**9),
        ("num_inference_steps", 0),
        ("num_inference_steps", False),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("guidance_scale", -0.1),
        ("guidance_scale", 10**400),
        ("guidance_scale", "7.5"),
        ("guidance_scale", True),
        ("sampler", "plms"),
        ("sampler", ["ddim"]),
        ("schedule", "cosine"),
        ("eta", 1.01),
        ("eta", math.nan),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("seed", 1.5),
        ("num_images", 0),
        ("num_images", None),
        ("num_images", 10**12),
    ],
)
def test_a_bad_value_is_an_error_that_names_its_field_from_python_and_from_json(field, value):
    fields = {"prompt": "a red circle", field: value}

    with pytest.raises(RequestError) as from_python:
        GenerationRequest(**fields)
    with pytest.raises(RequestError) as from_mapping:
        parse_request(fields)

    assert from_python.value.field == from_mapping.value.field == field
    assert str(from_python.value).startswith(f"{field}: ")
    assert "\n" not in str(from_python.value)


def test_an_unknown_field_is_an_error_that_lists_the_known_ones():
    with pytest.raises(RequestError, match=r"guidance: unknown field; .*guidance_scale") as caught:
        parse_request({"prompt": "a red circle", "guidance": 3})

    assert caught.value.field == "guidance"


def test_a_request_without_a_prompt_is_an_error():
    with pytest.raises(RequestError, match="prompt: is required"):
        parse_request({"seed": 1})


def test_an_error_shows_only_the_beginning_of_a_huge_value():
    with pytest.raises(RequestError) as caught:
        GenerationRequest(prompt=["red"] * 10_000)

    assert len(str(caught.value)) < 200


def test_numpy_numbers_become_python_numbers():
    request = GenerationRequest(
        prompt="red", seed=np.int64(3), height=np.uint16(8), guidance_scale=np.float32(2.5)
    )

    assert (type(request.seed), type(request.height)) == (int, int)
    assert type(request.guidance_scale) is float


def test_a_whole_number_will_do_for_a_number():
    assert GenerationRequest(prompt="red", guidance_scale=7).guidance_scale == 7.0


def test_seeds_of_all_images_must_fit_64_bits():
    GenerationRequest(prompt="red", seed=MAX_SEED)

    with pytest.raises(RequestError, match="seed: "):
        GenerationRequest(prompt="red", seed=MAX_SEED, num_images=2)


def test_resolving_fills_every_field_from_the_model_and_the_sampler():
    request = resolved(seed=5)

    assert request == GenerationRequest(
        prompt="a red circle",
        negative_prompt="",
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=3.0,
        sampler="ddim",
        schedule="leading",
        eta=0.0,
        seed=5,
        num_images=1,
    )


def test_what_a_request_says_wins_over_the_defaults():
    request = resolved(height=32, guidance_scale=0.0, sampler="euler_ancestral", schedule="karras")

    assert (request.height, request.guidance_scale) == (32, 0.0)
    assert (request.sampler, request.schedule, request.eta) == ("euler_ancestral", "karras", 1.0)


@given(
    sampler=st.sampled_from([None, *SAMPLERS]),
    seed=st.none() | st.integers(0, MAX_SEED),
    steps=st.none() | st.integers(1, 1000),
    scale=st.none() | st.floats(0, 100),
)
def test_a_resolved_request_survives_json_and_resolves_to_itself(sampler, seed, steps, scale):
    request = resolved(sampler=sampler, seed=seed, num_inference_steps=steps, guidance_scale=scale)

    again = parse_request(json.loads(json.dumps(dataclasses.asdict(request))))

    assert again == request
    assert resolve(again, TINY_SPEC) == request
    assert None not in dataclasses.asdict(request).values()


def test_open_seeds_are_drawn_anew_and_leave_room_for_every_image():
    seeds = {resolved(num_images=10_000).seed for _ in range(8)}

    assert len(seeds) > 1
    assert max(seeds) + 10_000 <= 2**32


def test_the_size_step_counts_the_autoencoder_and_the_halvings_of_the_unet():
    deeper = dataclasses.replace(TINY_SPEC.unet, channel_mult=(1, 2, 4, 4))

    assert size_step(TINY_SPEC) == 2 * 2
    assert size_step(dataclasses.replace(TINY_SPEC, unet=deeper)) == 2 * 8


@pytest.mark.parametrize(
    ("size", "nearest"), [(17, "16 and 20"), (15, "12 and 16"), (1, "4 and 8"), (3, "4 and 8")]
)
def test_a_size_between_two_steps_is_an_error_that_names_both(size, nearest):
    with pytest.raises(RequestError, match=f"width: {size} .* of 4; .* {nearest}$"):
        resolved(width=size)


def test_more_steps_than_the_training_schedule_has_are_an_error():
    assert resolved(num_inference_steps=1000).num_inference_steps == 1000

    with pytest.raises(RequestError, match=r"num_inference_steps: 1001 .* 1 to 1000"):
        resolved(num_inference_steps=1001)


def test_a_model_without_a_usable_schedule_is_an_error_of_the_bundle():
    spec = dataclasses.replace(TINY_SPEC, alphas_cumprod=(0.5, 0.9))

    with pytest.raises(BundleError, match="alphas_cumprod must decrease"):
        resolve(GenerationRequest(prompt="red"), spec)


def test_eta_is_an_error_for_a_sampler_without_noise():
    assert resolved(sampler="ddim", eta=0.3).eta == 0.3
    assert resolved(sampler="euler", eta=0.0).eta == 0.0

    with pytest.raises(RequestError, match=r"eta: sampler 'euler' has none.*ddim"):
        resolved(sampler="euler", eta=0.3)


def test_the_sigmas_of_a_request_are_those_of_its_sampler():
    ddim, euler = resolved(sampler="ddim"), resolved(sampler="euler")

    assert sigmas_of(ddim, TINY_SPEC)[:-1] == sigmas_of(euler, TINY_SPEC)[:-1]
    assert sigmas_of(euler, TINY_SPEC)[-1] == 0
    assert sigmas_of(ddim, TINY_SPEC)[-1] > 0
