"""The server as the client of OpenAI sees it, through a real socket."""

import base64
import io
import resource
import time

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from ldm_runtime import Generator


@pytest.fixture(scope="module")
def generator(bundle):
    with Generator(bundle, threads=1) as generator:
        yield generator


def decoded(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def png(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def test_images_are_those_of_the_generator_bit_for_bit(ask, generator):
    expected = generator("a red circle", seed=7, num_images=2, height=24, width=16)

    answer = ask.images.generate(
        prompt="a red circle", n=2, size="16x24", extra_body={"seed": 7}, model="text-to-image"
    )

    assert answer.size == "16x24"
    assert answer.output_format == "png"
    for ours, image in zip(answer.data, expected, strict=True):
        assert decoded(ours.b64_json).tobytes() == image.tobytes()
    assert answer.model_extra["ldm"]["seed"] == 7
    assert answer._request_id.startswith("req_")


def test_extensions_reach_the_generator(ask, generator):
    fields = {
        "seed": 3,
        "negative_prompt": "blue",
        "num_inference_steps": 4,
        "guidance_scale": 5.5,
        "sampler": "euler",
    }

    answer = ask.images.generate(prompt="red", extra_body=fields)

    assert decoded(answer.data[0].b64_json).tobytes() == generator("red", **fields).image.tobytes()


def test_a_request_without_a_seed_says_which_it_got(ask, generator):
    first, second = (ask.images.generate(prompt="red").model_extra["ldm"] for _ in range(2))

    again = ask.images.generate(prompt="red", extra_body={"seed": first["seed"]})

    assert first["seed"] != second["seed"]
    expected = generator("red", seed=first["seed"]).image
    assert decoded(again.data[0].b64_json).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_formats(ask, name):
    answer = ask.images.generate(prompt="red", output_format=name)

    assert decoded(answer.data[0].b64_json).format == name.upper()
    assert answer.output_format == name


def test_compression_makes_smaller_files(ask):
    sizes = [
        len(
            ask.images.generate(
                prompt="red",
                size="64x64",
                output_format="jpeg",
                output_compression=quality,
                extra_body={"seed": 1},
            )
            .data[0]
            .b64_json
        )
        for quality in (5, 95)
    ]

    assert sizes[0] < sizes[1]


def test_an_image_can_be_fetched_by_its_address(ask, client):
    answer = ask.images.generate(prompt="red", response_format="url", extra_body={"seed": 2})

    found = client.get(answer.data[0].url)

    assert found.headers["content-type"] == "image/png"
    inline = ask.images.generate(prompt="red", extra_body={"seed": 2})
    image = Image.open(io.BytesIO(found.content))
    assert image.tobytes() == decoded(inline.data[0].b64_json).tobytes()


def test_a_file_is_the_image_itself(client):
    body = {"prompt": "red", "response_format": "file", "output_format": "webp"}

    answer = client.post("/v1/images/generations", json=body)

    assert answer.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(answer.content)).format == "WEBP"


@pytest.mark.parametrize("partial_images", [0, 1, 3])
def test_a_stream_has_partial_images_and_then_the_image(ask, partial_images):
    *partial, last = ask.images.generate(
        prompt="red",
        stream=True,
        partial_images=partial_images,
        size="32x32",
        extra_body={"seed": 5, "num_inference_steps": 20},
    )

    assert [event.type for event in partial] == ["image_generation.partial_image"] * len(partial)
    # A server that is faster than its client skips some.
    assert len(partial) <= partial_images
    assert [event.partial_image_index for event in partial] == list(range(len(partial)))
    assert {decoded(event.b64_json).size for event in partial} <= {(32, 32)}
    assert last.type == "image_generation.completed"
    assert last.usage.total_tokens == 0
    whole = ask.images.generate(
        prompt="red", size="32x32", extra_body={"seed": 5, "num_inference_steps": 20}
    )
    assert decoded(last.b64_json).tobytes() == decoded(whole.data[0].b64_json).tobytes()


def test_an_edit_starts_from_the_image(ask, generator):
    image = Image.new("RGB", (16, 16), (255, 0, 0))

    answer = ask.images.edit(
        image=("a.png", png(image)), prompt="blue", extra_body={"seed": 3, "strength": 0.5}
    )

    expected = generator("blue", image=image, seed=3, strength=0.5).image
    assert decoded(answer.data[0].b64_json).tobytes() == expected.tobytes()


def test_uploads_are_never_on_the_disk(ask, server, generator):
    """With no room for a byte, an upload of some megabytes is answered as ever."""
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    unlimited = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, -1))
    try:
        answer = ask.images.edit(
            image=("a.png", png(image)), prompt="blue", size="16x16", extra_body={"seed": 3}
        )
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, unlimited)

    assert len(png(image)) > 2e6
    expected = generator("blue", image=image, seed=3, width=16, height=16).image
    assert decoded(answer.data[0].b64_json).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("application/json", "must be multipart/form-data, not application/json"),
        ("multipart/form-data", "Missing boundary"),
        ("multipart/form-data; boundary=x", "cannot be read"),
    ],
)
def test_an_edit_that_is_no_form_says_so(client, kind, message):
    answer = client.post("/v1/images/edits", content=b"{}", headers={"content-type": kind})

    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["prompt", "mask"])
def test_a_field_of_a_form_that_is_there_twice_is_refused(client, name):
    file = ("a.png", png(Image.new("RGBA", (16, 16))), "image/png")
    parts = {
        "prompt": [("prompt", (None, text)) for text in ("red", "blue")],
        "mask": [("prompt", (None, "red")), ("mask", file), ("mask", file)],
    }[name]

    answer = client.post("/v1/images/edits", files=[("image", file), *parts])

    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, name)
    assert "more than once" in error["message"]


def test_transparent_pixels_of_the_mask_change_and_others_are_kept(ask):
    image = Image.new("RGB", (16, 16), (255, 0, 0))
    mask = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 8, 16))

    answer = ask.images.edit(
        image=[("a.png", png(image))], mask=("m.png", png(mask)), prompt="blue", size="16x16"
    )

    pixels = np.asarray(decoded(answer.data[0].b64_json))
    assert (pixels[:, 8:] == (255, 0, 0)).all()
    assert (pixels[:, :8] != (255, 0, 0)).any()


@pytest.mark.parametrize(
    ("files", "param", "message"),
    [
        ({"mask": ("m.png", png(Image.new("RGB", (16, 16))))}, "mask", "no alpha channel"),
        ({"mask": ("m.png", b"no image")}, "mask", "not a PNG or WebP"),
        ({"image": [("a.png", b"1"), ("b.png", b"2")]}, "image", "send one image file"),
        ({"image": ("a.png", b"no image")}, "image", "not a readable image"),
    ],
)
def test_edits_that_are_wrong_say_why(ask, files, param, message):
    image = {"image": ("a.png", png(Image.new("RGB", (16, 16))))}

    with pytest.raises(openai.BadRequestError, match=message) as error:
        ask.images.edit(prompt="blue", **{**image, **files})

    assert error.value.param == param


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"size": "17x16"}, "size", "17 is not a multiple of 4"),
        ({"size": "large"}, "size", "must be WIDTHxHEIGHT or auto, got 'large'"),
        ({"size": "4096x4096"}, "size", "beyond this server's limit"),
        ({"quality": "high"}, "quality", "leave it out or send auto or standard"),
        ({"background": "transparent"}, "background", "cannot do that"),
        ({"style": "vivid"}, "style", "leave it out"),
        ({"extra_body": {"svg": {"model": "x"}}}, "svg", "leave it out"),
        ({"extra_body": {"frame_count": 4}}, "frame_count", "leave it out"),
        ({"extra_body": {"adapters": ["a"]}}, "adapters[0]", "Expected `object"),
        ({"extra_body": {"adapters": [{"name": "a"}]}}, "adapters", "there is no adapter 'a'"),
        ({"output_format": "gif"}, "output_format", "Invalid enum value 'gif'"),
        ({"output_compression": 50}, "output_compression", "PNG keeps every pixel"),
        ({"n": 11}, "n", "<= 10"),
        ({"n": 0}, "n", ">= 1"),
        ({"partial_images": 4, "stream": True}, "partial_images", "<= 3"),
        ({"response_format": "file", "n": 2}, "response_format", "one image"),
        ({"response_format": "url", "stream": True}, "response_format", "has the images in it"),
        ({"partial_images": 1}, "partial_images", "parts of a stream"),
        ({"partial_images": 1, "stream": False}, "partial_images", "parts of a stream"),
        ({"extra_body": {"seed": -1}}, "seed", "seed"),
        ({"extra_body": {"seed": "7"}}, "seed", "Expected `int"),
        ({"extra_body": {"sampler": "eular"}}, "sampler", "euler"),
        ({"extra_body": {"num_inference_steps": 1000}}, "num_inference_steps", "limit of 200"),
        ({"extra_body": {"prompd": "x"}}, "prompd", "unknown field"),
        ({"prompt": "x" * 32_001}, "prompt", "32001 characters"),
    ],
)
def test_what_cannot_be_honoured_is_an_error_that_names_the_field(ask, fields, param, message):
    with pytest.raises(openai.BadRequestError) as error:
        ask.images.generate(**{"prompt": "red", **fields})

    assert message in str(error.value)
    assert (error.value.param, error.value.type) == (param, "invalid_request_error")


def test_the_default_of_every_field_is_taken(ask, generator):
    """As OpenAI's documentation has them; its client sends those that the caller gives."""
    defaults = {
        "n": 1,
        "size": "auto",
        "quality": "auto",
        "background": "auto",
        "moderation": "auto",
        "output_format": "png",
        "output_compression": 100,
        "partial_images": 0,
        "response_format": "b64_json",
    }

    answer = ask.images.generate(
        prompt="red", **defaults, stream=False, extra_body={"seed": 3, "style": None}
    )
    (event,) = ask.images.generate(prompt="red", **defaults, stream=True, extra_body={"seed": 3})

    expected = generator("red", seed=3).image.tobytes()
    assert decoded(answer.data[0].b64_json).tobytes() == expected
    assert decoded(event.b64_json).tobytes() == expected


def test_models_are_listed_and_named(ask):
    names = [model.id for model in ask.models.list()]

    assert names == ["text-to-image", "class-to-image", "semantic-synthesis"]
    assert ask.models.retrieve("class-to-image").owned_by == "ldm-deploy"
    with pytest.raises(openai.NotFoundError, match="did you mean text-to-image"):
        ask.images.generate(prompt="red", model="text-to-imag")


def test_variations_are_gone(ask):
    with (
        pytest.warns(DeprecationWarning, match="deprecated"),
        pytest.raises(openai.APIStatusError, match="no longer exist") as error,
    ):
        ask.images.create_variation(image=("a.png", b"x"))

    assert error.value.status_code == 410


def test_a_client_that_waits_for_less_gets_a_deadline(ask):
    slow = {"seed": 1, "num_inference_steps": 200}

    with pytest.raises(openai.InternalServerError, match=r"0.05 s are over") as error:
        ask.with_options(timeout=httpx2.Timeout(30, read=30)).images.generate(
            prompt="red",
            n=4,
            size="256x256",
            extra_body=slow,
            extra_headers={"x-stainless-read-timeout": "0.05"},
        )

    assert error.value.status_code == 504
    assert error.value.response.headers["x-should-retry"] == "false"


def test_a_stream_with_partial_images_has_no_deadline(ask):
    """Its client waits that long for the next event, and not for the last."""
    long = {
        "prompt": "red",
        "size": "256x256",
        "stream": True,
        "extra_body": {"seed": 1, "num_inference_steps": 200},
        "extra_headers": {"x-stainless-read-timeout": "0.05"},
    }

    *_, last = ask.images.generate(**long, partial_images=1)

    assert last.type == "image_generation.completed"
    with pytest.raises(openai.APIError, match=r"0.05 s are over"):
        list(ask.images.generate(**long))


def test_a_client_that_leaves_a_stream_ends_its_request(ask, client):
    events = ask.images.generate(
        prompt="red",
        size="256x256",
        stream=True,
        partial_images=3,
        extra_body={"seed": 1, "num_inference_steps": 200},
    )
    assert len(client.get("/api/jobs").json()["jobs"]) == 1

    next(iter(events))
    events.close()

    end = time.monotonic() + 10
    while client.get("/api/jobs").json()["jobs"] and time.monotonic() < end:
        time.sleep(0.02)
    assert client.get("/api/jobs").json() == {"jobs": []}


def test_a_client_that_goes_away_leaves_the_workers_free(server, client):
    slow = {"prompt": "red", "n": 4, "size": "256x256", "seed": 1, "num_inference_steps": 200}

    with server.client(timeout=0.3) as hasty, pytest.raises(httpx2.ReadTimeout):
        hasty.post("/v1/images/generations", json=slow)

    end = time.monotonic() + 10
    while client.get("/api/jobs").json()["jobs"] and time.monotonic() < end:
        time.sleep(0.05)
    assert client.get("/api/jobs").json() == {"jobs": []}
    assert 'outcome="cancelled"' in client.get("/metrics").text
