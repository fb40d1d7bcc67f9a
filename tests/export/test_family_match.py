import re
from dataclasses import replace

import pytest

from ldm_export.detection.fingerprint import fingerprint
from ldm_export.detection.match import match_family, recognise
from ldm_export.errors import UnknownModelError
from ldm_export.families.table import FAMILIES
from tests.export.ldm_layouts import CIN256, TXT2IMG_1P4B
from tests.export.sd_layout import (
    REFINER,
    SD1,
    SD2,
    TINY,
    FakeTensor,
    checkpoint,
    sdxl_checkpoint,
)

CLIP = "cond_stage_model.transformer.text_model."
TOKENS = f"{CLIP}embeddings.token_embedding.weight"


def changed(tensors, *, without=(), **added):
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(without))}
    extra = {name: FakeTensor(shape=shape) for name, shape in added.items()}
    return kept | extra


LABELS = "model.diffusion_model.label_emb"

RECOGNISED = {
    "a latent diffusion model with vector conditioning": changed(
        checkpoint(TINY), **{f"{LABELS}.0.0.weight": (128, 77)}
    ),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_a_family_that_is_not_exported_yet_is_refused_by_name(name):
    tensors = RECOGNISED[name]

    with pytest.raises(
        UnknownModelError, match=f"recognised but not supported yet .*: {re.escape(name)} "
    ):
        match_family(tensors)


@pytest.mark.parametrize("layout", [SD1, TINY, replace(TINY, model_channels=192, context_dim=640)])
def test_stable_diffusion_1_and_its_siblings_are_one_family(layout):
    family, family_defaults = match_family(checkpoint(layout))

    assert family.name == "stable-diffusion-1"
    assert family_defaults is family.family_defaults


def test_the_order_of_the_rows_does_not_matter():
    for tensors in (*RECOGNISED.values(), checkpoint(SD1)):
        found = fingerprint(tensors)

        assert recognise(found, FAMILIES) is recognise(found, FAMILIES[::-1])


def test_an_unknown_checkpoint_is_described_and_compared_with_the_nearest_family():
    tensors = changed(checkpoint(replace(SD1, in_channels=6)), without=["first_stage_model."])

    with pytest.raises(UnknownModelError) as error:
        match_family(tensors)

    message = str(error.value)
    for part in (
        "model_channels 320, in_channels 6, out_channels 4",
        "context_dim 768",
        "conditioner clip",
        "model.* (686)",
        "Nearest family: stable-diffusion-1",
        "conditioning_channels: found 2 (model.diffusion_model.input_blocks.0.0.weight), expected",
        "autoencoder: found none, expected kl (first_stage_model.post_quant_conv.weight)",
    ):
        assert part in message


VAE, TEXT, TEXTS = "first_stage_model.", "cond_stage_model.", "conditioner."
LACKING = {
    "SD 1 without VAE": (
        *(checkpoint(SD1), [VAE]),
        "stable-diffusion-1 without its autoencoder; give it by --vae",
    ),
    "SD 1 without text encoder": (
        *(checkpoint(SD1), [TEXT]),
        r"stable-diffusion-1 without its text encoder \(.*\); give it by --text-encoder",
    ),
    "SD 1 of another size, without text encoder": (
        *(checkpoint(TINY), [TEXT]),
        r"without its text encoder or other .*, of Stable Diffusion, the .* by --text-encoder; or",
    ),
    "the UNet of SD 1": (
        *(checkpoint(SD1), [VAE, TEXT]),
        "stable-diffusion-1 without its autoencoder and its text encoder; give them by --vae and "
        "--text-encoder",
    ),
    "the UNet of SD 1's inpainting model": (
        *(checkpoint(replace(SD1, in_channels=9)), [VAE, TEXT]),
        "stable-diffusion-1-inpainting without its autoencoder and its text encoder; give them",
    ),
    "SD 2 without text encoder": (
        *(checkpoint(SD2), [TEXT]),
        "stable-diffusion-2 without its text encoder; give it by --text-encoder",
    ),
    "SDXL without VAE": (
        *(sdxl_checkpoint(), [VAE]),
        "stable-diffusion-xl without its autoencoder; give it by --vae",
    ),
    "SDXL without its first text encoder": (
        *(sdxl_checkpoint(), [f"{TEXTS}embedders.0."]),
        "stable-diffusion-xl without its text encoder; give it by --text-encoder",
    ),
    "the UNet of SDXL": (
        *(sdxl_checkpoint(), [VAE, TEXTS]),
        "stable-diffusion-xl without its autoencoder, its text encoder and its second text "
        "encoder; give them by --vae, --text-encoder and --text-encoder-2",
    ),
    "the UNet of SDXL's refiner": (
        *(sdxl_checkpoint(REFINER), [VAE, TEXTS]),
        "stable-diffusion-xl-refiner without its autoencoder and its text encoder; give them by "
        "--vae and --text-encoder",
    ),
    "Playground without VAE": (
        *(sdxl_checkpoint() | {"edm_mean": FakeTensor(shape=(1, 4, 1, 1))}, [VAE]),
        "playground-v2.5 without its autoencoder; give it by --vae",
    ),
    "a model of captions without VAE": (
        *(checkpoint(TXT2IMG_1P4B), [VAE]),
        "ldm-txt2img-1p4b without its autoencoder; give it by --vae",
    ),
}


@pytest.mark.parametrize("lacking", LACKING)
def test_what_lacks_a_part_alone_is_told_how_to_give_it(lacking):
    tensors, without, message = LACKING[lacking]

    with pytest.raises(UnknownModelError, match=rf"^this is .*{message}\b") as error:
        match_family(changed(tensors, without=without))

    assert "not supported" not in str(error.value)


def test_the_unet_of_a_class_model_is_not_taken_for_stable_diffusion():
    """No flag gives its class embedding."""
    tensors = changed(checkpoint(CIN256), without=[VAE, TEXT])

    with pytest.raises(
        UnknownModelError,
        match=r"^this is not a checkpoint of a known family\. Found: model_channels 256",
    ):
        match_family(tensors)


def test_a_difference_names_the_tensor_that_shows_it():
    tensors = changed(checkpoint(TINY), **{"control_model.zero_convs.0.0.weight": (1, 1)})

    with pytest.raises(
        UnknownModelError,
        match=r"ControlNet.*extra: found control network \(control_model\.zero_convs\.0",
    ):
        match_family(tensors)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("down_blocks.0.resnets.0.conv1.weight", "layout of diffusers"),
        ("unet.up_blocks.0.resnets.0.conv1.weight", "layout of diffusers"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("unet.down_blocks.0.attn1.to_q.lora_A.weight", "a LoRA"),
        ("input_blocks.0.0.weight", "UNet only"),
        ("decoder.conv_in.weight", "part of an autoencoder .* only"),
        ("text_model.embeddings.token_embedding.weight", "text encoder only"),
        ("string_to_param.*", "textual inversion"),
        ("double_blocks.0.img_attn.qkv.weight", "diffusion transformer"),
    ],
)
def test_files_that_are_no_whole_checkpoint_are_told_apart(name, advice):
    tensors = {name: FakeTensor(shape=(320, 4, 3, 3))}

    with pytest.raises(UnknownModelError, match=advice):
        match_family(tensors)


def test_an_empty_checkpoint_is_of_no_family():
    with pytest.raises(UnknownModelError, match="no UNet, no autoencoder and no text encoder"):
        match_family({})


def test_no_two_rows_have_the_same_name_or_the_same_facts():
    names = [family.name for family in FAMILIES]
    features = [tuple(sorted(family.features.items())) for family in FAMILIES]

    assert len(set(names)) == len(set(features)) == len(FAMILIES)


def test_every_fact_of_every_row_is_one_that_is_looked_for():
    looked_for = fingerprint({}).keys()

    assert all(family.features.keys() <= looked_for for family in FAMILIES)
    assert all(family.usual.keys() <= looked_for for family in FAMILIES)
