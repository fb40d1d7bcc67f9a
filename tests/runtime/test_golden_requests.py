"""Requests as folders: everything comes back, and nothing is read that the folder does not hold."""

import json
from typing import get_args

import numpy as np
import pytest

from ldm_runtime.diagnostics.golden_requests import load_golden_request, save_golden_request
from ldm_runtime.errors import BundleError
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.specs.model import Task
from ldm_runtime.testing import tiny_requests, tiny_spec

PICTURE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


@pytest.mark.parametrize("task", get_args(Task))
def test_a_request_of_every_task_comes_back_as_it_was(tmp_path, task):
    for index, request in enumerate(tiny_requests(task)):
        for number, each in enumerate((request, resolve(request, tiny_spec(task)).as_request())):
            folder = tmp_path / f"{index}-{number}"
            save_golden_request(folder, each)
            assert load_golden_request(folder) == each


def test_pictures_are_files_beside_the_json(tmp_path):
    save_golden_request(tmp_path, GenerationRequest(image=PICTURE, mask_image=PICTURE))

    fields = json.loads((tmp_path / "request.json").read_text())

    assert fields["image"] == "image.png"
    assert {path.name for path in tmp_path.iterdir()} == {
        "request.json",
        "image.png",
        "mask_image.png",
    }


@pytest.mark.parametrize("named", ["../image.png", "/etc/hostname", "other.png", 7, {"sha256": ""}])
def test_a_request_that_names_another_file_is_refused(tmp_path, named):
    save_golden_request(tmp_path, GenerationRequest(image=PICTURE))
    fields = json.loads((tmp_path / "request.json").read_text()) | {"image": named}
    (tmp_path / "request.json").write_text(json.dumps(fields))

    with pytest.raises(BundleError, match=r"request\.json is malformed: it names"):
        load_golden_request(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"prompt": 5}', '{"unknown": 1}', '{"image": "image.png"}']
)
def test_a_malformed_request_is_one_sentence(tmp_path, text):
    (tmp_path / "request.json").write_text(text)

    with pytest.raises(BundleError, match=r"request\.json is malformed: .*export the bundle again"):
        load_golden_request(tmp_path)


def test_a_missing_request_is_one_sentence(tmp_path):
    with pytest.raises(BundleError, match=r"request\.json is malformed: .*No such file"):
        load_golden_request(tmp_path)
