from dataclasses import fields, replace

import pytest

from ldm_runtime.errors import RequestError
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.specs.networks import UNetSpec
from ldm_runtime.specs.tasks import TASKS
from ldm_runtime.testing import tiny_requests, tiny_spec, write_tiny_bundle
from ldm_serve.served_models import ServedModels, usable_fields


@pytest.mark.parametrize("task", TASKS)
def test_golden_requests_have_usable_fields_alone(task):
    for request in tiny_requests(task):
        changed = {
            each.name for each in fields(request) if getattr(request, each.name) != each.default
        }
        assert changed <= usable_fields(tiny_spec(task))


@pytest.mark.parametrize(
    ("task", "name", "value"),
    [
        ("text-to-image", "original_size", (64, 64)),
        ("text-to-image", "crop_top_left", (0, 8)),
        ("text-to-image", "target_size", (64, 64)),
        ("text-to-image", "aesthetic_score", 6.0),
        ("text-to-image", "negative_aesthetic_score", 2.0),
        ("text-to-image", "refiner_start", 0.5),
        ("text-to-image", "reuse", "deep:3"),
        ("text-to-image", "decoder", "tiny"),
        ("unconditional", "guidance_scale", 3.0),
        ("unconditional", "guidance_rescale", 0.5),
        ("unconditional", "guidance_interval", (0.0, 5.0)),
    ],
)
def test_what_is_not_usable_is_refused(task, name, value):
    request, _ = tiny_requests(task)
    given = {each.name: getattr(request, each.name) for each in fields(request)}
    spec = tiny_spec(task)

    assert name in TASKS[task].takes
    assert name not in usable_fields(spec)
    with pytest.raises(RequestError, match=name):
        resolve(GenerationRequest(**{**given, name: value}), spec)


def test_a_model_with_the_guidance_scale_as_an_input_takes_that_alone_of_guidance():
    spec = tiny_spec("text-to-image")
    unet = replace(spec.network(UNetSpec), guidance_dim=8)

    usable = usable_fields(spec.with_networks(unet=unet))

    assert "guidance_scale" in usable
    assert not {"negative_prompt", "guidance_rescale", "guidance_interval"} & usable


def test_a_description_says_what_a_form_needs(tmp_path):
    tasks = ("class-to-image", "layout-to-image", "semantic-synthesis", "super-resolution")
    for task in tasks:
        write_tiny_bundle(tmp_path / task, task)

    models = ServedModels({task: tmp_path / task for task in tasks})
    classes, layout, maps, large = (models[task].description() for task in tasks)

    assert (classes["classes"], classes["max_objects"]) == (4, None)  # the fifth is the null class
    assert (layout["classes"], layout["max_objects"]) == (None, 3)
    assert (maps["classes"], maps["size"]) == (6, "segmentation")
    assert (large["size"], large["enlargement"]) == ("enlarged", 2)
    assert set(large["takes"]) == set(large["fields"])
