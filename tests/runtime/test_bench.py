"""`ldm bench`, which needs a bundle and nothing that the runtime does not have."""

import json
import re

import pytest

from ldm_runtime.benchmark.runs import Configuration, runnable_configurations
from ldm_runtime.benchmark.subject import open_subject
from ldm_runtime.cli.commands import main
from ldm_runtime.errors import BackendError, RequestError
from ldm_runtime.requests.resolved import PromptCondition
from ldm_runtime.testing import write_tiny_bundle
from tests.runtime.task_cases import NEEDED


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """A tiny bundle of every task."""
    folder = tmp_path_factory.mktemp("bundles")
    for task in NEEDED:
        write_tiny_bundle(folder / task, task)
    return folder


def test_a_bundle_of_any_task_has_a_request_to_measure(bundles):
    for task in NEEDED:
        subject = open_subject(bundles / task)

        assert subject.request.task == task
        assert subject.work["vae_decoder"].flops > 0
        assert subject.rows == (3 if task == "image-editing" else 1 + subject.request.is_guided)


def test_flags_change_the_request_that_is_measured(bundles):
    request = open_subject(
        bundles / "text-to-image", {"num_inference_steps": 3, "height": None, "num_images": 2}
    ).request

    assert isinstance(request.condition, PromptCondition)
    assert (request.num_inference_steps, request.num_images, request.height) == (3, 2, 16)


def test_what_a_task_makes_nothing_of_cannot_be_measured(bundles):
    with pytest.raises(RequestError, match="means nothing"):
        open_subject(bundles / "autoencoder", {"num_inference_steps": 3})


def test_a_bundle_is_measured_without_a_repository(bundles, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    status = main(["bench", str(bundles / "class-to-image"), "--repetitions", "1", "-q"])

    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert lines[1].startswith("ceilings  matmul ")
    assert any("import + load + first image" in line for line in lines)
    assert any(re.match(r"  \d.* = .*unet .* \+ sampler, tokenizer and Python", x) for x in lines)
    assert lines[-1].startswith("measured in ")
    assert not any(line.startswith("{") for line in lines)


def test_a_bundle_that_is_not_there_is_one_sentence(tmp_path, capsys):
    assert main(["bench", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bundle_with_another_hash_is_not_measured(bundles, capsys):
    assert main(["bench", str(bundles / "text-to-image"), "--sha256", "0" * 64]) == 1
    assert "sha256" in capsys.readouterr().err


def test_every_backend_is_measured_in_every_precision_that_it_has(bundles):
    subject = open_subject(bundles / "text-to-image")

    able, reasons = runnable_configurations(
        ["onnxruntime"], subject, precisions=["fp32", "bf16", "fp32"], threads=2
    )

    assert able == [Configuration(backend="onnxruntime", precision="fp32", threads=2)]
    assert reasons == ["onnxruntime: onnxruntime computes in fp32 or int8, not in bf16"]


def test_a_backend_without_any_of_the_precisions_is_an_error(bundles):
    subject = open_subject(bundles / "text-to-image")

    with pytest.raises(BackendError, match="onnxruntime computes in fp32 or int8, not in bf16"):
        runnable_configurations(["onnxruntime"], subject, precisions=["bf16"])


def test_the_precision_and_the_threads_are_settings_of_a_row(bundles, capsys):
    flags = "--precision fp32 --threads 1 --backend onnxruntime --repetitions 1 --json --quiet"

    assert main(["bench", str(bundles / "text-to-image"), *flags.split()]) == 0

    rows = json.loads(capsys.readouterr().out)["rows"]
    settings = [each["settings"] for each in rows]
    assert {(each["precision"], each["threads"]) for each in settings} == {("fp32", 1)}
