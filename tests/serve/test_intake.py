import base64
import io

import numpy as np
import pytest
from PIL import Image

from ldm_runtime import GenerationRequest, Generator
from ldm_serve.errors import ServeError
from ldm_serve.intake import check_request, cost
from ldm_serve.served_models import ServedModels
from ldm_serve.settings import Limits


def data_url(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


RED = Image.new("RGB", (16, 16), (255, 0, 0))
SHORT = {"num_inference_steps": 2, "guidance_scale": 3.0}
GUIDED = {"num_inference_steps": 10, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def model(bundle):
    return ServedModels({"tiny": bundle}).find(None)


def refusal(model, limits=None, **fields):
    with pytest.raises(ServeError) as error:
        check_request({"prompt": "red", **fields}, model, limits or Limits())
    return error.value


def test_a_seed_is_chosen_once(model):
    first, second = (check_request({"prompt": "red"}, model, Limits()) for _ in range(2))

    assert first.fields == {"prompt": "red", "seed": first.request.seed}
    assert first.request.seed != second.request.seed
    assert check_request(first.fields, model, Limits()).request == first.request


def test_a_seed_to_vary_towards_is_chosen_once(model):
    checked = check_request({"prompt": "red", "variation_strength": 0.5}, model, Limits())

    assert checked.fields["variation_seed"] == checked.request.variation_seed
    assert check_request(checked.fields, model, Limits()).request == checked.request


def test_fields_of_none_are_left_out(model):
    fields = {"prompt": "red", "seed": 1, "height": None, "sampler": None}

    assert check_request(fields, model, Limits()).fields == {"prompt": "red", "seed": 1}


@pytest.mark.parametrize("value", ["/etc/passwd", "engines", "http://localhost/a.png", ""])
@pytest.mark.parametrize("field", ["image", "mask_image", "latents", "depth_map", "layout"])
def test_text_never_names_a_file_or_an_address(model, field, value, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.open", None)

    error = refusal(model, **{field: value})

    assert (error.status, error.param) == (400, field)
    assert str(error) == f"{field}: send a data: URL; this server opens no files or addresses"


def test_images_come_as_data(model):
    url = data_url(Image.new("RGB", (16, 16)))

    checked = check_request({"prompt": "red", "image": url, "seed": 1}, model, Limits())

    assert checked.fields["image"] == url
    assert checked.request.source_image.image.size == (16, 16)


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"num_inference_steps": 10, "guidance_scale": 1.0}, 10),
        ({"num_inference_steps": 10, "guidance_scale": 3.0}, 20),
        ({"num_inference_steps": 10, "guidance_scale": 3.0, "num_images": 3}, 60),
        ({"num_inference_steps": 10, "guidance_scale": 1.0, "hires_scale": 2.0}, None),
    ],
)
def test_the_cost_is_the_work_of_the_unet(model, bundle, fields, steps, monkeypatch):
    request = check_request({"prompt": "red", **fields}, model, Limits()).request
    pixels = 0
    with Generator(bundle, threads=1) as generator:
        unet = type(generator._network("unet"))
        run = unet.run

        def counted(self, inputs):
            nonlocal pixels
            if "timesteps" in inputs:
                batch, _, height, width = inputs["latents"].shape
                pixels += batch * height * width * 4
            return run(self, inputs)

        monkeypatch.setattr(unet, "run", counted)
        generator.generate(GenerationRequest(**{"prompt": "red", **fields}))

    assert cost(request) == pytest.approx(pixels / 1e6)
    if steps is not None:
        assert cost(request) == pytest.approx(steps * 16 * 16 / 1e6)


@pytest.mark.parametrize(
    ("limit", "fields", "param"),
    [
        ({"max_images": 2}, {"num_images": 3}, "num_images"),
        ({"max_pixels": 256}, {"width": 20}, "width"),
        ({"max_pixels": 256}, {"hires_scale": 2.0}, "width"),
        ({"max_steps": 5}, {"num_inference_steps": 6}, "num_inference_steps"),
        ({"max_cost": 0.01}, {"num_inference_steps": 50}, "num_inference_steps"),
        ({"max_prompt_characters": 5}, {"prompt": "orange"}, "prompt"),
        ({"max_prompt_characters": 5}, {"negative_prompt": "orange"}, "negative_prompt"),
        ({"max_changing_characters": 499}, {"prompt": "[a|b]" * 50, **SHORT}, "prompt"),
        (
            {"max_changing_characters": 502},
            {"negative_prompt": "[a|b]" * 50, **SHORT},
            "negative_prompt",
        ),
        ({"max_text_chunks": 2}, {"prompt": "[a|b|c]", **GUIDED}, "prompt"),
        ({"max_text_chunks": 20}, {"prompt": "a" * 1000, **GUIDED}, "prompt"),
    ],
)
def test_limits(model, limit, fields, param):
    error = refusal(model, Limits(**limit), **fields)

    assert (error.status, error.param) == (400, param)
    assert str(next(iter(limit.values()))) in str(error)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_inference_steps": 100_000},
        {"num_inference_steps": 100_000, "strength": 0.002, "image": data_url(RED)},
        {"sigmas": [*range(10_000, -1, -1)]},
    ],
)
def test_what_makes_prompts_long_to_read_is_refused_before_they_are_read(model, fields):
    """It would take hours, and be beyond the limits then, or of few steps of a long schedule."""
    error = refusal(model, prompt="[a|b]" * 6_400, **fields)

    assert (error.param, error.code) == ("num_inference_steps", "limit")


def test_prompts_that_people_write_are_within_the_limits(model):
    long = "a cat, " * 4_500
    changing = "a [red|blue|green] [cat:dog:0.4] on a mat, in the rain, [at dusk::0.7], " * 20
    steps = Limits().max_steps

    for prompt in (long, changing):
        check_request(
            {"prompt": prompt, "negative_prompt": prompt, "num_inference_steps": steps},
            model,
            Limits(),
        )


def test_a_preset_says_how_many_steps_are_asked_for(model):
    few = Limits(max_steps=3)

    check_request({"prompt": "[a|b]", "preset": "turbo"}, model, few)
    for fields in ({}, {"preset": "lcm"}):
        assert refusal(model, few, **fields).param == "num_inference_steps"


def test_every_need_of_a_task_is_said(bundles):
    models = ServedModels(
        {task: bundles / task for task in ("class-to-image", "semantic-synthesis")}
    )

    for name, field in (("class-to-image", "class_label"), ("semantic-synthesis", "segmentation")):
        with pytest.raises(ServeError) as error:
            check_request({}, models.find(name), Limits())
        assert error.value.param == field
    url = data_url(Image.fromarray(np.zeros((16, 16), np.uint8)))
    check_request({"segmentation": url}, models.find("semantic-synthesis"), Limits())
