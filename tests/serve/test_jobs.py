"""The native interface, through a real socket and a real worker."""

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import numpy as np
import pytest
from PIL import Image

from ldm_runtime import Generator

SLOW = {"prompt": "red", "width": 256, "height": 256, "num_inference_steps": 200, "seed": 1}


@pytest.fixture(scope="module")
def generator(bundle):
    with Generator(bundle, threads=1) as generator:
        yield generator


def submit(client, request, **options):
    answer = client.post("/api/jobs", json={"request": request, **options})
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/api/jobs/{answer.json()['id']}"
    return answer.json()


def finished(client, job, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = client.get(f"/api/jobs/{job['id']}").json()
        if state["state"] not in ("queued", "generating"):
            return state
        time.sleep(0.01)
    raise TimeoutError(state)


def image_of(client, state, index=0):
    answer = client.get(state["images"][index]["url"])
    assert answer.headers["content-type"].startswith("image/")
    return Image.open(io.BytesIO(answer.content))


def events_of(client, job):
    found = []
    with client.stream("GET", f"/api/jobs/{job['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("event: "):
                found.append((line.removeprefix("event: "), None))
            elif line.startswith("data: "):
                found[-1] = (found[-1][0], json.loads(line.removeprefix("data: ")))
    return found


def test_a_job_ends_with_the_images_of_the_generator(client, generator):
    request = {"prompt": "red", "seed": 5, "num_images": 2, "sampler": "heun"}

    state = finished(client, submit(client, request))

    assert (state["state"], state["progress"], state["seed"]) == ("completed", 1.0, 5)
    assert [each["seed"] for each in state["images"]] == [5, 6]
    for index, expected in enumerate(generator(**request)):
        assert image_of(client, state, index).tobytes() == expected.tobytes()


def test_metadata_generates_the_image_again(client, generator):
    state = finished(client, submit(client, {"prompt": "red"}))

    again = generator(**state["images"][0]["metadata"]["request"])

    assert image_of(client, state).tobytes() == again.image.tobytes()


def test_requests_in_company_are_to_the_last_bit_as_alone(client, generator):
    requests = [
        {
            "prompt": prompt,
            "seed": seed,
            "num_inference_steps": 3 + seed % 4,
            "sampler": ("ddim", "euler", "dpmpp_2m", "heun")[seed % 4],
            "guidance_scale": (1.0, 3.0, 7.5)[seed % 3],
            "height": (16, 24)[seed % 2],
        }
        for seed, prompt in enumerate(["red", "blue"] * 8)
    ]

    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda each: submit(client, each), requests))
        states = list(pool.map(lambda each: finished(client, each), jobs))

    for request, state in zip(requests, states, strict=True):
        assert image_of(client, state).tobytes() == generator(**request).image.tobytes()


def test_events_tell_of_every_state_and_show_the_image_so_far(client):
    job = submit(client, {**SLOW, "num_inference_steps": 30}, previews=True)

    events = events_of(client, job)

    names = [name for name, _ in events]
    assert names[-1] == "completed"
    assert set(names[:-1]) <= {"queued", "generating"}
    progress = [state["progress"] for _, state in events]
    assert progress == sorted(progress)
    previews = [state["preview"] for _, state in events if "preview" in state]
    assert previews
    data = base64.b64decode(previews[0].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).size == (128, 128)


def test_events_of_a_job_that_is_over_are_its_end(client):
    job = submit(client, {"prompt": "red"})
    finished(client, job)

    assert [name for name, _ in events_of(client, job)] == ["completed"]


def test_a_job_can_be_cancelled_within_a_step(client):
    job = submit(client, SLOW, previews=True)
    while client.get(f"/api/jobs/{job['id']}").json()["state"] == "queued":
        time.sleep(0.005)

    state = client.post(f"/api/jobs/{job['id']}/cancel").json()
    begun = time.monotonic()
    finished(client, submit(client, {"prompt": "red", "seed": 1}))

    assert (state["state"], state["error"]["code"]) == ("cancelled", "cancelled")
    assert time.monotonic() - begun < 2
    assert client.post(f"/api/jobs/{job['id']}/cancel").status_code == 200


def test_a_job_that_is_over_cannot_be_cancelled(client):
    job = submit(client, {"prompt": "red"})
    finished(client, job)

    answer = client.post(f"/api/jobs/{job['id']}/cancel")

    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_over")


def test_a_deadline_ends_a_job(client):
    state = finished(client, submit(client, {**SLOW, "num_images": 4}, deadline_seconds=0.05))

    assert (state["state"], state["error"]["code"]) == ("failed", "deadline_exceeded")


def test_waiting_jobs_know_their_places(client):
    jobs = [submit(client, {**SLOW, "num_images": 4}) for _ in range(4)]

    places = [client.get(f"/api/jobs/{job['id']}").json()["queue_position"] for job in jobs]
    listed = client.get("/api/jobs").json()["jobs"]
    for job in reversed(jobs):
        client.post(f"/api/jobs/{job['id']}/cancel")

    assert places == [None, 0, 1, 2]
    assert [each["id"] for each in listed] == [job["id"] for job in jobs]


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_formats(client, image_format):
    job = submit(client, {"prompt": "red"}, output_format=image_format)

    assert image_of(client, finished(client, job)).format == image_format.upper()


def test_the_compression_that_asks_a_png_for_nothing_is_taken(client, generator):
    job = submit(client, {"prompt": "red", "seed": 2}, output_compression=100)

    image = image_of(client, finished(client, job))

    assert image.format == "PNG"
    assert image.tobytes() == generator("red", seed=2).image.tobytes()


def test_another_model_is_named(client, bundles):
    job = submit(client, {"class_label": 2, "seed": 3}, model="class-to-image")
    state = finished(client, job)

    with Generator(bundles / "class-to-image", threads=1) as generator:
        expected = generator(class_label=2, seed=3).image
    assert image_of(client, state).tobytes() == expected.tobytes()


def test_maps_come_as_data(client, bundles):
    labels = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32) % 6
    file = io.BytesIO()
    Image.fromarray(labels).save(file, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

    state = finished(
        client, submit(client, {"segmentation": url, "seed": 1}, model="semantic-synthesis")
    )

    with Generator(bundles / "semantic-synthesis", threads=1) as generator:
        expected = generator(segmentation=labels, seed=1).image
    assert image_of(client, state).tobytes() == expected.tobytes()


def test_models_say_what_they_need(client):
    first, second, third = client.get("/api/models").json()["models"]

    assert (first["name"], first["needs"]) == ("text-to-image", [["prompt"]])
    assert (second["needs"], second["classes"]) == ([["class_label"]], 4)
    assert third["needs"] == [["segmentation"]]
    assert first["previews"]
    assert first["size_step"] == 4
    assert first["fields"]["prompt"] == "what to generate, in words"


def test_capabilities_have_the_limits_and_the_schema(client):
    found = client.get("/api/capabilities").json()

    assert found["limits"]["max_steps"] == 200
    assert found["engine"] == {"backend": "onnxruntime", "precision": "fp32"}
    jsonschema.validate({"prompt": "red", "seed": 3}, found["request_schema"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"prompd": "red"}, found["request_schema"])


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"request": {"prompd": "red"}}, "prompd", "invalid_value"),
        ({"request": {"prompt": "red", "seed": "1"}}, "seed", "invalid_value"),
        ({"request": {"prompt": "red"}, "previews": 1}, "previews", "invalid_value"),
        ({"request": {"prompt": "red"}, "model": "none"}, "model", "model_not_found"),
        ({"request": {"prompt": "red"}, "output_format": "gif"}, "output_format", "invalid_value"),
        ({"request": {"prompt": "red"}, "color": 1}, "color", "unknown_parameter"),
        (
            {"request": {"prompt": "red"}, "output_compression": 50},
            "output_compression",
            "invalid_value",
        ),
        (
            {"request": {"prompt": "red"}, "deadline_seconds": 0},
            "deadline_seconds",
            "invalid_value",
        ),
        ({}, "request", "missing_required_parameter"),
        ({"request": {}}, "prompt", "invalid_value"),
    ],
)
def test_what_is_wrong_names_the_field(client, body, param, code):
    answer = client.post("/api/jobs", json=body)

    assert answer.status_code == (404 if code == "model_not_found" else 400)
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)


@pytest.mark.parametrize("path", ["", "/events"])
def test_unknown_jobs_are_not_found(client, path):
    answer = client.get(f"/api/jobs/none{path}")

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")
    assert client.get("/files/none/0").status_code == 404
