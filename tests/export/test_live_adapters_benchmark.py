"""The benchmark of live adapters, over the small bundle."""

import json

import pytest

import live_adapters
from ldm_runtime.adapters.files import read_adapter


def test_a_step_with_and_without_and_a_new_scale_are_measured(small_bundle_fp32, capsys):
    flags = ["--bundle", str(small_bundle_fp32), "--backend", "onnxruntime", "--threads", "1"]

    assert live_adapters.main([*flags, "--steps", "2", "--repetitions", "1"]) == 0

    record = json.loads(capsys.readouterr().out)
    plain, live, scale = record["rows"]
    assert [len(each["seconds"]) for each in record["rows"]] == [1, 1, 10]
    ratio = live["median_seconds"] / plain["median_seconds"]
    assert record["step_against_without"] == pytest.approx(ratio, rel=1e-3)
    assert plain["settings"]["matrices"] > 5
    assert scale["name"] == "a new scale"


def test_the_lora_changes_every_matrix_of_the_transformers(small_bundle_fp32, tmp_path):
    path = tmp_path / "lora.safetensors"

    count = live_adapters.write_lora(path, small_bundle_fp32)

    layers = [name for _, name in read_adapter(path).layers]
    assert len(layers) == count
    assert {name.rpartition("transformer_blocks_0_")[2] for name in layers} >= {
        *(f"attn{number}_to_{part}" for number in (1, 2) for part in ("q", "k", "v", "out_0")),
        "ff_net_0_proj",
        "ff_net_2",
    }
