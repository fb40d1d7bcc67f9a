"""A packed model, whatever its weights, is what the exporter recognises from file and YAML."""

import pytest
import torch

from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.detection.compvis_config import read_config
from ldm_export.detection.detect import detect
from ldm_export.networks.bert import BertTextEncoder
from models.shapes.catalog.models import MODELS
from models.shapes.training.checkpoint_writer import (
    averaged_state,
    compvis_state,
    schedule_buffers,
    write_checkpoint,
)
from models.shapes.training.config_writer import params_of, write_model_config
from models.shapes.training.packing import MOST_BYTES, config_of
from models.shapes.training.task_model import TaskModel
from models.shapes.training.unpacking import unpack
from models.shapes.training.velocity import alphas_cumprod
from models.shapes.training.vq import Autoencoder, halves_of

ALL = list(MODELS.values())
NAMES = list(MODELS)


def write_untrained(folder, model):
    torch.manual_seed(0)
    network = TaskModel(model)
    conditioner = {} if network.conditioner is None else network.conditioner.state_dict()
    if model.encoder is not None:
        conditioner = BertTextEncoder(model.encoder).state_dict()
    autoencoder = halves_of(Autoencoder(model.autoencoder.spec))
    state = averaged_state(autoencoder, conditioner, network.unet.state_dict())
    state |= schedule_buffers(alphas_cumprod(model.noise))
    state["scale_factor"] = torch.tensor(0.625)
    path = folder / f"{model.name}.ckpt"
    write_checkpoint(path, state, 7)
    write_model_config(folder / f"{model.name}.yaml", config_of(model))
    return path


@pytest.mark.parametrize("model", ALL, ids=NAMES)
def test_the_exporter_reads_back_what_was_packed(model, tmp_path):
    path = write_untrained(tmp_path, model)

    with open_checkpoint(path) as checkpoint:
        config = read_config(path.with_suffix(".yaml"))
        spec = detect(checkpoint.tensors, config=config).spec

    assert spec.task == model.task
    assert spec.unet == model.unet
    assert spec.networks.get("text_encoder") == model.encoder
    assert spec.networks.get("class_embedder") == model.embedder
    assert spec.networks.get("segmentation_encoder") == model.segmentation_encoder
    assert spec.prediction_type == "v_prediction"
    assert spec.autoencoder.latent_scale_factor == 0.625
    assert spec.autoencoder.codebook_size == model.autoencoder.spec.codebook_size
    assert spec.autoencoder.middle_attention == model.autoencoder.spec.middle_attention
    assert (spec.defaults.height, spec.defaults.width) == (64, 64)


@pytest.mark.parametrize("model", ALL, ids=NAMES)
def test_a_model_is_small_enough_to_come_along(model, tmp_path):
    assert write_untrained(tmp_path, model).stat().st_size <= MOST_BYTES


@pytest.mark.parametrize(
    ("name", "conditioner"),
    [
        ("unconditional", "__is_unconditional__"),
        ("inpainting", "__is_first_stage__"),
        ("super_resolution", {"target": "torch.nn.Identity"}),
    ],
)
def test_conditioners_without_weights_are_called_as_in_the_released_models(name, conditioner):
    params = params_of(config_of(MODELS[name]))

    assert params["cond_stage_config"] == conditioner
    assert params.get("concat_mode", False) == (name != "unconditional")
    assert "conditioning_key" not in params


def test_the_last_class_is_said_to_be_none():
    params = params_of(config_of(MODELS["class_to_image"]))

    assert params["cond_stage_config"]["params"]["n_classes"] == 25
    assert params["cond_stage_config"]["params"]["ucg_rate"] > 0
    assert params["conditioning_key"] == "crossattn"


def test_only_the_autoencoder_of_inpainting_says_that_it_has_no_attention():
    kinds = {
        name: params_of(config_of(model))["first_stage_config"]["params"]["ddconfig"].get(
            "attn_type"
        )
        for name, model in MODELS.items()
    }

    assert {name for name, kind in kinds.items() if kind == "none"} == {"inpainting"}


def test_both_sets_of_weights_keep_their_names():
    weight = torch.ones(2, dtype=torch.float64)

    state = compvis_state(
        {"quant_conv.bias": weight}, {"a.b": weight}, {"c.d": weight}, {"c.d": 2 * weight}
    )

    assert {name: value.tolist() for name, value in state.items()} == {
        "model.diffusion_model.c.d": [1, 1],
        "model_ema.diffusion_modelcd": [2, 2],
        "first_stage_model.quant_conv.bias": [1, 1],
        "cond_stage_model.transformer.a.b": [1, 1],
    }
    assert {value.dtype for value in state.values()} == {torch.float16}


@pytest.mark.parametrize("model", ALL, ids=NAMES)
def test_training_goes_on_from_what_was_packed(model, tmp_path):
    packed = torch.load(write_untrained(tmp_path, model), weights_only=True)["state_dict"]

    step = unpack(model, folder=tmp_path, work=tmp_path / "work")

    state = torch.load(tmp_path / "work" / f"{model.name}.pt", weights_only=True)
    assert step == state["step"] == 7
    TaskModel(model).load_state_dict(state["ema"])
    for name, value in packed.items():
        if name.startswith("model.diffusion_model."):
            kept = state["ema"]["unet." + name.removeprefix("model.diffusion_model.")]
            torch.testing.assert_close(kept, value.float(), rtol=0, atol=0)


def test_an_autoencoder_that_is_there_is_not_overwritten(tmp_path):
    model = MODELS["super_resolution"]
    write_untrained(tmp_path, model)
    unpack(model, folder=tmp_path, work=tmp_path / "work")
    path = tmp_path / "work" / f"{model.autoencoder.run}.pt"
    autoencoder = Autoencoder(model.autoencoder.spec)
    state = torch.load(path, weights_only=True)
    autoencoder.load_state_dict(state["ema"])
    assert (autoencoder.codes.total == autoencoder.codebook).all()
    path.write_bytes(b"kept")

    unpack(model, folder=tmp_path, work=tmp_path / "work")

    assert path.read_bytes() == b"kept"
