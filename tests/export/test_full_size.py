"""The table of released models, and one narrow row of it measured from end to end."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

import full_size
from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.detection.detect import detect
from ldm_runtime.specs.model import Task
from released import random_checkpoints
from released.full_size_report import report
from released.narrow_models import narrowed
from released.paper_models import PAPER_MODELS
from released.released_models import MODELS

HYPERPARAMETERS = ("task", "networks")
_CONDITIONERS = ("cond_stage_model.", "conditioner.", "embedder.", "depth_model.")


def millions(model):
    """Weights of the UNet, the autoencoder and the conditioner of a checkpoint."""
    totals = [0, 0, 0]
    for name, shape in random_checkpoints.parameter_shapes(model):
        if name.startswith("model.diffusion_model."):
            part = 0
        else:
            part = 2 if name.startswith(_CONDITIONERS) else 1
        totals[part] += torch.Size(shape).numel()
    return [total / 1e6 for total in totals]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_as_many_weights_as_its_sources_say(name):
    model = MODELS[name]

    assert millions(model) == pytest.approx(model.parameters_millions, abs=0.006)


def test_every_task_of_the_paper_is_measured():
    of_stable_diffusion = {
        *("text-inpainting", "image-editing", "image-variation", "text-super-resolution"),
        "depth-to-image",
    }
    tasks = {model.task for model in PAPER_MODELS.values()}
    assert tasks == {*get_args(Task)} - of_stable_diffusion
    assert len(PAPER_MODELS) == 20


@pytest.mark.parametrize("name", MODELS)
def test_a_random_checkpoint_is_recognised_as_what_it_was_made_of(name, tmp_path):
    model = narrowed(MODELS[name])
    path = tmp_path / "random.ckpt"

    random_checkpoints.write_checkpoint(path, model)

    with open_checkpoint(path) as checkpoint:
        spec = detect(checkpoint.tensors).spec
    assert {field: getattr(spec, field) for field in HYPERPARAMETERS} == {
        field: getattr(model, field) for field in HYPERPARAMETERS
    }


def test_no_weight_of_a_random_checkpoint_is_zero_or_large(tmp_path):
    path = tmp_path / "random.ckpt"

    random_checkpoints.write_checkpoint(path, narrowed(MODELS["layout2img-openimages256"]))

    with open_checkpoint(path) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            if name.endswith((".weight", ".bias")) and tensor.shape:
                values = tensor.numpy()
                assert values.std() > 0.005 or values.size == 1, name
                assert abs(values).max() < 6, name


def test_a_row_belongs_to_its_hyperparameters():
    model = MODELS["bsr_sr"]
    unet = replace(model.networks["unet"], model_channels=192)
    wider = replace(model, networks=model.networks.changed(unet=unet))

    assert full_size.row_key(model) == full_size.row_key(replace(model))
    assert full_size.row_key(model) != full_size.row_key(wider)


@pytest.mark.parametrize(
    ("row", "engines", "measured"),
    [
        ({"failure": None, "engines_asked": True}, True, True),
        ({"failure": None, "engines_asked": False}, True, False),
        ({"failure": None, "engines_asked": False}, False, True),
        ({"failure": "it broke", "engines_asked": True}, False, False),
    ],
)
def test_a_row_is_measured_once_unless_something_of_it_is_missing(row, engines, measured):
    model = MODELS["vq-f4"]
    rows = [row | {"key": full_size.row_key(model)}]

    assert full_size.is_measured(rows, model, engines=engines) is measured
    assert not full_size.is_measured(rows, MODELS["kl-f4"], engines=engines)


@pytest.mark.parametrize(
    ("free", "available", "words"),
    [
        (10**9, 10**11, "has 1 GB free, but this takes 16 GB"),
        (10**12, 10**9, "1.0 GB of memory are free, but this takes 9.9 GB"),
    ],
)
def test_a_machine_that_is_too_small_is_a_failure_in_a_sentence(
    free, available, words, monkeypatch, tmp_path
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(full_size, "available_bytes", lambda swap: available)

    row = full_size.measured_row(MODELS["rdm-768"], tmp_path, engines=False)

    assert words in row["failure"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_narrow_model_goes_from_checkpoint_to_engines_and_its_row_is_kept(tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    results = tmp_path / "rows.jsonl"
    work = tmp_path / "work"
    work.mkdir()
    arguments = ["--smoke", "--only", "kl-f4", "--results", str(results), "--folder", str(work)]

    statuses = [full_size.main(arguments) for _ in range(2)]

    assert statuses == [0, 0]
    assert list(work.iterdir()) == []
    (row,) = map(json.loads, results.read_text().splitlines())  # the second run had it already
    assert row["failure"] is None
    assert row["family"] == "autoencoder-kl"
    assert row["differs"] == []
    assert row["export"]["peak_bytes"] > 100e6
    assert max(row["fp32_max_relative_error"].values()) <= 1e-4
    assert 0 < max(row["fp16_relative_l2"].values()) <= 5e-3
    assert row["golden"]["failed"] == []
    assert 1e6 < row["decode_bytes"] < 1e9
    assert row["fp16_at_size"]["vae_decoder"]["shape"] == [1, 3, 256, 256]
    assert {build["component"] for build in row["engines"]} == {"vae_decoder", "vae_encoder"}
    captured = capsys.readouterr()
    assert "kl-f4 is there already" in captured.err
    assert "| kl-f4 (narrow) | autoencoder-kl |" in captured.out


ROW = {
    "name": "vq-f4",
    "failure": None,
    "family": "ldm-vq-f4",
    "checkpoint_bytes": 675_800_000,
    "export": {"seconds": 61.2, "peak_bytes": 1_234_000_000},
    "bundle_bytes": 345_000_000,
    "fp32_max_relative_error": {"unet": 2e-6, "vae_decoder": 3.04e-6},
    "fp16_relative_l2": {"unet": 1.2e-3, "vae_decoder": 2e-3},
    "decode_bytes": 482 * 2**20,
    "golden": {"worst_psnr": 58.6, "failed": []},
    "fp16_at_size": {"vae_decoder": {"finite": True}},
    "engines": [
        {"seconds": 5.0, "peak_bytes": 10**9},
        {"seconds": 7.4, "peak_bytes": 2 * 10**9},
    ],
    "why_no_engines": {},
}


def test_the_report_has_the_last_row_of_every_model_in_the_order_of_the_table():
    older = ROW | {"bundle_bytes": 1}
    first = ROW | {"name": "celeba256"}

    *_, before, line = report([older, ROW, first])

    assert before.startswith("| celeba256 |")
    assert line == (
        "| vq-f4 | ldm-vq-f4 | 168.9 M | 61 s | 1.23 GB | 0.34 GB | 3.0e-06 | 2.0e-03 | 482 MiB "
        "| 59 dB | yes | 2 in 12 s, 2.0 GB |"
    )


def test_there_is_a_measured_row_of_every_released_model_of_the_paper():
    rows = full_size.kept_rows(full_size.RESULTS)

    assert PAPER_MODELS.keys() <= {row["name"] for row in rows} <= MODELS.keys()
    assert all(row["engines"] and row["failure"] is None for row in rows)


def test_the_memory_of_decoding_is_that_of_autoencoders_alone():
    of_all = {"unet": {"finite": True}, "vae_decoder": {"finite": True}}

    *_, line = report([ROW | {"decode_bytes": None, "fp16_at_size": of_all}])

    assert "| 2.0e-03 | – | 59 dB" in line


def test_the_report_says_what_failed_and_why():
    broken = ROW | {
        "golden": {"worst_psnr": 20.0, "failed": ["golden/0 image 0 psnr"]},
        "fp16_at_size": {"unet": {"finite": False}},
        "failure": "golden outputs: golden/0 image 0 psnr",
        "engines": [],
        "why_no_engines": {"unet": "no kernel"},
    }
    never = {"name": "kl-f4", "failure": "the export ended with 1: error: no"}

    lines = report([broken, never])

    assert "20 dB, FAILED | NO | none |" in lines[2]
    assert lines[3:] == [
        "",
        "vq-f4: golden outputs: golden/0 image 0 psnr",
        "vq-f4: no engine of the unet: no kernel",
        "kl-f4: the export ended with 1: error: no",
    ]


def test_a_bundle_of_another_model_than_the_checkpoint_was_made_of_is_a_failure():
    row = ROW | {"differs": ["task: inpainting instead of super-resolution"]}

    assert full_size._fault(row).startswith("recognised as something else: task: inpainting")
