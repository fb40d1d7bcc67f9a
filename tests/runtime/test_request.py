import dataclasses
import json
import math

import numpy as np
import pytest

from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.layouts import LayoutObject
from ldm_runtime.requests.aliases import ALIASES
from ldm_runtime.requests.fields import MAX_SEED
from ldm_runtime.requests.request import FIELDS, GenerationRequest, parse_request
from ldm_runtime.requests.request_json import request_to_fields, request_to_json
from ldm_runtime.specs.tasks import TASKS
from ldm_runtime.testing import tiny_requests

PICTURE = np.zeros((8, 8, 3), dtype=np.uint8)
BOX = {"label": 3, "box": [0.25, 0, 1, 0.5]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 3),
        ("prompt", b"bytes"),
        ("prompt", "half a \ud800 pair"),
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
        ("sampler", "ddim2"),
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
        ("literal_prompt", 1),
        ("literal_prompt", None),
        ("guidance_rescale", 1.5),
        ("guidance_interval", 3.0),
        ("guidance_interval", (3.0, 1.0)),
        ("guidance_interval", (1.0, 2.0, 3.0)),
        ("guidance_interval", "12"),
        ("sigmas", "3,2,1"),
        ("sigmas", (3.0, math.nan)),
        ("sigmas", (3.0, -1.0)),
        ("zero_terminal_snr", "yes"),
        ("noise", "philox"),
        ("variation_seed", -1),
        ("variation_strength", 1.1),
        ("image", 3),
        ("image", "no/such/file.png"),
        ("image", b"no picture"),
        ("mask_image", {"sha256": "abc", "width": 8, "height": 8}),
        ("strength", 0.0),
        ("strength", 1.1),
        ("original_size", 1024),
        ("original_size", (1024, 0)),
        ("target_size", (1024, 1024, 3)),
        ("crop_top_left", (-1, 0)),
        ("crop_top_left", (0.5, 0)),
        ("aesthetic_score", 11),
        ("outpaint", (1, 2, 3)),
        ("outpaint", (0, 0, 0, 0)),
        ("outpaint", (1.5, 0, 0, 0)),
        ("hires_scale", 0.5),
        ("hires_strength", 0.0),
        ("tile_size", -1),
        ("class_label", -1),
        ("class_label", True),
        ("class_label", ""),
        ("class_label", 2.0),
        ("layout", "boxes.json"),
        ("layout", {"label": 3, "box": [0, 0, 1, 1]}),
        ("layout", [3]),
        ("layout", [{"label": 3}]),
        ("layout", [BOX | {"name": "cat"}]),
        ("layout", [BOX | {"label": -1}]),
        ("layout", [BOX | {"label": ""}]),
        ("layout", [BOX | {"label": True}]),
        ("layout", [BOX | {"box": [0, 0, 1]}]),
        ("layout", [BOX | {"box": [0, 0, 1, 1.5]}]),
        ("layout", [BOX | {"box": [0, 0, math.nan, 1]}]),
        ("layout", [BOX | {"box": [0.5, 0, 0.25, 1]}]),
        ("depth_map", 3),
        ("depth_map", "no/such/file.png"),
        ("depth_map", np.zeros((8, 8, 3), dtype=np.float32)),
        ("segmentation", 3),
        ("segmentation", "no/such/file.png"),
        ("segmentation", np.zeros((8, 8), dtype=np.float32)),
        ("segmentation", np.zeros((8, 8, 3), dtype=np.uint8)),
        ("segmentation", {"sha256": "abc", "width": 8, "height": 8}),
        ("embeddings", 3),
        ("embeddings", "no/such/file.npy"),
        ("embeddings", np.full((1, 8), np.nan, dtype=np.float32)),
        ("embeddings", np.zeros((0, 8), dtype=np.float32)),
        ("embeddings", {"sha256": "abc", "count": 1, "width": 8}),
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
    with pytest.raises(RequestError, match=r"guidance: unknown field .*guidance_scale") as caught:
        parse_request({"prompt": "a red circle", "guidance": 3})

    assert caught.value.field == "guidance"


def test_a_request_need_not_have_a_prompt_because_not_every_model_takes_one():
    assert parse_request({"seed": 1}) == GenerationRequest(seed=1)
    assert parse_request({"seed": 1, "prompt": None}) == GenerationRequest(seed=1)


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


def test_numpy_text_becomes_python_text():
    """Or an image could be generated and not saved, as its metadata holds no other."""
    texts = {
        "prompt": "red",
        "negative_prompt": "blue",
        "sampler": "euler",
        "schedule": "karras",
        "preset": "lcm",
        "noise": "numpy",
        "reuse": "deep:3",
        "decoder": "tiny",
        "class_label": "circle",
    }

    request = GenerationRequest(**{name: np.str_(text) for name, text in texts.items()})

    for name, text in texts.items():
        assert getattr(request, name) == text
        assert type(getattr(request, name)) is str


def test_a_whole_number_will_do_for_a_number():
    assert GenerationRequest(prompt="red", guidance_scale=7).guidance_scale == 7.0


def test_seeds_of_all_images_must_fit_64_bits():
    GenerationRequest(prompt="red", seed=MAX_SEED)

    with pytest.raises(RequestError, match="seed: "):
        GenerationRequest(prompt="red", seed=MAX_SEED, num_images=2)


def test_json_says_of_a_picture_what_identifies_it_and_of_the_rest_everything():
    request = GenerationRequest(
        prompt="red", image=PICTURE, outpaint=(0, 0, 8, 0), sigmas=(3.0, 1.0), seed=2
    )

    values = json.loads(json.dumps(request_to_json(request)))

    assert values["image"]["sha256"] == request.image.sha256
    assert (values["image"]["width"], values["image"]["height"]) == (8, 8)
    assert parse_request(values | {"image": PICTURE}) == request
    with pytest.raises(RequestError, match=r"image: is known by its hash alone"):
        parse_request(values)


def test_a_layout_is_the_same_from_records_and_from_json():
    objects = (LayoutObject(label=3, box=(0.25, 0.0, 1.0, 0.5)),)

    request = GenerationRequest(layout=objects)

    assert parse_request({"layout": [BOX]}) == request
    assert json.loads(json.dumps(request_to_json(request)))["layout"] == [BOX]


def test_json_says_of_maps_and_embeddings_what_identifies_them():
    request = GenerationRequest(
        segmentation=np.zeros((4, 6), dtype=np.uint8), embeddings=np.ones((2, 8), dtype=np.float32)
    )

    values = json.loads(json.dumps(request_to_json(request)))

    assert values["segmentation"] == {
        "sha256": request.segmentation.sha256,
        "width": 6,
        "height": 4,
    }
    assert values["embeddings"] == {"sha256": request.embeddings.sha256, "count": 2, "width": 8}
    with pytest.raises(RequestError, match=r"segmentation: is known by its hash alone"):
        parse_request(values)


@pytest.mark.parametrize(
    "fields",
    [
        {"class_label": 3},
        {"layout": [BOX, BOX]},
        {"segmentation": np.zeros((4, 6), dtype=np.uint8)},
        {"embeddings": np.ones((2, 8), dtype=np.float32)},
    ],
)
def test_requests_with_equal_conditions_are_equal_and_hash_alike(fields):
    first, second, other = parse_request(fields), parse_request(fields), GenerationRequest()

    assert first == second != other
    assert hash(first) == hash(second)


def test_the_prompt_may_come_first_without_its_name():
    assert GenerationRequest("red", seed=1) == GenerationRequest(prompt="red", seed=1)


def test_no_negative_prompt_is_an_empty_one():
    assert GenerationRequest("red", negative_prompt=None) == GenerationRequest("red")


def test_lists_and_arrays_do_where_a_request_holds_tuples():
    request = GenerationRequest(
        "red", sigmas=np.array([3.0, 1.0]), guidance_interval=[0, 2], outpaint=[0, 0, 8, 0]
    )

    assert (request.sigmas, request.guidance_interval) == ((3.0, 1.0), (0.0, 2.0))
    assert request.outpaint == (0, 0, 8, 0)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("num_inference_step", "unknown field (did you mean num_inference_steps?)"),
        ("steps", "unknown field (did you mean num_inference_steps?)"),
        ("cfg_scale", "unknown field (did you mean guidance_scale?)"),
        ("num_images_per_prompt", "unknown field (did you mean num_images?)"),
        ("n", "unknown field (did you mean num_images?)"),
        ("generator", "unknown field (did you mean seed?)"),
        ("rng_seed", "unknown field (did you mean seed?)"),
        ("init_image", "unknown field (did you mean image?)"),
        ("output_type", "unknown field; leave it out: a result has images (PIL) and latents"),
        ("callback_on_step_end", "unknown field; give on_step to the generator's call"),
        ("self", "unknown field; a request has prompt, class_label"),
    ],
)
def test_the_name_that_was_meant_is_said_by_constructor_and_parser_alike(name, sentence):
    with pytest.raises(RequestError) as parsed:
        parse_request({"prompt": "red", name: 5})

    assert parsed.value.field == name
    assert f"{name}: {sentence}" in str(parsed.value)
    if name != "self":
        with pytest.raises(RequestError) as constructed:
            GenerationRequest("red", **{name: 5})
        assert str(constructed.value) == str(parsed.value)


def test_every_alias_stands_for_a_field_and_is_none():
    assert set(ALIASES.values()) <= FIELDS.keys()
    assert FIELDS.keys().isdisjoint(ALIASES)


@pytest.mark.parametrize(
    ("field", "value", "fix"),
    [("seed", -1, "leave it out for a random one"), ("strength", 0.0, "0 would change nothing")],
)
def test_a_value_that_other_programs_take_is_refused_with_what_to_do(field, value, fix):
    with pytest.raises(RequestError, match=f"must lie between .*, got {value}; {fix}"):
        GenerationRequest("red", **{field: value})


def test_a_request_is_shown_by_what_it_changes():
    assert repr(GenerationRequest("red", seed=7)) == "GenerationRequest(prompt='red', seed=7)"
    assert repr(GenerationRequest()) == "GenerationRequest()"


def test_replacing_a_field_checks_it():
    request = GenerationRequest("red", sigmas=[3, 1])

    assert dataclasses.replace(request, seed=2) == GenerationRequest("red", sigmas=[3, 1], seed=2)
    with pytest.raises(RequestError, match="seed: must be a whole number"):
        dataclasses.replace(request, seed="2")


@pytest.mark.parametrize("task", TASKS)
def test_a_request_can_be_sent_as_json(task):
    for request in tiny_requests(task):
        assert parse_request(json.loads(json.dumps(request_to_fields(request)))) == request


def test_latents_that_are_sent_as_json_are_the_same():
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8))
    request = GenerationRequest("red", latents=latents, num_images=2, guidance_interval=(0.1, 3))

    fields = json.loads(json.dumps(request_to_fields(request)))

    assert parse_request(fields) == request
    assert fields.keys() == {"prompt", "latents", "num_images", "guidance_interval"}
