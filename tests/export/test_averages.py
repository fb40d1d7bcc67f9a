import re

import numpy as np
import pytest
import torch

from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.detection.averages import FAR, compare_averages, warn_of_averages
from ldm_export.detection.overrides import Overrides
from ldm_export.families.latent_diffusion import LDM_FAMILIES
from ldm_export.families.table import FAMILIES
from ldm_export.source import ExportOptions, open_source
from ldm_runtime.specs.model import Assumption
from tests.conftest import SHAPES_CHECKPOINT
from tests.export import small_checkpoint
from tests.export.sd_layout import with_values

RNG = np.random.default_rng(0)
WEIGHTS = {
    f"model.diffusion_model.{name}": RNG.normal(0, 0.03, (8, 8)).astype(np.float32)
    for name in ("input_blocks.0.0.weight", "out.2.weight")
}


def ema_of(name):
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def tensors_with(average_of):
    averages = {ema_of(name): average_of(values) for name, values in WEIGHTS.items()}
    return {name: with_values(values) for name, values in (WEIGHTS | averages).items()}


def warned(tensors, caplog):
    caplog.clear()
    caplog.set_level("INFO", logger="ldm_export")
    averages = {name: name for name in tensors if name.startswith("model_ema.")}
    warn_of_averages(tensors, {"unet": averages})
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def random_walk(weights):
    """Follow weights as LitEma does, while every step of training moves them at random."""
    average, decay, rate = weights.astype(np.float64), 0.9999, 1e-4
    value = average.copy()
    for _ in range(30_000):
        value += rate * RNG.choice((-1.0, 1.0), value.shape)
        average -= (1 - decay) * (average - value)
    return average, value


def test_averages_of_a_training_that_moves_all_weights_at_random_are_near_enough():
    average, last = random_walk(next(iter(WEIGHTS.values())))
    size = 0.03 * last.size**0.5

    distance = np.linalg.norm(average - last) / size

    assert 0.1 < distance < FAR


def test_the_distance_is_that_of_all_tensors_together():
    found = compare_averages(tensors_with(lambda weights: 0.99 * weights), map(ema_of, WEIGHTS))

    assert found.distance == pytest.approx(0.01, rel=1e-3)
    assert not found.is_constant


@pytest.mark.parametrize(("fill", "distance"), [(0.0, r"100\.0%"), (1.0, r"3\d\d\d\.\d%")])
def test_constant_averages_are_a_warning_with_their_distance(fill, distance, caplog):
    tensors = tensors_with(lambda weights: np.full_like(weights, fill))

    ((level, message),) = warned(tensors, caplog)

    assert level == "WARNING"
    assert re.search(rf"one value only \(.* by {distance}\), .* use --weights model", message)


def test_averages_of_another_model_are_a_warning_with_their_distance(caplog):
    other = tensors_with(lambda weights: RNG.normal(0, 0.03, weights.shape).astype(np.float32))

    ((level, message),) = warned(other, caplog)

    assert level == "WARNING"
    assert re.search(r"by 1[234]\d\.\d% .* of another model; try --weights model", message)


def test_averages_of_the_same_training_are_no_warning(caplog):
    ((level, message),) = warned(tensors_with(lambda weights: 0.97 * weights), caplog)

    assert (level, message) == ("INFO", "the moving averages differ from the last weights by 3.0%")


def test_averages_without_the_weights_they_average_are_no_warning(caplog):
    averages = {
        name: tensor for name, tensor in tensors_with(np.copy).items() if name not in WEIGHTS
    }

    assert warned(averages, caplog) == []


@pytest.mark.parametrize(("weights", "warnings"), [("ema", 1), ("model", 0)])
def test_zeroed_averages_are_a_warning_at_export_if_they_are_used(
    tmp_path, weights, warnings, caplog
):
    state = small_checkpoint.state_dict(small_checkpoint.random_networks(), ema=True)
    zeroed = {
        name: torch.zeros_like(tensor) if name.startswith("model_ema.") else tensor
        for name, tensor in state.items()
    }
    path = tmp_path / "merged.ckpt"
    torch.save(zeroed, path)
    options = ExportOptions(checkpoint=path, out=path, overrides=Overrides(weights=weights))

    with open_checkpoint(path) as checkpoint:
        open_source(options, checkpoint)

    found = [each for each in caplog.records if each.levelname == "WARNING"]
    assert len(found) == warnings
    assert all("differ from the last weights by 100.0%" in each.getMessage() for each in found)


def instruct_pix2pix(path, average_of):
    """Write an InstructPix2Pix with averages of every weight of its UNet."""
    state = small_checkpoint.state_dict(small_checkpoint.random_networks(), ema=True)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    state[name] = torch.cat([state[name], 0.5 * state[name]], dim=1)  # 8 channels
    unet = {each: value for each, value in state.items() if each.startswith("model.diff")}
    averages = {ema_of(each): average_of(value) for each, value in unet.items()}
    torch.save(state | averages, path)
    return path


def opened(path, caplog, config=None, **flags):
    """Open it for an export; return its record, the warnings and the weights of its UNet."""
    caplog.clear()
    if config is not None:
        path.with_suffix(".yaml").write_text(config)
    options = ExportOptions(checkpoint=path, out=path, overrides=Overrides(**flags))
    with open_checkpoint(path) as checkpoint:
        source = open_source(options, checkpoint)
        again = source.measured_as("epsilon")
    assert again.spec.weights == source.spec.weights
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    (used,) = {name.partition(".")[0] for name in source.detection.weights["unet"].values()}
    return source.spec, warnings, used


@pytest.mark.parametrize(
    ("average_of", "words"),
    [
        (torch.zeros_like, r"one value only \(.* by 100\.0%\), .*--weights ema takes the averages"),
        (lambda each: -each, r"by 200\.0% of those \(.*; the last weights are used, --weights ema"),
    ],
)
def test_averages_that_are_not_of_an_instruct_pix2pix_are_left_with_a_warning(
    average_of, words, tmp_path, caplog
):
    path = instruct_pix2pix(tmp_path / "merged.ckpt", average_of)

    spec, (warning,), used = opened(path, caplog)

    assert (spec.family, spec.weights, used) == ("instruct-pix2pix", "model", "model")
    assert Assumption(field="weights", value="model", source="file") in spec.assumptions
    assert re.search(words, warning)


def test_averages_of_a_merged_instruct_pix2pix_may_be_near_and_are_a_warning(tmp_path, caplog):
    path = instruct_pix2pix(tmp_path / "merged.ckpt", lambda each: 0.97 * each)

    spec, (warning,), used = opened(path, caplog)

    assert (spec.weights, used) == ("ema", "model_ema")
    assert re.search(r"differ from the last weights by 3\.0%, .*; .* --weights model", warning)


def test_averages_that_are_the_weights_themselves_are_no_warning(tmp_path, caplog):
    path = instruct_pix2pix(tmp_path / "pruned.ckpt", torch.clone)

    assert opened(path, caplog)[1:] == ([], "model_ema")


@pytest.mark.parametrize(
    ("config", "flags"),
    [(None, {"weights": "ema"}), ("model: {params: {use_ema: true}}", {})],
)
def test_averages_that_were_asked_for_are_used_whatever_they_are(config, flags, tmp_path, caplog):
    path = instruct_pix2pix(tmp_path / "merged.ckpt", torch.zeros_like)

    spec, (warning,), used = opened(path, caplog, config, **flags)

    assert (spec.weights, used) == ("ema", "model_ema")
    assert warning.endswith("so they are not a trained model; use --weights model")


@pytest.mark.parametrize("name", ["instruct-pix2pix", "stable-diffusion-2-unclip-h"])
def test_families_that_are_merged_and_sample_from_averages_measure_them(name):
    (family,) = (each for each in FAMILIES if each.name == name)

    assert (family.family_defaults.weights, family.family_defaults.is_merged) == ("ema", True)


def test_the_averages_of_the_papers_models_are_trusted():
    for family in LDM_FAMILIES:
        assert not family.family_defaults or not family.family_defaults.is_merged


def test_the_shapes_model_samples_from_its_averages_as_its_configuration_says():
    with open_checkpoint(SHAPES_CHECKPOINT) as checkpoint:
        options = ExportOptions(checkpoint=SHAPES_CHECKPOINT, out=SHAPES_CHECKPOINT)
        source = open_source(options, checkpoint, hashed=False)
        found = compare_averages(checkpoint.tensors, source.detection.weights["unet"].values())

    assert source.spec.weights == "ema"
    assert Assumption(field="weights", value="ema", source="config") in source.spec.assumptions
    assert 0 < found.distance < 0.1
