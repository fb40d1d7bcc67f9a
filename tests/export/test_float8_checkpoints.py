"""Checkpoints whose weights are stored in 8 bits: read as torch widens them, or refused."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm_export.bundle import estimate_export
from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.detection.detect import detect
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import WeightsError
from ldm_export.networks.loading import load_network
from ldm_export.source import ExportOptions
from tests.export.sd_layout import TINY, FakeTensor, checkpoint
from tests.export.small_checkpoint import SIZE

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
