import dataclasses
from typing import get_args

import numpy as np
import pytest

from ldm_runtime.errors import RequestError
from ldm_runtime.requests.request import GenerationRequest, parse_request
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.task_checks import check_needs
from ldm_runtime.specs.model import Task
from ldm_runtime.specs.tasks import TASKS, can_guide, samples_per_image
from ldm_runtime.testing import tiny_spec
from tests.runtime.task_cases import NEEDED, PICTURE

NAMES = {field.name for field in dataclasses.fields(GenerationRequest)}
#: A value for every field that not all tasks have, and what it takes beside it.
VALUES = {name: value for fields in NEEDED.values() for name, value in fields.items()} | {
    "negative_prompt": "blue",
    "literal_prompt": True,
    "clip_skip": 1,
    "original_size": (32, 48),
    "crop_top_left": (0, 8),
    "target_size": (16, 24),
    "aesthetic_score": 7.0,
    "negative_aesthetic_score": 2.0,
    "noise_level": 40,
    "strength": 0.5,
    "mask_blur": (4, 4),
    "outpaint": (4, 0, 0, 0),
    "hires_scale": 1.5,
    "hires_strength": 0.5,
    "preset": "lcm",
    "num_inference_steps": 3,
    "sampler": "euler",
    "schedule": "trailing",
    "sigmas": (3.0, 1.0),
    "eta": 0.5,
    "zero_terminal_snr": True,
    "guidance_scale": 2.0,
    "image_guidance_scale": 2.0,
    "guidance_rescale": 0.5,
    "guidance_interval": (0.5, 2.0),
    "noise": "torch-cuda",
    "variation_seed": 3,
    "variation_strength": 0.5,
    "latents": np.ones((1, 4, 8, 8), dtype=np.float32),
    "refiner_start": 0.5,
    "denoising_end": 0.5,
    "denoising_start": 0.5,
    "reuse": "deep:2",
    "num_images": 2,
    "decoder": "tiny",
    "tile_size": 64,
}


def resolved(task, **fields):
    return resolve(parse_request(NEEDED[task] | fields), tiny_spec(task))


def test_every_task_of_a_manifest_is_in_the_table():
    assert set(TASKS) == set(get_args(Task))


@pytest.mark.parametrize("task", TASKS)
def test_what_a_task_takes_are_fields_of_a_request(task):
    assert TASKS[task].takes <= NAMES


def test_every_field_of_a_request_means_something_to_some_task():
    assert frozenset().union(*(record.takes for record in TASKS.values())) == NAMES


@pytest.mark.parametrize("task", TASKS)
def test_what_a_task_needs_is_enough_and_resolves_once_and_for_all(task):
    request = resolved(task)

    assert None not in dataclasses.asdict(request).values()
    assert bool(request.passes) == TASKS[task].samples
    assert resolve(request, tiny_spec(task)) == request
    assert resolve(request.as_request(), tiny_spec(task)) == request


@pytest.mark.parametrize(
    ("task", "missing", "sentence"),
    [
        ("class-to-image", "class_label", "give class_label"),
        ("text-to-image", "prompt", "give prompt"),
        ("layout-to-image", "layout", "give layout"),
        ("semantic-synthesis", "segmentation", "give segmentation"),
        ("super-resolution", "image", "give image"),
        ("inpainting", "image", "give image"),
        ("inpainting", "mask_image", "give mask_image or outpaint"),
        ("image-editing", "image", "give image"),
        ("image-editing", "prompt", "give prompt"),
        ("image-variation", "image", "give image"),
        ("depth-to-image", "prompt", "give prompt"),
        ("retrieval", "embeddings", "give embeddings"),
        ("autoencoder", "image", "give image"),
    ],
)
def test_a_missing_field_is_a_sentence_that_names_task_and_field(task, missing, sentence):
    fields = {name: value for name, value in NEEDED[task].items() if name != missing}

    with pytest.raises(RequestError) as caught:
        resolve(parse_request(fields), tiny_spec(task))

    assert caught.value.field == missing
    assert str(caught.value) == f"{missing}: this bundle is {task}: {sentence}"


def test_the_sentence_names_all_that_is_missing_in_the_words_of_whoever_asks():
    flags = {"image": "--image photo.png", "outpaint": "--outpaint 0,0,64,0"}

    with pytest.raises(RequestError) as caught:
        check_needs(GenerationRequest(), tiny_spec("inpainting"), flags)

    assert str(caught.value) == (
        "image: this bundle is inpainting: "
        "give --image photo.png and mask_image or --outpaint 0,0,64,0"
    )


@pytest.mark.parametrize("task", TASKS)
def test_a_field_of_other_tasks_is_an_error_that_names_it(task):
    foreign = sorted(NAMES - TASKS[task].takes)

    for name in foreign:
        with pytest.raises(RequestError) as caught:
            resolved(task, **{name: VALUES[name]})

        assert caught.value.field == name
        assert str(caught.value) == (
            f"{name}: means nothing to this bundle, which is {task}; leave it out"
        )


def test_what_is_missing_is_said_before_what_is_too_much():
    with pytest.raises(RequestError, match=r"^layout: this bundle is layout-to-image: give layout"):
        resolve(GenerationRequest(prompt="a red circle"), tiny_spec("layout-to-image"))


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("unconditional", False),
        ("class-to-image", True),
        ("text-to-image", True),
        ("layout-to-image", True),
        ("semantic-synthesis", False),
        ("super-resolution", False),
        ("inpainting", False),
        ("text-super-resolution", True),
        ("text-inpainting", True),
        ("image-editing", True),
        ("image-variation", True),
        ("depth-to-image", True),
        ("retrieval", True),
        ("autoencoder", False),
    ],
)
def test_guidance_takes_a_condition_that_says_nothing(task, expected):
    assert can_guide(tiny_spec(task)) == expected


@pytest.mark.parametrize(
    ("task", "component", "expected"),
    [
        ("text-to-image", "unet", 2),
        ("text-to-image", "vae_decoder", 1),
        ("image-editing", "unet", 3),
        ("image-editing", "text_encoder", 2),
        ("image-editing", "vae_encoder", 1),
        ("image-variation", "unet", 2),
        ("image-variation", "image_encoder", 1),
        ("inpainting", "unet", 1),
    ],
)
def test_an_image_asks_for_as_many_samples_as_guidance_takes(task, component, expected):
    assert samples_per_image(tiny_spec(task), component) == expected


def test_classes_without_a_null_class_cannot_be_guided():
    spec = tiny_spec("class-to-image")
    embedder = dataclasses.replace(spec.networks["class_embedder"], null_class=None)

    assert not can_guide(spec.with_networks(class_embedder=embedder))


@pytest.mark.parametrize("task", [name for name in TASKS if not can_guide(tiny_spec(name))])
def test_where_guidance_cannot_be_on_it_is_off_whatever_the_bundle_s_default(task):
    defaults = dataclasses.replace(tiny_spec(task).defaults, guidance_scale=3.0)
    spec = dataclasses.replace(tiny_spec(task), defaults=defaults)

    request = resolve(parse_request(NEEDED[task]), spec)

    assert request.guidance_scale == 1.0
    assert resolve(request, spec) == request


@pytest.mark.parametrize("task", [name for name in TASKS if not can_guide(tiny_spec(name))])
@pytest.mark.parametrize("name", ["guidance_scale", "guidance_rescale", "guidance_interval"])
def test_where_guidance_cannot_be_on_asking_for_it_is_an_error(task, name):
    with pytest.raises(RequestError) as caught:
        resolved(task, **{name: VALUES[name]})

    assert caught.value.field == name


def test_the_error_about_guidance_says_why():
    with pytest.raises(RequestError) as caught:
        resolved("unconditional", guidance_scale=3)

    assert str(caught.value) == (
        "guidance_scale: is 3.0, but this bundle (unconditional) has no null condition to steer "
        "away from; leave it out"
    )


def test_guidance_is_the_bundle_s_where_it_can_be_on():
    assert resolved("retrieval").guidance_scale == 3.0
    assert resolved("layout-to-image", guidance_scale=2).guidance_scale == 2.0


@pytest.mark.parametrize("task", [name for name in TASKS if TASKS[name].image == "start"])
def test_a_picture_to_start_from_goes_with_every_task_that_starts_from_noise(task):
    assert resolved(task, image=PICTURE).passes[0].strength == 0.8
    assert resolved(task, image=PICTURE, mask_image=PICTURE).passes[0].strength == 1.0
    assert resolved(task).passes[0].strength == 1.0


@pytest.mark.parametrize("task", [name for name in TASKS if TASKS[name].image == "condition"])
def test_a_picture_that_is_the_condition_has_no_strength(task):
    assert resolved(task).as_request().strength is None
