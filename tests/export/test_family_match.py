import re
from dataclasses import replace

import pytest

from ldm_export.detection.fingerprint import fingerprint
from ldm_export.detection.match import match_family, recognise
from ldm_export.errors import UnknownModelError
from ldm_export.families.table import FAMILIES
from tests.export.sd_layout import SD1, TINY, FakeTensor, checkpoint

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
    tensors = changed(checkpoint(SD1), without=["first_stage_model."])

    with pytest.raises(UnknownModelError) as error:
        match_family(tensors)

    message = str(error.value)
    for part in (
        "model_channels 320, in_channels 4, out_channels 4",
        "context_dim 768",
        "conditioner clip",
        "model.* (686)",
        "Nearest family: stable-diffusion-1",
        "autoencoder: found none, expected kl (first_stage_model.post_quant_conv.weight)",
    ):
        assert part in message


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
