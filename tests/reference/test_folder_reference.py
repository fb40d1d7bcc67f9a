"""Folders that diffusers writes, read here and compared with diffusers' own modules.

The pipelines are random in every layer. Outputs of the two sides differ by the rounding of float32.
"""

import json
import shutil

import diffusers.loaders.single_file_utils as single_file
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.detection.chosen_config import chosen_config
from ldm_export.detection.detect import Overrides, detect
from ldm_export.errors import CheckpointError
from ldm_export.intake.autoencoder_names import autoencoder_names
from ldm_export.intake.component import open_component
from ldm_export.intake.folder import text_encoder_of
from ldm_export.intake.opening import open_model
from ldm_export.intake.text_encoder_names import openclip_tensors, plain_names
from ldm_export.intake.unet_names import unet_names
from ldm_export.networks.loading import load_network
from ldm_export.networks.openclip import OpenClipTextEncoder
from ldm_export.source import checkpoint_sha256
from ldm_runtime.cli import main
from ldm_runtime.testing import text_encoder_spec
from tests.export import sd_layout
from tests.export.sd_layout import FakeTensor
from tests.reference.diffusers_folder import (
    AUTOENCODER,
    SCHEDULER,
    TEXT_ENCODER,
    UNET,
    edit_json,
    randomised,
)

pytestmark = pytest.mark.reference

#: Shapes at the top and in the last block of OpenCLIP's bigG in single files.
OPENCLIP_BLOCK = {
    "positional_embedding": (77, 1280),
    "token_embedding.weight": (49408, 1280),
    "ln_final.weight": (1280,),
    "ln_final.bias": (1280,),
    "text_projection": (1280, 1280),
    "transformer.resblocks.31.ln_1.weight": (1280,),
    "transformer.resblocks.31.ln_1.bias": (1280,),
    "transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
    "transformer.resblocks.31.attn.in_proj_bias": (3840,),
    "transformer.resblocks.31.attn.out_proj.weight": (1280, 1280),
    "transformer.resblocks.31.attn.out_proj.bias": (1280,),
    "transformer.resblocks.31.ln_2.weight": (1280,),
    "transformer.resblocks.31.ln_2.bias": (1280,),
    "transformer.resblocks.31.mlp.c_fc.weight": (5120, 1280),
    "transformer.resblocks.31.mlp.c_fc.bias": (5120,),
    "transformer.resblocks.31.mlp.c_proj.weight": (1280, 5120),
    "transformer.resblocks.31.mlp.c_proj.bias": (1280,),
}
TOLERANCE = 1e-5  # of the largest value
SD = {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8}
SD1 = {**SD, "cross_attention_dim": 768}
SD2 = {**SD, "cross_attention_dim": 1024, "use_linear_projection": True}
XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {
    "stable diffusion 1": SD1,
    "inpainting": {**SD1, "in_channels": 9},
    "stable diffusion 2": SD2,
    "unclip": {
        **SD2,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2048,
    },
    "x4 upscaler": {**SD2, "num_class_embeds": 1000, "in_channels": 7},
    "xl": XL,
    "refiner": {
        **XL,
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        "attention_head_dim": (6, 12, 24, 24),
        "transformer_layers_per_block": 4,
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
    },
    "bk-sdm small": {**SD1, "layers_per_block": 1, "mid_block_type": None},
    "bk-sdm tiny": {
        **SD1,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 1,
        "mid_block_type": None,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
}


def detected(checkpoint, overrides=None):
    return detect(checkpoint.tensors, stated=checkpoint.stated, overrides=overrides)


def source_of(field, spec):
    """Return who stated a feature of a model."""
    return next(each.source for each in spec.assumptions if each.field == field)


def network(name, checkpoint):
    """Our network of a component, filled from a checkpoint."""
    found = detected(checkpoint)
    weights = {
        parameter: checkpoint.tensors[stored] for parameter, stored in found.weights[name].items()
    }
    return load_network(name, found.spec, weights)


def assert_same(ours, theirs):
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def assert_same_model(checkpoint, pipeline):
    """Assert that all four networks of ours compute what diffusers' do."""
    torch.manual_seed(5)
    latents, image = torch.randn(2, 4, 8, 8), torch.rand(1, 3, 32, 32) * 2 - 1
    tokens, context = torch.randint(0, 49408, (1, 77)), torch.randn(2, 77, 64)
    times = torch.tensor([3.0, 981.0])
    encoded = pipeline.vae.encode(image).latent_dist.parameters
    with torch.no_grad():
        assert_same(
            network("unet", checkpoint)(latents, times, context),
            pipeline.unet(latents, times, context).sample,
        )
        assert_same(
            network("vae_decoder", checkpoint)(latents), pipeline.vae.decode(latents).sample
        )
        assert_same(network("vae_encoder", checkpoint)(image), encoded)
        assert_same(
            network("text_encoder", checkpoint)(tokens),
            pipeline.text_encoder(tokens).last_hidden_state,
        )


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"safe_serialization": False},
        {"variant": "fp16"},
        {"max_shard_size": "200KB"},
        {"max_shard_size": "200KB", "variant": "fp16"},
    ],
    ids=["safetensors", "pickles", "a variant", "parts", "parts of a variant"],
)
def test_a_saved_folder_computes_what_its_pipeline_does(other_pipeline, tmp_path, how):
    other_pipeline.save_pretrained(tmp_path, **how)
    parts = len(list((tmp_path / "unet").glob("*-of-*")))

    with open_model(tmp_path) as checkpoint:
        assert checkpoint.format == "diffusers"
        assert_same_model(checkpoint, other_pipeline)

    assert (parts > 1) == ("max_shard_size" in how)


def test_the_folder_of_a_checkpoint_holds_its_tensors_under_its_names(
    pipeline, small_checkpoint_path, tmp_path
):
    pipeline.save_pretrained(tmp_path)

    with open_model(tmp_path) as folder, open_checkpoint(small_checkpoint_path) as file:
        schedule = {"betas", "alphas_cumprod"}
        assert folder.tensors.keys() == file.tensors.keys() - schedule
        for name, tensor in folder.tensors.items():
            stored = file.tensors[name].numpy()
            # diffusers stores the autoencoder's 1x1 convolutions as matrices.
            np.testing.assert_array_equal(tensor.numpy().reshape(stored.shape), stored)
        of_folder, of_file = detected(folder).spec, detected(file).spec

    assert of_folder.networks["unet"] == of_file.networks["unet"]
    assert of_folder.networks["text_encoder"] == of_file.networks["text_encoder"]
    np.testing.assert_allclose(of_folder.alphas_cumprod, of_file.alphas_cumprod, rtol=1e-6)


def test_weights_without_a_variants_name_go_before_those_of_half_precision(folder, saved_folder):
    for weights in saved_folder.glob("*/*.safetensors"):
        variant = folder / weights.parent.name / f"{weights.stem}.fp16.safetensors"
        save_file({name: each.half() for name, each in load_file(weights).items()}, variant)

    with open_model(folder) as checkpoint:
        assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"float32"}

    for weights in saved_folder.glob("*/*.safetensors"):
        (folder / weights.parent.name / weights.name).unlink()
    with open_model(folder) as checkpoint:
        assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"float16"}

    # Its numbers have 11 significant bits, those of bfloat16 8.
    for weights in saved_folder.glob("*/*.safetensors"):
        variant = folder / weights.parent.name / f"{weights.stem}.bf16.safetensors"
        save_file({name: each.bfloat16() for name, each in load_file(weights).items()}, variant)
    with open_model(folder) as checkpoint:
        assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"float16"}


def test_attention_named_as_in_diffusers_before_0_17_is_the_same(folder, saved_folder):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, tensor in load_file(path).items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        renamed[name] = tensor
    path.unlink()
    save_file(renamed, path)

    with open_model(folder) as changed, open_model(saved_folder) as checkpoint:
        assert any(".query." in name for name in renamed)
        assert changed.tensors.keys() == checkpoint.tensors.keys()


@pytest.mark.parametrize("kind", UNETS)
def test_names_of_a_unet_of_full_size_are_those_that_diffusers_converts_from(kind):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[kind])
    names = unet_names(unet.state_dict())

    back = single_file.convert_ldm_unet_checkpoint(
        {ours: theirs for theirs, ours in names.items()}, dict(unet.config)
    )

    assert None not in names.values()
    assert back == {name: name for name in names}


@pytest.mark.parametrize("attention", [True, False])
def test_names_of_an_autoencoder_of_full_size_are_those_that_diffusers_converts_from(attention):
    with torch.device("meta"):
        autoencoder = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            mid_block_add_attention=attention,
        )
    state = autoencoder.state_dict()
    names = autoencoder_names(state)

    back = single_file.convert_ldm_vae_checkpoint(
        {ours: state[theirs] for theirs, ours in names.items()}, dict(autoencoder.config)
    )

    assert back.keys() == state.keys()
    assert all(back[name] is state[name] for name in state)


def test_an_openclip_text_encoder_is_the_one_that_diffusers_converts_from(tmp_path):
    config = CLIPTextConfig(**{**TEXT_ENCODER, "projection_dim": 64, "hidden_act": "gelu"})
    model = randomised(CLIPTextModelWithProjection(config))
    model.save_pretrained(tmp_path)
    place = "conditioner.embedders.1."

    tensors, fields = text_encoder_of(open_component(tmp_path), place)
    ours = {name: torch.from_numpy(each.numpy().copy()) for name, each in tensors.items()}
    back = single_file.convert_open_clip_checkpoint(model, ours, prefix=f"{place}model.")

    state = model.state_dict()
    assert fields == {"text_layers_trimmed": True, "text_num_heads": 2, "text_activation": "gelu"}
    assert {name: each.shape for name, each in tensors.items()} == {
        name: tuple(each.shape) for name, each in ours.items()
    }
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def plain_shapes(model_class, *, width, layers, **config):
    """The tensors of an OpenCLIP text encoder in transformers' names, without their values."""
    with torch.device("meta"):
        model = model_class(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                projection_dim=width,
                hidden_act="gelu",
                **config,
            )
        )
    stored = {
        name: FakeTensor(shape=tuple(each.shape)) for name, each in model.state_dict().items()
    }
    return {name: stored[old] for old, name in plain_names(stored).items()}


def test_an_openclip_text_encoder_of_full_size_has_the_names_and_shapes_of_a_single_file():
    plain = plain_shapes(CLIPTextModelWithProjection, width=1280, layers=32, num_attention_heads=20)
    tensors, unknown = openclip_tensors(plain, "")

    block = "transformer.resblocks.31."
    assert unknown == []
    assert len(tensors) == 5 + 32 * 12
    assert {name: tensors[name].shape for name in OPENCLIP_BLOCK} == OPENCLIP_BLOCK
    assert {name for name in tensors if name.startswith(block)} == {
        name for name in OPENCLIP_BLOCK if name.startswith(block)
    }


def test_a_projection_that_diffusers_converted_gives_the_pooled_prompt_of_transformers(tmp_path):
    config = CLIPTextConfig(
        **{**TEXT_ENCODER, "projection_dim": 64, "hidden_act": "gelu", "eos_token_id": 49407}
    )
    theirs, prefix = (
        randomised(CLIPTextModelWithProjection(config)),
        "conditioner.embedders.1.model.",
    )
    theirs.save_pretrained(tmp_path)
    tensors, _ = text_encoder_of(open_component(tmp_path), prefix.removesuffix("model."))
    file = {name: torch.from_numpy(each.numpy().copy()) for name, each in tensors.items()}
    # Its converter of SDXL has renamed the rest, and left this as it was.
    del file[f"{prefix}text_projection"]
    file[f"{prefix}text_projection.weight"] = theirs.text_projection.weight
    save_file(file, tmp_path / "single.safetensors")
    spec = text_encoder_spec(
        kind="openclip",
        width=64,
        num_layers=2,
        context_layers=1,
        num_heads=2,
        feed_forward_dim=128,
        activation="gelu",
        pooled_dim=64,
    )
    tokens = torch.tensor([[49406, *range(100, 174), 49407, 49407]])

    with open_model(tmp_path / "single.safetensors") as checkpoint:
        ours = OpenClipTextEncoder(spec)
        ours.load_state_dict(
            {
                name.removeprefix(prefix): torch.from_numpy(each.numpy().copy())
                for name, each in checkpoint.tensors.items()
            }
        )
    with torch.no_grad():
        _, pooled = ours(tokens)

        assert_same(pooled, theirs(tokens).text_embeds)


def test_a_file_of_a_folder_of_stable_diffusion_2_reads_all_the_layers_of_its_pipeline():
    """The folder's configuration has 23 layers; its pipeline takes the output of the last."""
    plain = plain_shapes(CLIPTextModel, width=1024, layers=(layers := 23), num_attention_heads=16)
    place = "cond_stage_model.model."
    whole = sd_layout.checkpoint(sd_layout.SD2)
    rest = {name: each for name, each in whole.items() if not name.startswith(place)}

    tensors, _ = openclip_tensors(plain, place)
    text = detect({**rest, **tensors}).spec.networks["text_encoder"]

    assert text.context_layers == text.num_layers == layers


@pytest.mark.parametrize("change", ["missing", "another width", "another type"])
def test_projections_that_do_not_go_together_are_named(tmp_path, change):
    config = CLIPTextConfig(**{**TEXT_ENCODER, "hidden_act": "gelu"})
    randomised(CLIPTextModel(config)).save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "encoder.layers.1.self_attn.k_proj.weight"
    tensors = load_file(path)
    key = tensors.pop(name)
    changed = {"another width": {name: key[:, :32].clone()}, "another type": {name: key.half()}}
    save_file(tensors | changed.get(change, {}), path)

    with pytest.raises(
        CheckpointError, match=r"not of a known text encoder .*layers\.1\.self_attn"
    ):
        text_encoder_of(open_component(tmp_path), "cond_stage_model.")


def test_names_of_two_text_encoders_are_those_of_stable_diffusion_xl(folder, tmp_path):
    two_text_encoders(folder)

    with open_model(folder) as checkpoint:
        names = checkpoint.tensors.keys()

    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    assert f"{first}text_model.embeddings.token_embedding.weight" in names
    assert f"{second}transformer.resblocks.1.attn.in_proj_weight" in names
    assert not any(name.startswith("cond_stage_model.") for name in names)
    assert not checkpoint.stated.text_layers_trimmed


def test_a_second_text_encoder_alone_is_in_the_place_of_the_refiners(folder):
    two_text_encoders(folder)
    edit_json(folder / "model_index.json", text_encoder=[None, None])

    with open_model(folder) as checkpoint:
        names = checkpoint.tensors.keys()

    assert "conditioner.embedders.0.model.text_projection" in names
    assert not any(name.startswith("conditioner.embedders.1.") for name in names)


def test_an_openclip_text_encoder_alone_is_in_the_place_of_stable_diffusion_2s(folder):
    config = CLIPTextConfig(**{**TEXT_ENCODER, "hidden_act": "gelu"})
    randomised(CLIPTextModel(config)).save_pretrained(folder / "text_encoder")

    with open_model(folder) as checkpoint:
        names = checkpoint.tensors.keys()

    assert "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias" in names
    assert "cond_stage_model.model.ln_final.weight" in names
    assert not any(name.startswith("cond_stage_model.transformer.") for name in names)
    assert checkpoint.stated.text_layers_trimmed


def test_components_of_a_folder_are_a_whole_checkpoint_when_each_is_given(saved_folder):
    unet = saved_folder / "unet/diffusion_pytorch_model.safetensors"
    vae = saved_folder / "vae/diffusion_pytorch_model.safetensors"

    with (
        open_model(saved_folder) as whole,
        open_model(unet, vae=vae, text_encoder=saved_folder / "text_encoder") as parts,
    ):
        assert parts.tensors.keys() == whole.tensors.keys()
        for name, tensor in parts.tensors.items():
            np.testing.assert_array_equal(tensor.numpy(), whole.tensors[name].numpy())
        assert parts.stated.text_activation == "quick_gelu"


def test_components_of_a_folder_are_replaced_by_those_of_another(folder, pipeline, tmp_path):
    other = tmp_path / "other"
    pipeline.save_pretrained(other)
    for weights in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        (folder / weights).unlink()
    edit_json(folder / "model_index.json", text_encoder=["transformers", "Unknown"])

    with (
        open_model(other) as expected,
        open_model(folder, vae=other, text_encoder=other / "text_encoder") as checkpoint,
    ):
        for name, tensor in expected.tensors.items():
            if not name.startswith("model.diffusion_model."):
                assert np.array_equal(checkpoint.tensors[name].numpy(), tensor.numpy())
        spec = detected(checkpoint).spec
        of_other = pipeline.text_encoder.config.num_attention_heads

    assert spec.networks["text_encoder"].num_heads == of_other
    assert (spec.defaults.height, spec.defaults.width) == (32, 32)


def test_a_single_file_in_the_place_of_an_autoencoder_keeps_what_the_folder_states(
    folder, saved_folder
):
    file = saved_folder / "vae/diffusion_pytorch_model.safetensors"

    with open_model(folder, vae=file) as checkpoint:
        stated = checkpoint.stated

    assert stated.latent_scale_factor == AUTOENCODER["scaling_factor"]
    assert (stated.height, stated.width) == (32, 32)


def test_a_folder_in_the_place_of_an_autoencoder_keeps_what_the_model_states(folder, tmp_path):
    other = shutil.copytree(folder / "vae", tmp_path / "vae")
    edit_json(other / "config.json", scaling_factor=0.75)
    edit_json(folder / "vae/config.json", force_upcast=False)

    with open_model(folder) as own, open_model(folder, vae=other) as checkpoint:
        spec = detected(checkpoint).spec

    assert (own.stated.vae_fits_fp16, checkpoint.stated.vae_fits_fp16) == (True, False)
    assert spec.autoencoder.latent_scale_factor == AUTOENCODER["scaling_factor"]


def two_text_encoders(folder):
    """Add the second text encoder of Stable Diffusion XL to a folder."""
    config = CLIPTextConfig(**{**TEXT_ENCODER, "projection_dim": 64, "hidden_act": "gelu"})
    randomised(CLIPTextModelWithProjection(config)).save_pretrained(folder / "text_encoder_2")
    entry = ["transformers", "CLIPTextModelWithProjection"]
    edit_json(folder / "model_index.json", text_encoder_2=entry)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.0009, "beta_end": 0.011},
        {"beta_schedule": "linear", "beta_start": 0.0002, "beta_end": 0.015},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
        {"trained_betas": np.linspace(0.001, 0.02, 100).tolist()},
        {},
    ],
    ids=["scaled_linear", "linear", "cosine", "listed", "defaults"],
)
@pytest.mark.parametrize("scheduler", [DDIMScheduler, LCMScheduler])
def test_the_noise_schedule_is_the_schedulers(folder, settings, scheduler):
    theirs = scheduler(**settings)
    theirs.save_pretrained(folder / "scheduler")

    with open_model(folder) as checkpoint:
        spec = detected(checkpoint).spec

    np.testing.assert_allclose(spec.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5)
    assert source_of("alphas_cumprod", spec) == "file"


def test_what_configurations_do_not_say_are_the_defaults_of_their_classes(folder):
    theirs = DDIMScheduler()
    path = folder / "scheduler/scheduler_config.json"
    path.write_text('{"_class_name": "DDIMScheduler"}')

    with open_model(folder) as checkpoint:
        spec = detected(checkpoint).spec

    np.testing.assert_allclose(spec.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5)
    assert spec.prediction_type == theirs.config.prediction_type


def test_a_schedule_down_to_nothing_but_noise_is_the_schedulers(folder):
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    theirs = DDIMScheduler(**SCHEDULER, **zero)
    theirs.save_pretrained(folder / "scheduler")

    with open_model(folder) as checkpoint:
        spec = detected(checkpoint).spec

    assert spec.prediction_type == "v_prediction"
    np.testing.assert_allclose(spec.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert spec.alphas_cumprod[-1] < 1e-6


def test_what_weights_cannot_tell_comes_from_the_folders_configurations(saved_folder):
    with open_model(saved_folder) as checkpoint:
        spec = detected(checkpoint).spec

    assert spec.unet.num_heads == UNET["attention_head_dim"]
    assert spec.autoencoder.latent_scale_factor == AUTOENCODER["scaling_factor"]
    assert spec.networks["text_encoder"].num_heads == TEXT_ENCODER["num_attention_heads"]
    assert (spec.defaults.height, spec.defaults.width) == (32, 32)
    for field in (
        "unet.num_heads",
        "autoencoder.latent_scale_factor",
        "text_encoder.num_heads",
        "text_encoder.activation",
        "prediction_type",
        "defaults.height",
    ):
        assert source_of(field, spec) == "file"


def test_heads_of_one_size_are_read_as_their_channels(folder):
    edit_json(folder / "unet/config.json", attention_head_dim=[2, 4, 6])

    with open_model(folder) as checkpoint:
        spec = detected(checkpoint).spec

    assert (spec.unet.num_heads, spec.unet.num_head_channels) == (None, 16)


def test_a_flag_goes_before_what_the_folder_says(saved_folder):
    flags = Overrides(num_heads=2, prediction_type="v_prediction", latent_scale_factor=0.5)

    with open_model(saved_folder) as checkpoint:
        spec = detected(checkpoint, flags).spec

    assert spec.unet.num_heads == 2
    assert spec.prediction_type == "v_prediction"
    assert spec.autoencoder.latent_scale_factor == 0.5
    assert source_of("unet.num_heads", spec) == "flag"


def test_the_hash_of_a_folder_is_of_every_file_that_was_read(folder):
    with open_model(folder) as checkpoint:
        before = checkpoint_sha256(checkpoint)
        names = set(checkpoint.files)
    assert names >= {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json"}
    hashes = {before}

    for name in sorted(names):
        path = folder / name
        content = path.read_bytes()
        path.unlink()  # it may be a link
        path.write_bytes(content)
        if name.endswith(".json"):
            path.write_bytes(content + b"\n")
        else:
            changed = {each: tensor + 1 for each, tensor in load_file(path).items()}
            save_file(changed, path)
        with open_model(folder) as checkpoint:
            hashes.add(checkpoint_sha256(checkpoint))

    assert len(hashes) == len(names) + 1


def test_inspecting_describes_a_folder_as_it_would_be_exported(saved_folder, capsys):
    assert main(["inspect", "--json", str(saved_folder)]) == 0
    report = json.loads(capsys.readouterr().out)

    assert (report["format"], report["family"]) == ("diffusers", "stable-diffusion-1")
    assert report["unet"]["num_heads"] == UNET["attention_head_dim"]
    assert report["config"] is None


def test_a_configuration_next_to_a_folder_is_not_the_folders(folder):
    (folder.parent / "config.yaml").write_text("model: {params: {linear_start: 0.5}}")

    assert chosen_config(folder) is None
