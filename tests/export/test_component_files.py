"""Autoencoders and text encoders from files of their own, in place of a checkpoint's or added.

Every file holds values that no other holds, so that it shows where a tensor came from.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.checkpoint.file_fields import FileFields
from ldm_export.cli import main, say_sources
from ldm_export.detection.detect import detect
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import CheckpointError
from ldm_export.intake.opening import open_model
from ldm_export.source import (
    ExportOptions,
    build_record,
    checkpoint_sha256,
    open_checkpoint_of,
    open_source,
)
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.testing import write_tiny_bundle
from tests.export.small_checkpoint import random_networks, state_dict
from tests.reference.small_families import SDXL
from tests.reference.small_families import state_dict as sdxl_state_dict

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = "cond_stage_model.transformer.text_model."
SECOND = "conditioner.embedders.1."


@pytest.fixture(scope="module")
def other():
    """Tensors of another model of the same sizes."""
    return state_dict(random_networks(seed=1))


def part(tensors, prefix, new_prefix=""):
    """Return the tensors whose names begin with `prefix`, with another beginning."""
    return {
        new_prefix + name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def written(path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def assert_holds(checkpoint, tensors, prefix):
    """Assert that the tensors after `prefix` are those of `tensors`, all of them and no other."""
    expected = part(tensors, prefix, prefix)
    assert {name for name in checkpoint.tensors if name.startswith(prefix)} == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].numpy(), tensor.numpy())


@pytest.mark.parametrize("prefix", ["", VAE])
def test_an_autoencoder_takes_the_place_of_the_checkpoints(
    small_checkpoint_path, other, tmp_path, prefix
):
    training_only = {
        f"{prefix}loss.logvar": torch.ones(1),
        f"{prefix}loss.disc.0.bias": torch.ones(2),
    }
    file = written(tmp_path / "vae.safetensors", part(other, VAE, prefix) | training_only)
    mine = torch.load(small_checkpoint_path, weights_only=True)["state_dict"]

    with open_model(small_checkpoint_path, vae=file) as checkpoint:
        assert_holds(checkpoint, other, VAE)
        assert_holds(checkpoint, mine, UNET)
        assert_holds(checkpoint, mine, TEXT)
        detect(checkpoint.tensors)


@pytest.mark.parametrize(
    "prefix", ["", "text_model.", TEXT.removesuffix("text_model."), TEXT], ids=len
)
def test_a_text_encoder_takes_the_place_of_the_checkpoints(
    small_checkpoint_path, other, tmp_path, prefix
):
    numbers = {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}
    file = written(tmp_path / "clip.safetensors", part(other, TEXT, prefix) | numbers)
    mine = torch.load(small_checkpoint_path, weights_only=True)["state_dict"]

    with open_model(small_checkpoint_path, text_encoder=file) as checkpoint:
        assert_holds(checkpoint, other, TEXT)
        assert_holds(checkpoint, mine, VAE)
        detect(checkpoint.tensors)


def test_of_a_whole_clip_only_the_text_encoder_is_taken(small_checkpoint_path, other, tmp_path):
    images = {name: torch.ones(2, 2) for name in ("visual_projection.weight", "vision_model.a.b")}
    texts = {"text_projection.weight": torch.ones(2, 2), "logit_scale": torch.ones(1)}
    tensors = part(other, TEXT, "text_model.") | images | texts
    file = written(tmp_path / "clip.safetensors", tensors)

    with open_model(small_checkpoint_path, text_encoder=file) as checkpoint:
        assert_holds(checkpoint, other, "cond_stage_model.")


def test_of_a_whole_checkpoint_the_named_component_is_taken(small_checkpoint_path, other, tmp_path):
    file = written(tmp_path / "other.safetensors", other)
    mine = torch.load(small_checkpoint_path, weights_only=True)["state_dict"]

    with open_model(small_checkpoint_path, vae=file, text_encoder=file) as checkpoint:
        assert_holds(checkpoint, other, VAE)
        assert_holds(checkpoint, other, TEXT)
        assert_holds(checkpoint, mine, UNET)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", UNET])
def test_a_unet_with_both_components_is_a_whole_checkpoint(
    small_checkpoint_path, other, tmp_path, prefix
):
    unet = written(tmp_path / "unet.safetensors", part(other, UNET, prefix))

    with open_model(
        unet, vae=small_checkpoint_path, text_encoder=small_checkpoint_path
    ) as checkpoint:
        assert_holds(checkpoint, other, UNET)
        assert detect(checkpoint.tensors).spec.task == "text-to-image"


def test_the_hash_covers_the_files_of_components(small_checkpoint_path, other, tmp_path):
    vae = written(tmp_path / "vae.safetensors", part(other, VAE))
    text = written(tmp_path / "clip.safetensors", part(other, TEXT))
    hashes = set()

    for files in ({}, {"vae": vae}, {"text_encoder": text}, {"vae": vae, "text_encoder": text}):
        with open_model(small_checkpoint_path, **files) as checkpoint:
            hashes.add(checkpoint_sha256(checkpoint))
    written(vae, {name: each + 1 for name, each in part(other, VAE).items()})
    with open_model(small_checkpoint_path, vae=vae) as checkpoint:
        hashes.add(checkpoint_sha256(checkpoint))

    assert len(hashes) == 5
    assert sha256_of(small_checkpoint_path) in hashes


FAULTS = {
    "a text encoder as autoencoder": ("vae", TEXT, "tensors that are not of a known autoencoder"),
    "an autoencoder as text encoder": ("text_encoder", VAE, "holds no CLIP text encoder"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_of_another_component_is_refused(small_checkpoint_path, other, tmp_path, fault):
    flag, prefix, words = FAULTS[fault]
    file = written(tmp_path / "a.safetensors", part(other, prefix))

    with pytest.raises(CheckpointError, match=words):
        open_model(small_checkpoint_path, **{flag: file})


def test_a_class_embedding_is_not_replaced_by_a_text_encoder(other, tmp_path):
    tensors = part(other, UNET, UNET) | {"cond_stage_model.embedding.weight": torch.ones(10, 64)}
    file = written(tmp_path / "classes.safetensors", tensors)
    text = written(tmp_path / "clip.safetensors", part(other, TEXT))

    with pytest.raises(CheckpointError, match=r"not conditioned by a CLIP .*embedding\.weight"):
        open_model(file, text_encoder=text)


def test_a_missing_file_is_named(small_checkpoint_path, tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: cannot be opened"):
        open_model(small_checkpoint_path, vae=tmp_path / "absent.safetensors")


def test_a_bundle_records_and_says_which_files_its_components_are_from(
    small_checkpoint_path, other, tmp_path, capsys
):
    vae = written(tmp_path / "better.safetensors", part(other, VAE))
    options = ExportOptions(checkpoint=small_checkpoint_path, out=tmp_path / "out", vae=vae)
    tiny = write_tiny_bundle(tmp_path / "tiny")

    with open_checkpoint_of(options) as checkpoint:
        source = open_source(options, checkpoint)
        build = build_record(source, 0.0)
    say_sources(replace(tiny, build=build))

    (record,) = build.components
    assert (record.component, record.file) == ("autoencoder", "better.safetensors")
    assert record.sha256 == sha256_of(vae)
    assert build.checkpoint == small_checkpoint_path.name
    assert build.checkpoint_sha256 == source.sha256 != sha256_of(small_checkpoint_path)
    said = f"took the autoencoder from better.safetensors (sha256 {record.sha256[:12]}...)"
    assert said in capsys.readouterr().err
    assert tiny.build.components == ()


def test_flags_reach_the_export(small_checkpoint_path, tmp_path, capsys):
    missing = str(tmp_path / "absent.safetensors")

    flags = ("--vae", "--text-encoder", "--text-encoder-2", "--tiny-decoder", "--image-normalizer")
    for flag in flags:
        status = main([str(small_checkpoint_path), str(tmp_path / "out"), flag, missing])
        assert status == 1
        assert "absent.safetensors: cannot be opened" in capsys.readouterr().err


def vae_folder(path, tensors, **config):
    """Write an autoencoder as diffusers does, with a configuration."""
    path.mkdir()
    written(path / "diffusion_pytorch_model.safetensors", part(tensors, VAE))
    entries = {"_class_name": "AutoencoderKL", "block_out_channels": [32, 32, 64], **config}
    (path / "config.json").write_text(json.dumps(entries))
    return path


def scale_with(checkpoint, caplog, **flags):
    """Return factor, its source, mean and standard deviation of latents, and the warnings."""
    caplog.clear()
    spec = detect(checkpoint.tensors, stated=checkpoint.stated, overrides=Overrides(**flags)).spec
    field = "autoencoder.latent_scale_factor"
    (source,) = (each.source for each in spec.assumptions if each.field == field)
    used = spec.autoencoder
    return (used.latent_scale_factor, source, used.latents_mean, used.latents_std), caplog.messages


STATISTICS = {"latents_mean": [[[[1.5]], [[2]], [[3]], [[4]]]], "latents_std": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"scaling_factor": 0.13025}, "states the scale factor 0.13025, and the UNet was trained"),
        (STATISTICS, "states no scale factor and statistics of every channel, and"),
        ({"scaling_factor": 0.18215}, None),
        ({}, None),
    ],
)
def test_the_scale_of_the_latents_is_the_unets_whatever_an_autoencoder_in_its_place_states(
    small_checkpoint_path, other, tmp_path, config, words, caplog
):
    vae = vae_folder(tmp_path / "vae", other, **config)

    with open_model(small_checkpoint_path, vae=vae) as checkpoint:
        scale, warnings = scale_with(checkpoint, caplog)
        by_flag, silent = scale_with(checkpoint, caplog, latent_scale_factor=0.3)

    assert scale == (0.18215, "family", (), ())
    assert len(warnings) == (words is not None)
    if words is not None:
        assert words in warnings[0]
        assert "with the scale factor 0.18215, which is used; --latent-scale-fa" in warnings[0]
    assert (by_flag[:2], silent) == ((0.3, "flag"), [])


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"force_upcast": False}, True), ({"force_upcast": True}, False), ({}, False)],
)
def test_an_autoencoder_fits_half_precision_where_its_own_files_say_so(
    small_checkpoint_path, other, tmp_path, config, expected
):
    folder = vae_folder(tmp_path / "vae", other, **config)
    file = folder / "diffusion_pytorch_model.safetensors"

    with (
        open_model(small_checkpoint_path, vae=folder) as by_folder,
        open_model(small_checkpoint_path, vae=file) as by_file,
        open_model(small_checkpoint_path) as without,
    ):
        assert by_folder.stated.vae_fits_fp16 == expected
        assert not by_file.stated.vae_fits_fp16
        assert not without.stated.vae_fits_fp16


def test_what_a_folder_states_of_its_latents_goes_before_what_another_autoencoder_does(
    small_checkpoint_path, other, tmp_path, caplog
):
    theirs = vae_folder(tmp_path / "theirs", other, scaling_factor=0.13025)
    own = FileFields(
        latent_scale_factor=0.5, latents_mean=(0.0, 1.0, 2.0, 3.0), latents_std=(1.0,) * 4
    )

    with open_model(small_checkpoint_path, vae=theirs) as checkpoint:
        of_folder = replace(checkpoint, stated=replace(own, vae_scale=checkpoint.stated.vae_scale))
        scale, (warning,) = scale_with(of_folder, caplog)

    assert scale == (0.5, "file", own.latents_mean, own.latents_std)
    assert "trained with the scale factor 0.5 and statistics of every channel, which" in warning


@pytest.fixture(scope="module")
def two_encoders(tmp_path_factory):
    """A checkpoint of SDXL, small, and the tensors of another."""
    tensors = sdxl_state_dict(SDXL, seed=0)
    path = tmp_path_factory.mktemp("sdxl") / "model.safetensors"
    return written(path, tensors), tensors, sdxl_state_dict(SDXL, seed=1)


def of_transformers(tensors, prefix=f"{SECOND}model."):
    """Return a text encoder of OpenCLIP by the names of transformers, with its projection."""
    inside = part(tensors, prefix)
    renamed = {
        "text_model.embeddings.token_embedding.weight": inside["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": inside["positional_embedding"],
    }
    if "text_projection" in inside:
        renamed["text_projection.weight"] = inside["text_projection"].T
    for name in ("weight", "bias"):
        renamed[f"text_model.final_layer_norm.{name}"] = inside[f"ln_final.{name}"]
    for name, tensor in part(inside, "transformer.resblocks.").items():
        layer, rest = name.split(".", 1)
        stem = f"text_model.encoder.layers.{layer}."
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for which, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{stem}self_attn.{which}_proj.{kind}"] = third
            continue
        for mine, theirs in (
            ("ln_1.", "layer_norm1."),
            ("ln_2.", "layer_norm2."),
            ("attn.out_proj.", "self_attn.out_proj."),
            ("mlp.c_fc.", "mlp.fc1."),
            ("mlp.c_proj.", "mlp.fc2."),
        ):
            if rest.startswith(mine):
                renamed[stem + theirs + rest.removeprefix(mine)] = tensor
    return renamed


@pytest.mark.parametrize("names", ["transformers", "of a whole checkpoint"])
def test_a_second_text_encoder_takes_the_place_of_sdxls(two_encoders, tmp_path, names):
    path, mine, other = two_encoders
    tensors = of_transformers(other) if names == "transformers" else other
    file = written(tmp_path / "second.safetensors", tensors)

    with open_model(path, text_encoder_2=file) as checkpoint:
        assert_holds(checkpoint, other, SECOND)
        assert_holds(checkpoint, mine, "conditioner.embedders.0.")
        assert [each.component for each in checkpoint.components] == ["second text encoder"]
        assert detect(checkpoint.tensors).spec.family == "stable-diffusion-xl"


def test_a_unet_with_both_text_encoders_is_a_whole_checkpoint(two_encoders, tmp_path):
    path, _, other = two_encoders
    unet = written(tmp_path / "unet.safetensors", part(other, UNET))
    file = written(tmp_path / "other.safetensors", other)

    with open_model(unet, vae=path, text_encoder=path, text_encoder_2=file) as checkpoint:
        assert_holds(checkpoint, other, SECOND)
        assert detect(checkpoint.tensors).spec.family == "stable-diffusion-xl"


def test_a_model_with_one_text_encoder_has_no_second_to_replace(
    small_checkpoint_path, two_encoders
):
    with pytest.raises(CheckpointError, match=r"has one text encoder .*give --text-encoder$"):
        open_model(small_checkpoint_path, text_encoder_2=two_encoders[0])


def test_a_single_file_is_opened_as_before(small_checkpoint_path):
    with open_model(small_checkpoint_path) as one, open_checkpoint(small_checkpoint_path) as two:
        assert one.tensors.keys() == two.tensors.keys()
        assert (one.components, checkpoint_sha256(one)) == ((), sha256_of(small_checkpoint_path))
