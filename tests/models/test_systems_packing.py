"""A packed system, whatever its weights, is what the exporter recognises from file and YAML."""

import pytest
import torch

from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.detection.compvis_config import read_config
from ldm_export.detection.detect import detect
from ldm_export.networks.bert import BertTextEncoder
from models.shapes.catalog.systems import SYSTEMS
from models.shapes.training.checkpoint_writer import (
    averaged_state,
    compvis_state,
    schedule_buffers,
    write_checkpoint,
)
from models.shapes.training.config_writer import params_of, write_model_config
from models.shapes.training.packing import MOST_BYTES, config_of
from models.shapes.training.system import SystemModel
from models.shapes.training.unpacking import unpack
from models.shapes.training.velocity import alphas_cumprod
from models.shapes.training.vq import Autoencoder, halves_of

ALL = list(SYSTEMS.values())
NAMES = list(SYSTEMS)


def write_untrained(folder, system):
    torch.manual_seed(0)
    model = SystemModel(system)
    conditioner = {} if model.conditioner is None else model.conditioner.state_dict()
    if system.encoder is not None:
        conditioner = BertTextEncoder(system.encoder).state_dict()
    autoencoder = halves_of(Autoencoder(system.autoencoder.spec))
    state = averaged_state(autoencoder, conditioner, model.unet.state_dict())
    state |= schedule_buffers(alphas_cumprod(system.noise))
    state["scale_factor"] = torch.tensor(0.625)
    path = folder / f"{system.name}.ckpt"
    write_checkpoint(path, state, 7)
    write_model_config(folder / f"{system.name}.yaml", config_of(system))
    return path


@pytest.mark.parametrize("system", ALL, ids=NAMES)
def test_the_exporter_reads_back_what_was_packed(system, tmp_path):
    path = write_untrained(tmp_path, system)

    with open_checkpoint(path) as checkpoint:
        config = read_config(path.with_suffix(".yaml"))
        spec = detect(checkpoint.tensors, config=config).spec

    assert spec.task == system.task
    assert spec.unet == system.unet
    assert spec.networks.get("text_encoder") == system.encoder
    assert spec.networks.get("class_embedder") == system.embedder
    assert spec.networks.get("segmentation_encoder") == system.segmentation_encoder
    assert spec.prediction_type == "v_prediction"
    assert spec.autoencoder.latent_scale_factor == 0.625
    assert spec.autoencoder.codebook_size == system.autoencoder.spec.codebook_size
    assert spec.autoencoder.middle_attention == system.autoencoder.spec.middle_attention
    assert (spec.defaults.height, spec.defaults.width) == (64, 64)


@pytest.mark.parametrize("system", ALL, ids=NAMES)
def test_a_system_is_small_enough_to_come_along(system, tmp_path):
    assert write_untrained(tmp_path, system).stat().st_size <= MOST_BYTES


@pytest.mark.parametrize(
    ("name", "conditioner"),
    [
        ("unconditional", "__is_unconditional__"),
        ("inpainting", "__is_first_stage__"),
        ("super_resolution", {"target": "torch.nn.Identity"}),
    ],
)
def test_conditioners_without_weights_are_called_as_in_the_released_models(name, conditioner):
    params = params_of(config_of(SYSTEMS[name]))

    assert params["cond_stage_config"] == conditioner
    assert params.get("concat_mode", False) == (name != "unconditional")
    assert "conditioning_key" not in params


def test_the_last_class_is_said_to_be_none():
    params = params_of(config_of(SYSTEMS["class_to_image"]))

    assert params["cond_stage_config"]["params"]["n_classes"] == 25
    assert params["cond_stage_config"]["params"]["ucg_rate"] > 0
    assert params["conditioning_key"] == "crossattn"


def test_only_the_first_stage_of_inpainting_says_that_it_has_no_attention():
    kinds = {
        name: params_of(config_of(system))["first_stage_config"]["params"]["ddconfig"].get(
            "attn_type"
        )
        for name, system in SYSTEMS.items()
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


@pytest.mark.parametrize("system", ALL, ids=NAMES)
def test_training_goes_on_from_what_was_packed(system, tmp_path):
    packed = torch.load(write_untrained(tmp_path, system), weights_only=True)["state_dict"]

    step = unpack(system, folder=tmp_path, work=tmp_path / "work")

    state = torch.load(tmp_path / "work" / f"{system.name}.pt", weights_only=True)
    assert step == state["step"] == 7
    SystemModel(system).load_state_dict(state["ema"])
    for name, value in packed.items():
        if name.startswith("model.diffusion_model."):
            kept = state["ema"]["unet." + name.removeprefix("model.diffusion_model.")]
            torch.testing.assert_close(kept, value.float(), rtol=0, atol=0)


def test_a_first_stage_that_is_there_is_not_overwritten(tmp_path):
    system = SYSTEMS["super_resolution"]
    write_untrained(tmp_path, system)
    unpack(system, folder=tmp_path, work=tmp_path / "work")
    path = tmp_path / "work" / f"{system.autoencoder.step}.pt"
    model = Autoencoder(system.autoencoder.spec)
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["ema"])
    assert (model.codes.total == model.codebook).all()
    path.write_bytes(b"kept")

    unpack(system, folder=tmp_path, work=tmp_path / "work")

    assert path.read_bytes() == b"kept"
