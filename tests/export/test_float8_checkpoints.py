"""Checkpoints whose weights are stored in 8 bits: read as torch widens them, or refused."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm_export.bundle import estimate_export
from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.detection.detect import detect
from ldm_export.detection.noise_augmentation import _statistics
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import WeightsError
from ldm_export.networks.loading import load_network
from ldm_export.source import ExportOptions
from tests.export.sd_layout import SD1, TINY, FakeTensor, checkpoint, sdxl_checkpoint, with_values
from tests.export.small_checkpoint import SIZE

STATISTICS = ("edm_mean", "edm_std")
FLOAT8 = ["float8_e4m3fn", "float8_e5m2"]
UNET = "model.diffusion_model."


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_network_has_the_numbers_of_its_weights_in_8_bits(tmp_path, small_checkpoint_path, dtype):
    state = torch.load(small_checkpoint_path, weights_only=True)["state_dict"]
    state = {name: each.to(dtype) if UNET in name else each for name, each in state.items()}
    path = tmp_path / "model.safetensors"
    save_file({name: each.contiguous() for name, each in state.items()}, path)
    sized = Overrides(height=SIZE, width=SIZE)
    estimates = [
        estimate_export(ExportOptions(checkpoint=each, out=tmp_path / "engines", overrides=sized))
        for each in (path, small_checkpoint_path)
    ]

    assert estimates[0].parameters == estimates[1].parameters
    with open_checkpoint(path) as opened:
        detection = detect(opened.tensors, overrides=sized)
        names = detection.weights["unet"]
        weights = {own: opened.tensors[name] for own, name in names.items()}
        network = load_network("unet", detection.spec, weights)

    parameters = dict(network.named_parameters())
    compared = {own for own in names if own in parameters}
    assert len(compared) > 50
    for own in compared:
        expected = state[names[own]].float().reshape(parameters[own].shape)
        np.testing.assert_array_equal(parameters[own].detach(), expected)


@pytest.mark.parametrize("name", ["out.2.scale_weight", "out.2.weight_scale", "scaled_fp8"])
def test_weights_in_8_bits_that_others_multiply_are_refused_even_if_those_are_ignored(name):
    tensors = checkpoint(TINY, dtype="float8_e4m3fn")
    assert detect(tensors).spec.unet is not None

    tensors[UNET + name] = FakeTensor(shape=(1,))
    with pytest.raises(WeightsError, match=rf"multiplied by 1 others .*{re.escape(name)}"):
        detect(tensors, overrides=Overrides(ignore=("*scale*",)))


def stored_in_8_bits(numbers, dtype):
    rounded = torch.tensor(numbers).to(getattr(torch, dtype)).float().numpy()
    return with_values(rounded, dtype)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_a_scale_factor_in_8_bits_confirms_that_of_the_configuration_or_the_family(dtype):
    tensors = checkpoint(SD1) | {"scale_factor": stored_in_8_bits(0.18215, dtype)}
    config = {"model": {"params": {"scale_factor": 0.1822}}}

    for stated, expected in (({}, 0.18215), ({"config": config}, 0.1822)):
        spec = detect(tensors, **stated).spec

        assert spec.autoencoder.latent_scale_factor == expected
        source = "config" if stated else "family"
        assert source_of(spec, "autoencoder.latent_scale_factor") == source


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("factor", [0.18215, 0.25])
def test_a_scale_factor_in_8_bits_that_was_measured_is_stated_by_the_flag(factor, dtype):
    tensors = checkpoint(SD1) | {"scale_factor": stored_in_8_bits(factor, dtype)}
    config = {"model": {"params": {"scale_by_std": True}}}

    with pytest.raises(WeightsError, match=rf"stored as {dtype}, .* --latent-scale-factor"):
        detect(tensors, config=config)
    flag = Overrides(latent_scale_factor=factor)
    spec = detect(tensors, config=config, overrides=flag).spec

    assert spec.autoencoder.latent_scale_factor == factor


def test_a_scale_factor_in_8_bits_of_another_model_is_not_taken():
    tensors = checkpoint(SD1) | {"scale_factor": stored_in_8_bits(0.25, "float8_e4m3fn")}

    with pytest.raises(WeightsError, match=r"^scale_factor 0\.25 is stored as float8_e4m3fn"):
        detect(tensors)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_statistics_in_8_bits_are_refused(dtype):
    marks = {name: stored_in_8_bits([8.4927, 5.9, 6.5, 5.2], dtype) for name in STATISTICS}

    with pytest.raises(WeightsError, match=rf"^edm_mean is stored as {dtype}, .*16 bits or more"):
        detect(sdxl_checkpoint() | marks)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_noise_levels_in_8_bits_confirm_those_of_the_family(dtype):
    levels = {"edm_vpred.sigma_min": 0.002, "edm_vpred.sigma_max": 120.0}
    tensors = sdxl_checkpoint() | {
        name: stored_in_8_bits(level, dtype) for name, level in levels.items()
    }

    spec = detect(tensors).spec

    assert (spec.edm.sigma_min, spec.edm.sigma_max) == (0.002, 120.0)
    assert source_of(spec, "edm.sigma_min") == "family"
    with pytest.raises(WeightsError, match=r"^edm_vpred\.sigma_max 80 is stored"):
        detect(tensors | {"edm_vpred.sigma_max": stored_in_8_bits(80.0, dtype)})


@pytest.mark.parametrize("dtype", FLOAT8)
def test_an_image_normalizer_in_8_bits_is_refused(dtype):
    own = {name: stored_in_8_bits([0.1, 0.3], dtype) for name in ("data_mean", "data_std")}

    with pytest.raises(WeightsError, match=rf"^data_mean is stored as {dtype}.*--image-normalizer"):
        _statistics(own, 2, needed=True)


def source_of(spec, field):
    (found,) = (each.source for each in spec.assumptions if each.field == field)
    return found
