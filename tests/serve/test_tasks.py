"""Every task through the native interface: one server of all the tiny bundles."""

import base64
import io
import time

import numpy as np
import pytest
from PIL import Image

from ldm_runtime import Generator
from ldm_runtime.testing import write_tiny_bundle
from tests.runtime.task_cases import NEEDED
from tests.serve.conftest import serving


@pytest.fixture(scope="module")
def task_bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for task in NEEDED:
        write_tiny_bundle(folder / task, task)
    return folder


@pytest.fixture(scope="module")
def task_server(task_bundles, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("s"), *(task_bundles / task for task in NEEDED)) as server:
        yield server


def as_data(value):
    """Return an array as a client sends it: an image as a PNG, vectors as a .npy file."""
    if not isinstance(value, np.ndarray):
        return value
    file = io.BytesIO()
    if value.dtype == np.uint8:
        Image.fromarray(value).save(file, format="PNG")
        kind = "image/png"
    else:
        np.save(file, value)
        kind = "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.mark.parametrize("task", NEEDED)
def test_a_job_of_every_task_ends_with_the_image_of_the_generator(task, task_bundles, task_server):
    request = {**NEEDED[task], "seed": 3}
    sent = {name: as_data(value) for name, value in request.items()}

    with task_server.client(timeout=60) as client:
        answer = client.post("/api/jobs", json={"model": task, "request": sent})
        assert answer.status_code == 202, answer.text
        path, end = answer.headers["location"], time.monotonic() + 30
        while (state := client.get(path).json())["state"] in ("queued", "generating"):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert state["state"] == "completed", state
        image = Image.open(io.BytesIO(client.get(state["images"][0]["url"]).content))

    with Generator(task_bundles / task, threads=1) as generator:
        assert image.tobytes() == generator(**request).image.tobytes()
