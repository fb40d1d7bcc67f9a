"""AUTOMATIC1111's API through a real socket and a real worker, as `webuiapi` and others call it."""

import asyncio
import base64
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
import webuiapi
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from requests.adapters import BaseAdapter

from ldm_runtime import Generator
from ldm_runtime.pipeline.infotext import read_infotext
from ldm_runtime.requests.sampler_names import known_sampler, known_schedule
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES
from ldm_serve.settings import Access, ServeSettings
from tests.serve.asgi import calling
from tests.serve.fake_executor import FakeExecutor

ROOT = "/sdapi/v1"
RED = Image.new("RGB", (16, 16), (255, 0, 0))
SLOW = {"prompt": "red", "width": 256, "height": 256, "steps": 200, "seed": 1}
#: What the API of version 1.10 has for every field of its forms that a client leaves out.
DEFAULTS = {
    "prompt": "",
    "negative_prompt": "",
    "styles": None,
    "seed": -1,
    "subseed": -1,
    "subseed_strength": 0,
    "seed_resize_from_h": -1,
    "seed_resize_from_w": -1,
    "sampler_name": None,
    "scheduler": None,
    "batch_size": 1,
    "n_iter": 1,
    "steps": 50,
    "cfg_scale": 7.0,
    "width": 512,
    "height": 512,
    "restore_faces": None,
    "tiling": None,
    "do_not_save_samples": False,
    "do_not_save_grid": False,
    "eta": None,
    "denoising_strength": 0.75,
    "s_min_uncond": None,
    "s_churn": None,
    "s_tmax": None,
    "s_tmin": None,
    "s_noise": None,
    "override_settings": None,
    "override_settings_restore_afterwards": True,
    "refiner_checkpoint": None,
    "refiner_switch_at": None,
    "disable_extra_networks": False,
    "firstpass_image": None,
    "comments": None,
    "sampler_index": "Euler",
    "script_name": None,
    "script_args": [],
    "send_images": True,
    "save_images": False,
    "alwayson_scripts": {},
    "force_task_id": None,
    "infotext": None,
}
TEXT_DEFAULTS = DEFAULTS | {
    "enable_hr": False,
    "firstphase_width": 0,
    "firstphase_height": 0,
    "hr_scale": 2.0,
    "hr_upscaler": None,
    "hr_second_pass_steps": 0,
    "hr_resize_x": 0,
    "hr_resize_y": 0,
    "hr_checkpoint_name": None,
    "hr_sampler_name": None,
    "hr_scheduler": None,
    "hr_prompt": "",
    "hr_negative_prompt": "",
}
IMAGE_DEFAULTS = DEFAULTS | {
    "resize_mode": 0,
    "image_cfg_scale": None,
    "mask": None,
    "mask_blur_x": 4,
    "mask_blur_y": 4,
    "mask_blur": None,
    "mask_round": True,
    "inpainting_fill": 0,
    "inpaint_full_res": True,
    "inpaint_full_res_padding": 0,
    "inpainting_mask_invert": 0,
    "initial_noise_multiplier": None,
    "latent_mask": None,
    "include_init_images": False,
}


class UnixAdapter(BaseAdapter):
    """Lets `requests` call a server through an HTTP client that listens on a Unix domain socket."""

    def __init__(self, client):
        super().__init__()
        self._client = client

    def send(self, request, **_):
        answer = self._client.request(
            request.method, request.path_url, headers=dict(request.headers), content=request.body
        )
        response = requests.Response()
        response.status_code, response.url = answer.status_code, request.url
        response.headers.update(answer.headers)
        response._content = answer.content
        return response

    def close(self):
        pass


class WebUIApi(webuiapi.WebUIApi):
    """The client of `webuiapi`, whose first call is made when it is created."""

    def __init__(self, client, **options):
        self._client = client
        super().__init__(baseurl=f"http://localhost{ROOT}", **options)

    def check_extensions(self):
        self.session.mount("http://", UnixAdapter(self._client))
        super().check_extensions()


@pytest.fixture
def ask(client):
    """The client that people use; its sampler and steps are its own."""
    return WebUIApi(client, steps=4)


@pytest.fixture(scope="module")
def generator(bundle):
    with Generator(bundle, threads=1) as generator:
        yield generator


def post(client, name, body):
    answer = client.post(f"{ROOT}/{name}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def decoded(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def in_base64(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def left_half():
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    return mask


# --- what the client of PyPI does


def test_images_are_those_of_the_generator_bit_for_bit(ask, generator):
    answer = ask.txt2img(
        prompt="a red circle",
        negative_prompt="blue",
        seed=7,
        batch_size=2,
        n_iter=2,
        cfg_scale=5.5,
        width=16,
        height=24,
        sampler_name="DPM++ 2M",
        scheduler="Karras",
    )

    expected = generator(
        "a red circle",
        negative_prompt="blue",
        seed=7,
        num_images=4,
        num_inference_steps=4,
        guidance_scale=5.5,
        width=16,
        height=24,
        sampler="dpmpp_2m",
        schedule="karras",
    )
    assert len(answer.images) == 4
    for ours, image in zip(answer.images, expected, strict=True):
        assert ours.tobytes() == image.tobytes()
    assert (answer.info["seed"], answer.info["all_seeds"]) == (7, [7, 8, 9, 10])
    assert answer.info["all_prompts"] == ["a red circle"] * 4
    assert answer.info["all_negative_prompts"] == ["blue"] * 4
    assert (answer.info["width"], answer.info["height"]) == (16, 24)
    assert (answer.info["sampler_name"], answer.info["cfg_scale"]) == ("DPM++ 2M", 5.5)
    assert (answer.info["steps"], answer.info["batch_size"]) == (4, 2)
    assert answer.info["extra_generation_params"]["Schedule type"] == "Karras"
    assert answer.info["sd_model_name"] == "text-to-image"


def test_texts_of_the_answer_are_those_of_the_files(ask):
    answer = ask.txt2img(prompt="red", seed=3, n_iter=3, width=16, height=16)

    assert answer.info["infotexts"] == [image.text["parameters"] for image in answer.images]
    assert len(set(answer.info["infotexts"])) == 3


def test_what_png_info_tells_generates_the_image_again(ask, generator):
    first = ask.txt2img(
        prompt="red, (blue:1.2)",
        negative_prompt="green: a, b",
        width=16,
        height=24,
        subseed=5,
        subseed_strength=0.25,
        sampler_name="DDIM",
        eta=0.5,
    )

    found = ask.png_info(first.image)
    values = found.parameters
    again = ask.txt2img(
        prompt=values["Prompt"],
        negative_prompt=values["Negative prompt"],
        steps=int(values["Steps"]),
        sampler_name=values["Sampler"],
        scheduler=values.get("Schedule type", "Automatic"),
        cfg_scale=float(values["CFG scale"]),
        seed=int(values["Seed"]),
        width=int(values["Size-1"]),
        height=int(values["Size-2"]),
        subseed=int(values["Variation seed"]),
        subseed_strength=float(values["Variation seed strength"]),
        eta=float(values["Eta"]),
    )

    assert found.info == first.info["infotexts"][0] == first.image.text["parameters"]
    assert again.image.tobytes() == first.image.tobytes()
    assert again.info["infotexts"] == first.info["infotexts"]
    request = read_infotext(found.info).request
    assert generator(**request).image.tobytes() == first.image.tobytes()


def test_a_seed_of_minus_one_is_another_one_each_time(ask, generator):
    first, second = (ask.txt2img(prompt="red", width=16, height=16) for _ in range(2))

    seed = first.info["seed"]
    assert seed >= 0
    assert seed != second.info["seed"]
    again = ask.txt2img(prompt="red", width=16, height=16, seed=seed)
    assert again.image.tobytes() == first.image.tobytes()


def test_a_variation_says_which_seed_it_went_towards(ask):
    fields = {"prompt": "red", "width": 16, "height": 16, "seed": 1, "subseed_strength": 0.5}
    first = ask.txt2img(n_iter=2, **fields)

    again = ask.txt2img(n_iter=2, subseed=first.info["subseed"], **fields)

    assert first.info["all_seeds"] == [1, 1]
    low, high = first.info["all_subseeds"]
    assert (first.info["subseed"], high) == (low, low + 1)
    assert [each.tobytes() for each in again.images] == [each.tobytes() for each in first.images]


def test_an_image_is_where_it_starts(ask, generator):
    answer = ask.img2img(
        images=[RED], prompt="blue", seed=3, denoising_strength=0.5, width=16, height=16
    )

    expected = generator(
        "blue",
        image=RED,
        seed=3,
        strength=0.5,
        sampler="euler_ancestral",
        schedule="linspace",
        num_inference_steps=4,
        guidance_scale=7.0,
        width=16,
        height=16,
    )
    assert answer.image.tobytes() == expected.image.tobytes()
    assert answer.info["denoising_strength"] == 0.5


@pytest.mark.parametrize("inverted", [0, 1])
def test_white_pixels_of_the_mask_change_and_others_are_kept(ask, inverted):
    answer = ask.img2img(
        images=[RED],
        mask_image=left_half(),
        mask_blur=0,
        inpainting_mask_invert=inverted,
        prompt="blue",
        width=16,
        height=16,
        seed=3,
    )

    pixels = np.asarray(answer.image)
    halves = [pixels[:, :8], pixels[:, 8:]]
    changed, kept = reversed(halves) if inverted else halves
    assert (kept == (255, 0, 0)).all()
    assert (changed != (255, 0, 0)).any()
    assert answer.info["extra_generation_params"]["Inpaint area"] == "Whole picture"
    assert answer.info["extra_generation_params"]["Mask blur"] == 0


@pytest.mark.parametrize(
    ("form", "blur"),
    [
        ({"mask_blur": 2}, (2, 2)),
        ({"mask_blur": 1, "mask_blur_x": 3, "mask_blur_y": 5}, (1, 1)),
        ({"mask_blur": None, "mask_blur_x": 3, "mask_blur_y": 0}, (3, 0)),
        ({"mask_blur_x": 0}, (0, 4)),
        ({}, (4, 4)),
    ],
)
def test_masks_are_blurred_as_the_form_says(client, generator, form, blur):
    body = {"prompt": "red", "seed": 4, "steps": 4, "denoising_strength": 0.5}
    images = {"init_images": [in_base64(RED)], "mask": in_base64(left_half())}

    answer = post(client, "img2img", body | images | form)

    fields = {"num_inference_steps": 4, "strength": 0.5, "image": RED, "mask_image": left_half()}
    expected = generator("red", seed=4, mask_blur=blur, **fields)
    assert decoded(answer["images"][0]).tobytes() == expected.image.tobytes()
    info = json.loads(answer["info"])
    is_one = blur[0] == blur[1]
    assert info["extra_generation_params"]["Mask blur"] == (blur[0] if is_one else None)
    assert ("Mask blur: " in info["infotexts"][0]) is is_one


@pytest.mark.parametrize(
    "form", [{"mask_blur": 65}, {"mask_blur_y": -1}, {"mask_blur_x": 1.5}, {"mask_blur": "4"}]
)
def test_a_blur_that_cannot_be_is_refused_by_its_name(client, form):
    images = {"init_images": [in_base64(RED)], "mask": in_base64(left_half())}

    answer = client.post(f"{ROOT}/img2img", json={"prompt": "red"} | images | form)

    (name,) = form
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    assert f"$.{name}" in answer.json()["detail"]


def test_masks_may_be_transparent_opaque_or_of_16_bits(ask):
    drawn = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    drawn.paste((0, 0, 0, 255), (0, 0, 8, 16))
    opaque = left_half().convert("RGBA")
    deep = Image.fromarray(np.asarray(left_half()).astype(np.uint16) * 257)
    fields = {"images": [RED], "prompt": "blue", "width": 16, "height": 16, "seed": 3}

    images = [
        ask.img2img(mask_image=each, **fields).image.tobytes()
        for each in (left_half(), drawn, opaque, deep)
    ]

    assert images == [images[0]] * 4


def test_the_second_pass_enlarges(ask, generator):
    answer = ask.txt2img(
        prompt="red",
        width=16,
        height=16,
        seed=2,
        enable_hr=True,
        hr_scale=2,
        hr_upscaler="Lanczos",
        denoising_strength=0.5,
    )

    expected = generator(
        "red",
        width=16,
        height=16,
        seed=2,
        hires_scale=2.0,
        hires_strength=0.5,
        sampler="euler_ancestral",
        schedule="linspace",
        num_inference_steps=4,
        guidance_scale=7.0,
    )
    assert answer.image.size == (32, 32)
    assert answer.image.tobytes() == expected.image.tobytes()


def test_a_refusal_says_what_cannot_be_done(ask):
    with pytest.raises(RuntimeError, match="restore_faces: this server cannot do that") as error:
        ask.txt2img(prompt="red", restore_faces=True)

    assert error.value.args[0] == 400


def test_models_are_listed_and_switched_to(ask, bundles):
    titles = [each["title"] for each in ask.get_sd_models()]

    assert [title.partition(" [")[0] for title in titles] == [
        "text-to-image",
        "class-to-image",
        "semantic-synthesis",
    ]
    assert ask.util_get_current_model() == titles[0]
    try:
        ask.util_set_model("class-to-image")
        assert ask.get_options()["sd_model_checkpoint"] == titles[1]
        refused = ask.session.post(f"{ask.baseurl}/txt2img", json={"prompt": "red"}).json()
        assert refused["error"]["param"] == "class_label"  # which this interface has no field for
    finally:
        assert ask.set_options({"sd_model_checkpoint": titles[0]}) is None
    assert ask.txt2img(prompt="red", width=16, height=16).info["sd_model_name"] == "text-to-image"


def test_all_that_the_client_asks_about_is_answered(ask):
    assert ask.get_loras() == ask.get_hypernetworks() == ask.get_face_restorers() == []
    assert ask.get_scripts() == {"txt2img": [], "img2img": []}
    assert ask.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert [each["name"] for each in ask.get_upscalers()] == ["Lanczos"]
    assert ask.get_prompt_styles() == ask.get_latent_upscale_modes() == ask.get_sd_vae() == []


# --- the rest, as any client sends it


def test_listed_samplers_and_schedules_are_those_of_the_runtime(client):
    samplers = client.get(f"{ROOT}/samplers").json()
    schedules = client.get(f"{ROOT}/schedulers").json()

    assert [known_sampler(each["name"])[0] for each in samplers] == list(SAMPLERS)
    assert all(set(each) == {"name", "aliases", "options"} for each in samplers)
    first, *others = schedules
    assert (first["name"], first["label"]) == ("automatic", "Automatic")
    for key in ("name", "label"):
        assert [known_schedule(each[key]) for each in others] == list(SCHEDULES)


def test_every_listed_sampler_can_be_sent(client):
    for each in client.get(f"{ROOT}/samplers").json():
        body = {"prompt": "red", "sampler_name": each["name"], "scheduler": "Automatic", "eta": 1.0}
        info = json.loads(post(client, "txt2img", body | {"steps": 5})["info"])
        assert info["sampler_name"] == each["name"]


@pytest.mark.parametrize("scheduler", [None, "Automatic", "automatic"])
@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        # The web UI 1.10: `samplers_k_diffusion` and `get_timesteps`.
        ("DPM++ 2M", "karras"),
        ("DPM++ 2M SDE", "exponential"),
        ("Euler", "linspace"),
        ("DDIM", "leading"),
        ("Euler Karras", "karras"),
        ("UniPC", SAMPLERS["unipc"].schedule),
    ],
)
def test_an_automatic_schedule_is_the_one_of_the_web_ui(
    client, generator, sampler, schedule, scheduler
):
    body = {"prompt": "red", "seed": 4, "steps": 5, "width": 16, "height": 16}

    answer = post(client, "txt2img", body | {"sampler_name": sampler, "scheduler": scheduler})

    name, _ = known_sampler(sampler)
    fields = {"seed": 4, "num_inference_steps": 5, "width": 16, "height": 16}
    expected = generator("red", sampler=name, schedule=schedule, **fields).image
    assert decoded(answer["images"][0]).tobytes() == expected.tobytes()


def test_without_a_sampler_the_schedule_is_the_models(client, generator):
    body = {"prompt": "red", "seed": 4, "steps": 5, "width": 16, "height": 16}

    answer = post(client, "txt2img", body | {"scheduler": "Automatic"})

    expected = generator("red", seed=4, num_inference_steps=5, width=16, height=16).image
    assert decoded(answer["images"][0]).tobytes() == expected.tobytes()


def test_the_defaults_of_every_field_are_taken(client, generator):
    small = {"prompt": "red", "seed": 4, "steps": 4, "width": 16, "height": 16}

    text = post(client, "txt2img", TEXT_DEFAULTS | small)
    image = post(client, "img2img", IMAGE_DEFAULTS | small | {"init_images": [in_base64(RED)]})
    mask = {"init_images": [in_base64(RED)], "mask": in_base64(left_half())}
    masked = post(client, "img2img", IMAGE_DEFAULTS | small | mask)

    fields = {"seed": 4, "num_inference_steps": 4, "guidance_scale": 7.0}
    fields |= {"sampler": "euler", "schedule": "linspace"}
    expected = generator("red", **fields, width=16, height=16).image
    assert decoded(text["images"][0]).tobytes() == expected.tobytes()
    expected = generator("red", **fields, image=RED, strength=0.75).image
    assert decoded(image["images"][0]).tobytes() == expected.tobytes()
    masks = {"mask_image": left_half(), "mask_blur": (4, 4)}
    expected = generator("red", **fields, image=RED, strength=0.75, **masks).image
    assert decoded(masked["images"][0]).tobytes() == expected.tobytes()
    assert masked["parameters"]["init_images"] is masked["parameters"]["mask"] is None


def test_what_is_left_out_is_the_models_own_choice(client, generator):
    answer = post(client, "txt2img", {"prompt": "red", "seed": 4})

    assert decoded(answer["images"][0]).tobytes() == generator("red", seed=4).image.tobytes()


@pytest.mark.parametrize("beginning", ["", "data:image/png;base64,", "DATA:image/jpeg;base64,"])
def test_images_come_in_base64_or_as_addresses_of_data(client, beginning):
    body = {"prompt": "red", "init_images": [beginning + in_base64(RED)], "seed": 1}

    plain = post(client, "img2img", body | {"init_images": [in_base64(RED)]})

    assert post(client, "img2img", body)["images"] == plain["images"]


def test_images_are_not_sent_if_they_are_not_wanted(client):
    answer = post(client, "txt2img", {"prompt": "red", "send_images": False, "seed": 9})

    assert answer["images"] == []
    assert json.loads(answer["info"])["all_seeds"] == [9]


def test_settings_hold_for_one_form(client, generator):
    settings = {"samples_format": "jpg", "randn_source": "NV", "CLIP_stop_at_last_layers": 1}
    body = {"prompt": "red", "seed": 4}

    jpeg = post(client, "txt2img", body | {"override_settings": settings})
    after = post(client, "txt2img", body)
    noise = post(client, "txt2img", body | {"override_settings": {"randn_source": "NV"}})

    assert decoded(jpeg["images"][0]).format == "JPEG"
    assert decoded(after["images"][0]).format == "PNG"
    expected = generator("red", seed=4, noise="torch-cuda").image
    assert decoded(noise["images"][0]).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"resize_mode": 1}, "resize_mode", "send 0, or an image of 32x32 pixels, not 16x16"),
        ({"mask": in_base64(left_half()), "inpaint_full_res": 1}, "inpaint_full_res", "send false"),
    ],
)
def test_an_image_is_fitted_by_stretching_alone(client, fields, param, message):
    body = {"prompt": "red", "init_images": [in_base64(RED)], "steps": 2}

    answer = client.post(f"{ROOT}/img2img", json=body | fields | {"width": 32, "height": 32})

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert message in answer.json()["detail"]
    post(client, "img2img", body | fields | {"width": 16, "height": 16})  # nothing is to fit


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"cfg_scale": -1}, "cfg_scale", "cfg_scale: "),
        ({"steps": 0}, "steps", "steps: "),
        ({"width": 17}, "width", "width: 17 is not a multiple of 4"),
        ({"batch_size": 4, "n_iter": 3}, "batch_size", "batch_size: 12 images is beyond"),
        ({"sampler_name": "Eular"}, "sampler_name", "sampler_name: "),
        ({"seed": -2}, "seed", "seed: "),
    ],
)
def test_errors_name_the_fields_of_this_interface(client, body, param, message):
    answer = client.post(f"{ROOT}/txt2img", json={"prompt": "red"} | body)

    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(message)
    assert answer.json()["detail"] == error["message"]


def test_png_info_of_an_image_from_elsewhere(client):
    text = (
        'a cat\nand "a dog"\nNegative prompt: blurry\n'
        'Steps: 20, Sampler: Euler a, Seed: 5, Size: 512x768, Note: "a, b: c"'
    )
    file = io.BytesIO()
    chunks = PngInfo()
    chunks.add_text("parameters", text)
    RED.save(file, format="PNG", pnginfo=chunks)

    found = post(client, "png-info", {"image": base64.b64encode(file.getvalue()).decode()})

    assert found["info"] == text
    assert found["parameters"] == {
        "Prompt": 'a cat\nand "a dog"',
        "Negative prompt": "blurry",
        "Steps": "20",
        "Sampler": "Euler a",
        "Seed": "5",
        "Size-1": "512",
        "Size-2": "768",
        "Note": "a, b: c",
    }
    assert post(client, "png-info", {"image": in_base64(RED)}) == {
        "info": "",
        "items": {},
        "parameters": {},
    }


# --- progress and interrupt


def when(client, condition, seconds=30):
    """Return the progress once it meets a condition."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = client.get(f"{ROOT}/progress").json()
        if condition(state):
            return state
        time.sleep(0.005)
    raise TimeoutError(state)


@pytest.fixture
def running(server):
    """A slow request in a thread, which the test ends; its answer comes from `result()`."""

    def send():
        with server.client(timeout=60) as client:
            return client.post(f"{ROOT}/txt2img", json=SLOW)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(send)
        yield future
        with server.client() as client:
            while not future.done():
                client.post(f"{ROOT}/interrupt")
                time.sleep(0.01)


def test_progress_of_nothing(client):
    state = client.get(f"{ROOT}/progress").json()

    assert (state["progress"], state["eta_relative"], state["current_image"]) == (0.0, 0.0, None)
    assert (state["state"]["job_count"], state["state"]["sampling_steps"]) == (0, 0)


def test_progress_and_interrupt(client, running):
    state = when(client, lambda state: state["state"]["sampling_step"] >= 2)
    later = when(client, lambda later: later["progress"] > state["progress"])
    bare = client.get(f"{ROOT}/progress", params={"skip_current_image": "true"}).json()

    assert 0 < state["progress"] < later["progress"] < 1
    assert later["eta_relative"] > 0
    assert later["state"]["sampling_steps"] == 200
    assert later["state"]["job_count"] == 1
    assert decoded(later["current_image"]).size == (128, 128)
    assert bare["current_image"] is None
    assert bare["progress"] >= later["progress"]

    began = time.monotonic()
    assert client.post(f"{ROOT}/interrupt").json() == {}
    answer = running.result(10)
    post(client, "txt2img", {"prompt": "red", "seed": 1})  # the worker is free again

    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "cancelled")
    assert time.monotonic() - began < 2
    after = client.get(f"{ROOT}/progress").json()
    assert after["state"]["job_count"] == 0
    assert 'outcome="cancelled"' in client.get("/metrics").text


def test_an_interrupt_leaves_other_interfaces_alone(client, running):
    job = client.post("/api/jobs", json={"request": {"prompt": "red", "num_inference_steps": 30}})
    when(client, lambda state: state["state"]["sampling_step"] >= 1)

    client.post(f"{ROOT}/interrupt")

    assert running.result(10).status_code == 409
    path = f"/api/jobs/{job.json()['id']}"
    end = time.monotonic() + 20
    while client.get(path).json()["state"] == "generating" and time.monotonic() < end:
        time.sleep(0.02)
    assert client.get(path).json()["state"] == "completed"


def test_keys_have_settings_and_jobs_of_their_own(bundles):
    executor = FakeExecutor()
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in ("a" * 32, "b" * 32))

    async def scenario(client, _):
        async def shown(key):
            state = await client.get(f"{ROOT}/progress", headers=key)
            options = await client.get(f"{ROOT}/options", headers=key)
            return state.json()["state"]["job_count"], options.json()["samples_format"]

        async def send(key):
            body = {"prompt": "red"}
            task = asyncio.create_task(client.post(f"{ROOT}/txt2img", json=body, headers=key))
            while not task.done() and (await shown(key))[0] == 0:
                await asyncio.sleep(0.001)
            return task

        await client.post(f"{ROOT}/options", json={"samples_format": "webp"}, headers=alice)
        runs, waits = await send(alice), await send(bob)
        before = [await shown(alice), await shown(bob)]
        await client.post(f"{ROOT}/interrupt", headers=bob)  # it waits, and nothing of bob's runs
        answer = await waits
        formats = [work.format for work in executor.works.values()]
        for job in list(executor.works):
            executor.finish(job)
        return before, answer.status_code, formats, (await runs).status_code

    settings = ServeSettings(
        bundles={"tiny": bundles / "text-to-image"},
        access=Access(keys={"alice": "a" * 32, "bob": "b" * 32}),
        drain_seconds=0.01,
    )
    found = calling(settings, executor, scenario)

    assert found == ([(1, "webp"), (1, "png")], 409, ["webp"], 200)
    assert executor.cancelled == []


def test_an_interrupt_of_nothing_changes_nothing(client):
    assert client.post(f"{ROOT}/interrupt").json() == {}
    assert post(client, "txt2img", {"prompt": "red"})["images"]


def test_a_client_that_goes_away_ends_its_request(server, client):
    def give_up():
        with server.client(timeout=0.3) as impatient, pytest.raises(Exception, match="timed out"):
            impatient.post(f"{ROOT}/txt2img", json=SLOW)

    thread = threading.Thread(target=give_up)
    thread.start()
    thread.join()

    state = when(client, lambda state: state["state"]["job_count"] == 0, seconds=10)
    assert state["progress"] == 0.0
