"""Tensors that no network needs are left out as the user says, and never one that is needed."""

import pytest
import torch

from ldm_export.bundle import estimate_export
from ldm_export.cli import main
from ldm_export.detection.detect import detect
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import WeightsError
from ldm_export.source import ExportOptions
from tests.export.sd_layout import TINY, FakeTensor, checkpoint
from tests.export.small_checkpoint import SIZE

OUTSIDE = "adapter.proj.weight"
INSIDE = "model.diffusion_model.adapter.scale"
USE_EMA = {"model": {"params": {"use_ema": True}}}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory, small_checkpoint_path):
    """A checkpoint with a tensor beside its networks, and one that is named like the UNet's."""
    path = tmp_path_factory.mktemp("spoilt") / "spoilt.ckpt"
    state = torch.load(small_checkpoint_path, weights_only=True)["state_dict"]
    extra = {OUTSIDE: torch.zeros(2), INSIDE: torch.zeros(1, dtype=torch.int8)}
    torch.save({"state_dict": state | extra}, path)
    return path


def options(path, *patterns):
    overrides = Overrides(height=SIZE, width=SIZE, ignore=patterns)
    return ExportOptions(checkpoint=path, out=path.with_name("engines"), overrides=overrides)


def test_the_export_of_a_checkpoint_with_ignored_tensors_is_that_without_them(
    spoilt, small_checkpoint_path
):
    clean = estimate_export(options(small_checkpoint_path))

    estimate = estimate_export(options(spoilt, "adapter.*", "*.adapter.scal?"))

    assert estimate.parameters == clean.parameters
    notes = estimate.spec.assumptions[len(clean.spec.assumptions) :]
    assert {(note.field, note.value, note.source) for note in notes} == {
        ("ignored_tensors", "1 by 'adapter.*'", "flag"),
        ("ignored_tensors", "1 by '*.adapter.scal?'", "flag"),
    }


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("*.adapter.scale",), r"adapter\.proj\.weight; .* leave them out with --ignore 'PATTERN'"),
        (("adapter.*",), r"1 weights are stored as int8 \(.*adapter\.scale\)"),
        (("*adapter*", "adaptor.*"), r"--ignore 'adaptor\.\*' matches none of .* \d+ tensors"),
        (("ADAPTER.*",), r"--ignore 'ADAPTER\.\*' matches none"),
        (("adapter",), r"--ignore 'adapter' matches none"),
        (
            ("*adapter*", "*.out.2.bias"),
            r"--ignore '\*\.out\.2\.bias' .* that the unet needs: model\.diffusion_model\.out",
        ),
        (
            ("*adapter*", "*.middle_block.1.*"),
            r"--ignore '\*\.middle_block\.1\.\*' matches tensors that the unet needs",
        ),
    ],
)
def test_a_pattern_that_does_not_fit_is_one_sentence(spoilt, patterns, message):
    with pytest.raises(WeightsError, match=message) as caught:
        estimate_export(options(spoilt, *patterns))

    assert "\n" not in str(caught.value)


def test_the_command_says_what_it_ignores(spoilt, capsys):
    arguments = ["--height", str(SIZE), "--width", str(SIZE), "--estimate", "--ignore", "*adapter*"]

    status = main([str(spoilt), str(spoilt.with_name("engines")), *arguments])

    assert status == 0
    out = capsys.readouterr().out
    assert "ignored_tensors = 2 by '*adapter*' (from flag)" in out


def test_an_ignored_tensor_needs_no_moving_average():
    tensors = checkpoint(TINY, ema=True) | {INSIDE: FakeTensor(shape=(1,))}

    plain = detect(tensors, config=USE_EMA)
    ignoring = detect(tensors, config=USE_EMA, overrides=Overrides(ignore=("*.adapter.*",)))

    assert (plain.spec.weights, ignoring.spec.weights) == ("model", "ema")


def test_an_ignored_tensor_has_its_reason_next_to_the_others():
    tensors = checkpoint(TINY) | {OUTSIDE: FakeTensor(shape=(1,))}

    detection = detect(tensors, overrides=Overrides(ignore=("adapter.*", "betas")))

    unused, notes = detection.unused, detection.spec.assumptions[-2:]
    assert [note.value for note in notes] == ["1 by 'adapter.*'", "0 by 'betas'"]
    assert unused[OUTSIDE] == "left out by --ignore 'adapter.*'"
    assert unused["betas"] == "noise schedule, recorded in the bundle"
    assert len(unused) == len(detect(checkpoint(TINY)).unused) + 1


@pytest.mark.parametrize(
    "name",
    [
        "lvlb_weights",
        "embedding_manager.string_to_param_dict.*",
        "embedding_manager.embedder.transformer.text_model.embeddings.position_embedding.weight",
        "safety_checker.concept_embeds",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
        "first_stage_model.model_ema.decay",
    ],
)
def test_what_training_and_other_tools_leave_in_a_file_is_ignored(name):
    assert name in detect(checkpoint(TINY) | {name: FakeTensor(shape=(3,))}).unused
