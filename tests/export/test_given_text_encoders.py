"""Text encoders from files of their own: in every layout, and how many layers of them are read.

Files of full size are sparse: they have names and shapes, and no value of them is read.
"""

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm_export.detection.detect import detect
from ldm_export.errors import UnknownModelError, WeightsError
from ldm_export.intake.opening import open_model
from ldm_export.intake.text_encoder_names import with_open_clip_projections
from tests.export.sd_layout import (
    REFINER,
    SD1,
    SD2,
    FakeTensor,
    checkpoint,
    sdxl_checkpoint,
    text_shapes,
    with_values,
)
from tests.export.test_component_files import assert_holds, of_transformers, part, written
from tests.reference.small_families import SD_2, state_dict

UNET, VAE = "model.diffusion_model.", "first_stage_model."
ONLY, FIRST = "cond_stage_model.model.", "conditioner.embedders.0.model."
PROJECTION = "conditioner.embedders.1.model.text_projection"


def sparse(path, tensors):
    """Write a file with the names and shapes of tensors, which takes no room on the disk."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "F16", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def of_clip(width, layers, **extra):
    """A text encoder under the names of transformers, as fakes."""
    layout = replace(SD1, text_width=width, text_layers=layers, text_inner=4 * width)
    shapes = text_shapes(layout) | extra
    return {name: FakeTensor(shape=shape) for name, shape in shapes.items()}


def text_encoder_of(path, **files):
    with open_model(path, **files) as opened:
        spec = detect(opened.tensors, stated=opened.stated).spec
    return spec.family, spec.networks["text_encoder"]


@pytest.mark.parametrize(("layers", "passed"), [(24, 23), (23, 23)])
def test_a_given_encoder_of_stable_diffusion_2_is_read_to_layer_23(tmp_path, layers, passed):
    """OpenCLIP's own repository has 24 layers, the folders of Stable Diffusion 2 have 23."""
    model = sparse(tmp_path / "sd2.safetensors", checkpoint(SD2, schedule=False))
    file = sparse(tmp_path / "clip.safetensors", of_clip(1024, layers))

    family, text = text_encoder_of(model, text_encoder=file)

    assert family == "stable-diffusion-2"
    assert (text.num_layers, text.context_layers) == (layers, passed)


@pytest.mark.parametrize("is_alone", [False, True])
def test_a_given_encoder_of_the_refiner_is_read_to_its_last_layer_but_one(tmp_path, is_alone):
    tensors = sdxl_checkpoint(REFINER)
    tensors = {name: each for name, each in tensors.items() if "." in name}  # no buffers
    model = sparse(tmp_path / "refiner.safetensors", part(tensors, UNET) if is_alone else tensors)
    vae = sparse(tmp_path / "vae.safetensors", part(tensors, VAE))
    extra = {"text_projection.weight": (1280, 1280), "logit_scale": (), "vision_model.a": (2,)}
    file = sparse(tmp_path / "clip.safetensors", of_clip(1280, 32, **extra))

    family, text = text_encoder_of(model, vae=vae, text_encoder=file)

    assert family == "stable-diffusion-xl-refiner"
    assert (text.num_layers, text.context_layers, text.pooled_dim) == (32, 31, 1280)


def test_the_unet_of_sdxl_alone_takes_a_first_encoder_and_asks_for_the_second(tmp_path):
    tensors = sdxl_checkpoint()
    model = sparse(tmp_path / "unet.safetensors", part(tensors, UNET))
    vae = sparse(tmp_path / "vae.safetensors", part(tensors, VAE))
    file = sparse(tmp_path / "clip.safetensors", of_clip(768, 12))

    with open_model(model, vae=vae) as opened, pytest.raises(UnknownModelError) as without:
        detect(opened.tensors)
    with (
        open_model(model, vae=vae, text_encoder=file) as opened,
        pytest.raises(WeightsError, match=r"text_encoder_2 .*give it by --text-encoder-2"),
    ):
        detect(opened.tensors)

    assert "by --text-encoder and --text-encoder-2. Found" in str(without.value)


@pytest.fixture(scope="module")
def pair():
    """The tensors of two small models of Stable Diffusion 2."""
    return state_dict(SD_2), state_dict(SD_2, seed=1)


def as_sgm(tensors):
    return {name.replace(ONLY, FIRST): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("names", ["transformers", "of a checkpoint", "of one like it"])
@pytest.mark.parametrize(("layout", "place"), [(dict, ONLY), (as_sgm, FIRST)])
def test_a_given_encoder_takes_the_place_of_openclips(pair, tmp_path, names, layout, place):
    mine, other = pair
    given = {
        "transformers": of_transformers(other, ONLY),
        "of a checkpoint": other,
        "of one like it": as_sgm(other),
    }[names]
    model = written(tmp_path / "model.safetensors", layout(mine))
    file = written(tmp_path / "text.safetensors", given)

    with open_model(model, text_encoder=file) as opened:
        assert_holds(
            opened, {name.replace(ONLY, place): each for name, each in other.items()}, place
        )
        assert_holds(opened, mine, UNET)
        spec = detect(opened.tensors, stated=opened.stated).spec

    text = spec.networks["text_encoder"]
    assert spec.family.startswith("stable-diffusion-2")
    # No width tells of how many layers these are; transformers' names are those of folders.
    assert text.context_layers == (3 if names == "transformers" else 2)


@pytest.mark.parametrize("ending", [".weight", ".weight.weight"])
def test_a_projection_spelt_as_a_linear_layer_is_transposed(tmp_path, ending):
    matrix = torch.arange(15.0).reshape(3, 5)
    path = tmp_path / "model.safetensors"
    save_file({PROJECTION + ending: matrix}, path)

    with open_model(path) as opened:
        assert opened.tensors.keys() == {PROJECTION}
        np.testing.assert_array_equal(opened.tensors[PROJECTION].numpy(), matrix.T)


@pytest.mark.parametrize("ending", [".weight", ".weight.weight"])
@pytest.mark.parametrize("tensors", [sdxl_checkpoint(), sdxl_checkpoint(REFINER)])
def test_sdxl_with_a_projection_spelt_as_a_linear_layer_is_exported(tensors, ending):
    (name,) = (each for each in tensors if each.endswith("text_projection"))
    spelt = {key + ending if key == name else key: each for key, each in tensors.items()}

    found = detect(with_open_clip_projections(spelt)).spec

    assert found == detect(tensors).spec


def test_a_projection_under_two_names_is_not_lost():
    both = {
        PROJECTION: with_values(np.eye(2)),
        f"{PROJECTION}.weight": with_values(np.ones((2, 2))),
    }

    assert with_open_clip_projections(both) == both


def test_a_second_encoder_of_a_checkpoint_is_transposed_likewise(tmp_path):
    matrix = torch.arange(15.0).reshape(3, 5)
    unet = {f"{UNET}input_blocks.0.0.weight": torch.ones(4, 4, 3, 3)}
    model = written(tmp_path / "model.safetensors", unet)
    file = written(tmp_path / "second.safetensors", {f"{PROJECTION}.weight": matrix})

    with open_model(model, text_encoder_2=file) as opened:
        np.testing.assert_array_equal(opened.tensors[PROJECTION].numpy(), matrix.T)
