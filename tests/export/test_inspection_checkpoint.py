import json
import math
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ldm_export.detection.inspection import inspect_checkpoint
from ldm_export.errors import CheckpointError
from ldm_runtime.cli import main
from tests.export.sd_layout import TINY, checkpoint, scaled_linear
from tests.export.small_systems import small_system

DTYPES = {"float16": torch.float16, "float32": torch.float32, "int64": torch.int64}
SMALL = replace(TINY, model_channels=32, channel_mult=(1, 2), depth=(0, 1), middle_depth=1)


def tensors_of(layout, **options):
    tensors = {
        name: torch.zeros(tensor.shape, dtype=DTYPES[tensor.dtype])
        for name, tensor in checkpoint(layout, **options).items()
    }
    tensors["alphas_cumprod"] = torch.from_numpy(scaled_linear()).float()
    return tensors


@pytest.fixture
def ckpt(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(
        {"global_step": 12, "state_dict": tensors_of(SMALL, ema=True, dtype="float16")}, path
    )
    return path


def test_a_torch_checkpoint_is_described(ckpt):
    report = inspect_checkpoint(ckpt)

    assert report["kind"] == "checkpoint"
    assert report["family"] == "stable-diffusion-1"
    assert report["task"] == "text-to-image"
    assert report["global_step"] == 12
    assert report["ema_present"] is True
    assert report["weights"] == "model"
    assert report["prediction_type"] == "epsilon"
    assert report["unet"]["channel_mult"] == (1, 2)
    assert report["autoencoder"]["factor"] == 4
    assert report["num_train_timesteps"] == 1000
    assert {"field": "unet.num_heads", "value": "8", "source": "family"} in report["assumptions"]


def test_parameters_and_types_are_counted_by_component(ckpt):
    shapes = checkpoint(SMALL)
    text = [
        tensor.shape
        for name, tensor in shapes.items()
        if name.startswith("cond_stage_model.") and not name.endswith("position_ids")
    ]

    report = inspect_checkpoint(ckpt)

    assert report["components"].keys() == {"unet", "vae_decoder", "vae_encoder", "text_encoder"}
    assert report["components"]["text_encoder"] == {
        "parameters": sum(map(math.prod, text)),
        "dtypes": {"float16": len(text)},
    }
    assert report["dtypes"]["int64"] == 2
    assert report["tensors"] == sum(report["dtypes"].values())


def test_a_safetensors_checkpoint_is_described(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tensors_of(SMALL), path)

    report = inspect_checkpoint(path)

    assert report["family"] == "stable-diffusion-1"
    assert report["ema_present"] is False
    assert report["weights"] == "model"
    assert report["global_step"] is None


def test_only_what_a_model_has_is_described(tmp_path):
    path = tmp_path / "first stage.ckpt"
    torch.save({"state_dict": small_system("autoencoder").state}, path)

    report = inspect_checkpoint(path)

    assert (report["family"], report["task"]) == ("autoencoder-vq", "autoencoder")
    assert report["autoencoder"]["codebook_size"] == 600
    assert report["components"].keys() == {"vae_decoder", "vae_encoder"}
    assert {"unet", "text_encoder", "class_embedder", "segmentation_encoder"}.isdisjoint(report)


def test_a_configuration_beside_a_checkpoint_is_read_as_an_export_reads_it(tmp_path):
    path, config = tmp_path / "model.safetensors", tmp_path / "model.yaml"
    save_file(tensors_of(SMALL), path)
    config.write_text("model: {params: {parameterization: v, image_size: 16}}")

    report = inspect_checkpoint(path)
    config.write_text("model: {params: {unet_config: {params: {in_channels: 9}}}}")
    contradicted = inspect_checkpoint(path)

    assert (report["config"], report["prediction_type"]) == (str(config), "v_prediction")
    assert report["defaults"]["height"] == 16 * report["autoencoder"]["factor"]
    assert contradicted["family"] is None
    assert "in_channels is 9" in contradicted["problem"]


def test_sampling_defaults_and_label_names_next_to_a_checkpoint_are_described(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(small_system("class-guided").state, path)
    path.with_suffix(".yaml").write_text(
        "model: {params: {}}\nsampling: {num_inference_steps: 7}\nlabel_names: [cat, red cross]\n"
    )

    report = inspect_checkpoint(path)

    assert report["defaults"]["num_inference_steps"] == 7
    assert report["label_names"] == ["cat", "red cross"]


def test_a_report_can_be_written_as_json(ckpt):
    report = inspect_checkpoint(ckpt)

    assert json.loads(json.dumps(report))["family"] == "stable-diffusion-1"


def test_a_model_of_no_exported_family_is_described_with_the_reason(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_mid.lora_down.weight": torch.zeros(4, 8)}, path)

    report = inspect_checkpoint(path)

    assert report["family"] is None
    assert "a LoRA" in report["problem"]
    assert report["dtypes"] == {"float32": 1}


def test_files_and_folders_that_are_no_checkpoints_are_none_unless_they_are_named_so(tmp_path):
    for name, content in {
        "picture.raw": b"\x89PNG\r\n\x1a\n" + bytes(64),
        "text.txt": b"not a header at all",
        "empty": b"",
        "settings.json": b'{"model": {"params": {}}}',
        "other.pickle": pickle.dumps([1, 2, 3]),
    }.items():
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")

    reports = {path.name: inspect_checkpoint(path) for path in tmp_path.iterdir()}

    assert len(reports) == 6
    assert set(reports.values()) == {None}
    assert inspect_checkpoint(tmp_path) is None
    assert inspect_checkpoint(tmp_path / "absent.ckpt") is None


def test_a_checkpoint_is_known_by_its_content_and_not_by_its_name(ckpt, tmp_path):
    path = ckpt.rename(tmp_path / "download")

    report = inspect_checkpoint(path)

    assert report["family"] == "stable-diffusion-1"


def test_a_checkpoint_whose_names_are_no_text_is_an_error_and_not_a_crash(ckpt):
    data = ckpt.read_bytes().replace(b"/data/0", b"/data/\xff")
    directory = data.rindex(b"/data/\xff")
    flags = data.rindex(b"PK\x01\x02", 0, directory) + 9  # the name is said to be UTF-8
    ckpt.write_bytes(data[:flags] + b"\x08" + data[flags + 1 :])

    with pytest.raises(CheckpointError):
        inspect_checkpoint(ckpt)


def test_a_checkpoint_that_was_cut_short_is_an_error_and_not_something_else(ckpt):
    ckpt.write_bytes(ckpt.read_bytes()[:5000])

    with pytest.raises(CheckpointError, match=r"model\.ckpt"):
        inspect_checkpoint(ckpt)


def test_a_checkpoint_in_the_legacy_format_is_described_whatever_its_name(tmp_path):
    path = tmp_path / "download"
    content = {"global_step": 12, "state_dict": tensors_of(SMALL)}
    torch.save(content, path, _use_new_zipfile_serialization=False)

    report = inspect_checkpoint(path)

    assert (report["format"], report["global_step"]) == ("torch-legacy", 12)
    assert report["family"] == "stable-diffusion-1"


def test_inspecting_needs_no_torch(ckpt):
    code = (
        "import pathlib, sys; from ldm_export.detection.inspection import inspect_checkpoint;"
        "inspect_checkpoint(pathlib.Path(sys.argv[1])); print(*sys.modules)"
    )

    modules = subprocess.run(
        [sys.executable, "-c", code, ckpt], capture_output=True, text=True, check=True
    ).stdout.split()

    assert {"torch", "onnx", "transformers", "safetensors"}.isdisjoint(modules)


def test_a_huge_directory_in_a_file_of_holes_takes_no_memory(tmp_path):
    path, size = tmp_path / "model.ckpt", 1 << 30
    with path.open("wb") as file:
        file.write(b"PK\3\4" + bytes(26) + b"x/data.pkl")
        start = file.seek(size, 1) - size
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, size, start, 0))
    tracemalloc.start()

    with pytest.raises(CheckpointError, match="lists 9 members in 1073741824 bytes: too many"):
        inspect_checkpoint(path)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_names_that_torch_does_not_write_are_listed_in_the_report(ckpt, tmp_path, capsys):
    assert inspect_checkpoint(ckpt)["unusual_globals"] == []
    content = torch.load(ckpt, weights_only=True)
    torch.save(content | {"schedule": math.cos, "dims": replace}, tmp_path / "other.ckpt")

    report = inspect_checkpoint(tmp_path / "other.ckpt")

    assert report["unusual_globals"] == ["dataclasses.replace", "math.cos"]
    assert main(["inspect", str(tmp_path / "other.ckpt")]) == 0
    assert "dataclasses.replace, math.cos" in capsys.readouterr().out
