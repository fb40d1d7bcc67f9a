"""The first lines of `ldm inspect`."""

import hashlib
import re

import pytest

from ldm_runtime.backends import get_backend
from ldm_runtime.cli.commands import main
from ldm_runtime.diagnostics.inspection import inspect
from ldm_runtime.diagnostics.summary import summary


@pytest.fixture
def lines(tiny_bundle):
    """The summary of a bundle: its words by the label of each line."""
    text = summary(inspect(tiny_bundle, {}))
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def test_a_bundle_is_eight_lines(lines, tiny_bundle, capsys):
    assert list(lines) == [
        *("task", "model", "size", "backends", "engines", "date", "checkpoint", "verified")
    ]
    assert lines["task"] == "text-to-image"
    assert lines["model"] == "tiny, predicts v_prediction, float32 weights"
    assert lines["size"].startswith("16x16 pixels by default; ")
    digest = hashlib.sha256((tiny_bundle / "manifest.json").read_bytes()).hexdigest()
    assert re.fullmatch(rf"20\d\d-\d\d-\d\d \d\d:\d\d UTC; .* sha256 {digest}", lines["date"])
    assert main(["inspect", str(tiny_bundle)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_a_model_of_edm_says_so_with_its_noise_levels(tiny_bundle):
    description = inspect(tiny_bundle, {})
    description["spec"]["edm"] = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}

    assert "predicts v_prediction (EDM, sigma 0.002 to 80), float32" in summary(description)


def test_backends_are_those_that_say_so_themselves(lines, tiny_bundle):
    able, _, names = lines["backends"].partition(" can run here, of ")

    assert "onnxruntime" in able.split(", ")
    for name in names.split(", "):
        reason = inspect(tiny_bundle, {})["backends"][name]
        assert (reason is None) == (name in able.split(", "))
    assert get_backend("onnxruntime").why_not(None) is None


def test_the_full_description_and_the_summary_tell_the_same(tiny_bundle, capsys):
    assert main(["inspect", "--full", str(tiny_bundle)]) == 0
    full = capsys.readouterr().out.splitlines()

    assert "kind: bundle" in full
    assert re.search(r"^backends: .*onnxruntime.* can run here$", "\n".join(full), re.MULTILINE)
    assert 30 < len(full) < 90


def test_the_largest_error_of_each_graph_is_shown():
    parity = [
        {"variant": "fp32", "max_relative_error": 1e-6},
        {"variant": "fp16", "max_relative_error": 2e-3},
        {"variant": "fp32", "max_relative_error": 3e-5},
    ]
    description = {
        "kind": "bundle",
        "spec": {
            "task": "unconditional",
            "label_names": [],
            "family": "f",
            "edm": None,
            "prediction_type": "epsilon",
            "defaults": {"width": 8, "height": 4},
        },
        "weights_dtype": "float16",
        "size_bytes": 1,
        "backends": {"cuda": "no driver"},
        "engines": [{"component": "unet", "targets": ["sm80", "sm89"]}],
        "quantization": {"layers": 7, "psnr": [31.04, 28.16]},
        "sha256": "0" * 64,
        "date": "2026-01-01 00:00 UTC",
        "build": {
            "checkpoint": "a\x1b[2J",
            "checkpoint_sha256": "0" * 64,
            "components": [{"component": "autoencoder", "file": "v\x1b", "sha256": "1" * 64}],
        },
        "components": [{"parity": parity}, {"parity": []}],
    }

    text = summary(description)

    assert "largest error 2.0e-03 in fp16, 3.0e-05 in fp32; here: by `ldm verify`" in text
    assert "engines     unet for sm80/sm89" in text
    assert "int8        7 layers of the UNet; images have 28.2 dB or more to fp32" in text
    assert "backends    none can run here, of cuda" in text
    assert r"a\x1b[2J" in text
    assert rf"components  autoencoder from v\x1b, sha256 {'1' * 12}..." in text


def test_other_files_are_a_line_per_property():
    description = {
        "kind": "checkpoint",
        "family": None,
        "problem": "no family",
        "dtypes": {"float16": 3, "float32": 1},
        "globals": ["os.system"],
        "unet": dict.fromkeys("abcdefgh"),
        "assumptions": [{"field": "a"}],
        "empty": [],
    }

    assert summary(description).splitlines() == [
        "kind         checkpoint",
        "problem      no family",
        "dtypes       float16, float32",
        "globals      os.system",
        "unet         8 entries, with --full",
        "assumptions  1 entries, with --full",
        "empty        none",
    ]
