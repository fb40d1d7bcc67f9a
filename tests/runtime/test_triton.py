"""A bundle in Triton's model repository: its files, its configuration, and the model that runs."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ldm_runtime import Generator
from ldm_runtime.cli.commands import main
from ldm_runtime.durable import lock_folder
from tests.runtime import fake_triton
from tests.runtime.triton_configs import config_of, graph_signature, model_config_proto, tensors


def exported(bundle, folder, *flags):
    assert main(["triton", str(bundle), "--out", str(folder), *flags]) == 0
    return folder


def opened(model, monkeypatch, kind="CPU", device="0"):
    """Load a model as the stub of Triton's Python backend does."""
    json_format = pytest.importorskip("google.protobuf.json_format", reason="needs protobuf")
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton)
    spec = importlib.util.spec_from_file_location("model", model / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loaded = module.TritonPythonModel()
    config = json_format.MessageToDict(config_of(model), preserving_proto_field_name=True)
    loaded.initialize(
        {
            "model_config": json.dumps(config),
            "model_instance_kind": kind,
            "model_instance_device_id": device,
            "model_repository": str(model),
            "model_version": "1",
            "model_name": model.name,
        }
    )
    return loaded


@pytest.fixture
def model(tiny_bundle, tmp_path, monkeypatch):
    flags = ("--kind", "cpu", "--name", "tiny", "--threads", "1", "--backend", "onnxruntime")
    folder = exported(tiny_bundle, tmp_path / "repository", *flags)
    loaded = opened(folder / "tiny", monkeypatch)
    yield loaded
    loaded.finalize()


def outputs(response):
    assert not response.has_error(), response.error().message()
    return {each.name(): each.as_numpy() for each in response.output_tensors()}


def error(response):
    return response.error().message(), response.error().code()


def test_the_model_has_the_inputs_of_its_task(bundle_of, tmp_path):
    flags = ("--kind", "cpu", "--instances", "2", "--max-batch", "8")
    for task in ("text-to-image", "class-to-image"):
        exported(bundle_of(task), tmp_path / "repository", "--name", task, *flags)
    text = config_of(tmp_path / "repository/text-to-image")
    labels = config_of(tmp_path / "repository/class-to-image")

    assert (text.name, text.backend, text.max_batch_size) == ("text-to-image", "python", 8)
    assert text.HasField("dynamic_batching")
    (group,) = text.instance_group
    assert (group.kind, group.count) == (model_config_proto().ModelInstanceGroup.KIND_CPU, 2)
    assert tensors(text.input) == {
        "prompt": ("TYPE_STRING", [1]),
        "negative_prompt": ("TYPE_STRING", [1]),
        "seed": ("TYPE_UINT64", [1]),
        "num_inference_steps": ("TYPE_INT32", [1]),
        "guidance_scale": ("TYPE_FP64", [1]),
        "request": ("TYPE_STRING", [1]),
    }
    assert [each.name for each in text.input if not each.optional] == ["prompt"]
    assert tensors(text.output) == {
        "image": ("TYPE_UINT8", [-1, -1, 3]),
        "image_seed": ("TYPE_UINT64", [1]),
    }
    names = set(tensors(labels.input))
    assert names >= {"class_label", "seed"}
    assert "prompt" not in names


def test_networks_are_those_that_onnx_runtime_opens(bundle_of, tmp_path):
    """As Triton compares them: a size of the graph that is open takes any."""
    seen = set()
    for task in ("text-to-image", "class-to-image", "semantic-synthesis"):
        exported(bundle_of(task), tmp_path, "--name", task, "--networks")
        for model in sorted(tmp_path.glob(f"{task}_*")):
            for (dtype, dims), (found, shape) in graph_signature(model):
                assert dtype == found
                assert len(dims) == len(shape)
                pairs = zip(dims, shape, strict=True)
                assert all(size == -1 or size == dim for dim, size in pairs), model
            config = config_of(model)
            assert (config.name, config.backend) == (model.name, "onnxruntime")
            assert config.max_batch_size == 0
            seen.add(model.name.removeprefix(f"{task}_"))
    assert {"unet", "vae_decoder", "text_encoder", "class_embedder"} <= seen


def test_its_images_are_those_of_the_generator(model, tiny_bundle):
    requests = [
        fake_triton.InferenceRequest(prompt=["red", "blue"], seed=[3, 4]),
        fake_triton.InferenceRequest(
            prompt=["green"],
            negative_prompt=["red"],
            seed=[2**64 - 1],
            num_inference_steps=[3],
            guidance_scale=[7.1],
            request=['{"sampler": "euler", "seed": 1}'],
        ),
    ]

    first, second = map(outputs, model.execute(requests))

    with Generator(tiny_bundle, backend="onnxruntime", threads=1) as generator:
        for row, (prompt, seed) in enumerate((("red", 3), ("blue", 4))):
            expected = np.asarray(generator(prompt, seed=seed).image)
            np.testing.assert_array_equal(first["image"][row], expected)
        other = generator(
            "green",
            negative_prompt="red",
            seed=2**64 - 1,
            num_inference_steps=3,
            guidance_scale=7.1,
            sampler="euler",
        )
    np.testing.assert_array_equal(second["image"], np.asarray(other.image)[None])
    np.testing.assert_array_equal(first["image_seed"], [[3], [4]])
    assert second["image"].dtype == np.uint8


def test_an_image_without_a_seed_says_which_one_it_got(model, tiny_bundle):
    (found,) = map(outputs, model.execute([fake_triton.InferenceRequest(prompt=["red"])]))

    with Generator(tiny_bundle, backend="onnxruntime", threads=1) as generator:
        again = generator("red", seed=int(found["image_seed"][0, 0]))
    np.testing.assert_array_equal(found["image"][0], np.asarray(again.image))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": ["red"], "num_inference_steps": [0]}, "num_inference_steps: "),
        ({"prompt": ["red"], "request": ["{"]}, "request: is not JSON: "),
        ({"prompt": ["red"], "request": ["[1]"]}, "request: must be a JSON object, got list"),
        ({"prompt": [b"\xff"]}, "prompt: is not text in UTF-8"),
        ({"prompt": ["red"], "request": ['{"num_images": 2}']}, "num_images: leave it out; send"),
        ({"prompt": ["red"], "request": ['{"stpes": 2}']}, "stpes"),
        ({"prompt": ["red"], "request": ['{"image": "/etc/passwd"}']}, "image: send a data: URL"),
        (
            {"prompt": ["a", "b"], "request": ['{"width": 16}', '{"width": 32}']},
            "the images of a batch have one size; send others apart",
        ),
    ],
)
def test_a_wrong_request_gets_one_sentence_and_leaves_others_alone(model, values, message):
    good = fake_triton.InferenceRequest(prompt=["red"], seed=[1])

    wrong, right = model.execute([fake_triton.InferenceRequest(**values), good])

    text, code = error(wrong)
    assert message in text
    assert "\n" not in text
    assert code == fake_triton.TritonError.INVALID_ARG
    assert outputs(right)["image"].shape[0] == 1


def test_a_client_that_cancels_stops_its_own_request(model):
    gone = fake_triton.InferenceRequest(prompt=["red"], num_inference_steps=[50], cancelled_after=2)
    stays = fake_triton.InferenceRequest(prompt=["red"], num_inference_steps=[6])

    cancelled, done = model.execute([gone, stays])

    assert error(cancelled)[1] == fake_triton.TritonError.CANCELLED
    assert "image" in outputs(done)


@pytest.mark.parametrize(("visible", "device", "chosen"), [(None, "1", "1"), ("3,5", "1", "5")])
def test_an_instance_on_a_gpu_sees_that_one(
    visible, device, chosen, tiny_bundle, tmp_path, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    exported(tiny_bundle, tmp_path, "--name", "tiny", "--backend", "cpu")

    opened(tmp_path / "tiny", monkeypatch, "GPU", device).finalize()

    assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen


def test_a_bundle_that_was_exchanged_is_refused(tiny_bundle, tmp_path, monkeypatch):
    from ldm_runtime.errors import ManifestError

    model = exported(tiny_bundle, tmp_path, "--name", "tiny", "--kind", "cpu") / "tiny"
    manifest = model / "1/bundle/manifest.json"
    text = manifest.read_text()
    manifest.unlink()  # else the bundle itself is changed, by its other name
    manifest.write_text(text + " ")

    with pytest.raises(ManifestError, match="get the right bundle"):
        opened(model, monkeypatch)


def test_a_model_in_the_way_is_replaced_only_when_told_so(tiny_bundle, bundle_of, tmp_path, capsys):
    exported(tiny_bundle, tmp_path, "--name", "m")
    before = (tmp_path / "m/config.pbtxt").read_bytes()
    arguments = ["triton", str(bundle_of("class-to-image")), "--out", str(tmp_path), "--name", "m"]
    capsys.readouterr()

    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path}/m is there already; add --replace to replace it" in message
    assert message.count("\n") == 1
    assert (tmp_path / "m/config.pbtxt").read_bytes() == before
    assert main([*arguments, "--replace", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"models": [f"{tmp_path}/m"]}
    assert "class_label" in (tmp_path / "m/config.pbtxt").read_text()
    assert [each.name for each in tmp_path.iterdir()] == ["m"]


def test_a_failure_in_between_leaves_nothing(own_bundle, tmp_path, monkeypatch, capsys):
    from ldm_runtime.triton import repository

    def fail(*_arguments, **_more):
        raise OSError(28, "No space left on device", "model_repository")

    monkeypatch.setattr(repository, "generator_config", fail)

    assert main(["triton", str(own_bundle), "--out", str(tmp_path / "out")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


KILLED = """
import os, signal, sys
from ldm_runtime.cli.commands import main
from ldm_runtime.triton import repository

repository.write_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(["triton", *sys.argv[1:]])
"""


def test_a_process_that_is_killed_leaves_nothing_in_the_repository(tiny_bundle, tmp_path):
    arguments = [str(tiny_bundle), "--out", str(tmp_path / "models"), "--name", "m"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)

    assert killed.returncode == -signal.SIGKILL
    assert {each.name for each in tmp_path.iterdir()} == {".models.m.partial", "models"}
    assert list((tmp_path / "models").iterdir()) == []
    assert main(["triton", *arguments]) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["models"]
    assert [each.name for each in (tmp_path / "models").iterdir()] == ["m"]


def test_a_process_that_adds_the_same_model_is_waited_for(tiny_bundle, tmp_path, capsys):
    lock = lock_folder(tmp_path / ".models.m.partial")
    (tmp_path / ".models.m.partial/m").mkdir()
    arguments = ["triton", str(tiny_bundle), "--out", str(tmp_path / "models"), "--name", "m"]

    assert main(arguments) == 2
    assert "another process is adding m to" in capsys.readouterr().err
    assert (tmp_path / ".models.m.partial/m").exists()
    os.close(lock)
    assert main(arguments) == 0


def test_a_repository_that_is_a_mount_point_gets_its_models(tiny_bundle, tmp_path, monkeypatch):
    rename = Path.rename

    def across_devices(source, target):
        if not source.is_relative_to(tmp_path / "models"):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", across_devices)

    exported(tiny_bundle, tmp_path / "models", "--name", "m")

    assert [each.name for each in tmp_path.iterdir()] == ["models"]
    assert [each.name for each in (tmp_path / "models").iterdir()] == ["m"]


def test_the_files_are_not_copied(tiny_bundle, tmp_path):
    folder = exported(tiny_bundle, tmp_path, "--networks", "--name", "tiny")

    weights = tiny_bundle / "unet/weights.bin"
    assert (folder / "tiny/1/bundle/unet/weights.bin").samefile(weights)
    assert (folder / "tiny_unet/1/model.onnx/weights.bin").samefile(weights)


def test_a_damaged_bundle_is_not_exported(own_bundle, tmp_path, capsys):
    (own_bundle / "unet/weights.bin").write_bytes(b"")

    assert main(["triton", str(own_bundle), "--out", str(tmp_path / "out")]) == 1
    assert "unet/weights.bin has 0 bytes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "a b"])
def test_a_name_is_one_of_a_model(name, tiny_bundle, tmp_path, capsys):
    arguments = ["triton", str(tiny_bundle), "--out", str(tmp_path), "--name", name]

    assert main(arguments) == 2
    assert f"name: {name!r} is not the name of a Triton model" in capsys.readouterr().err


def test_the_model_is_short():
    source = Path(importlib.util.find_spec("ldm_runtime.triton.model").origin)

    assert len(source.read_text().splitlines()) <= 80
