"""The layers that adapters name against diffusers' UNets and transformers' text encoders."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from ldm_export.intake.unet_names import UNET_PREFIX, unet_names
from ldm_runtime.adapters.names import adapter_targets
from released.compvis_files import compvis_config
from tests.reference import small_families
from tests.reference.distilled_unets import DISTILLED, full_size_unet
from tests.reference.small_families import state_dict
from tests.reference.twins import load_text_encoder, load_unet

pytestmark = pytest.mark.reference

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
RELEASED = {"sd-1.5": {"cross_attention_dim": 768}, "sdxl": SDXL}
#: Of every kind of layer the number in the UNet: of transformers, of LoCon, and at both ends.
COUNTS = {"sd-1.5": 192 + 86 + 4, "sdxl": 722 + 66 + 6}
FAMILIES = (
    *("SD_1", "SD_1_INPAINTING", "INSTRUCT_PIX2PIX", "SD_2", "SD_2_INPAINTING"),
    *("X4_UPSCALER", "UNCLIP_H", "SDXL", "SDXL_REFINER", "SDXL_INPAINTING"),
)


def flat(name):
    return name.removesuffix(".weight").replace(".", "_")


def modules_with_weight(network):
    return [name for name in network.state_dict() if name.endswith(".weight")]


def released_unet(name):
    with torch.device("meta"):
        return UNet2DConditionModel(**RELEASED[name])


@pytest.mark.parametrize("name", [*RELEASED, *DISTILLED])
def test_every_module_of_a_unet_is_found_by_its_name_in_diffusers(name):
    unet = released_unet(name) if name in RELEASED else full_size_unet(DISTILLED[name])
    stored = {
        each: new.removeprefix(UNET_PREFIX) for each, new in unet_names(unet.state_dict()).items()
    }

    targets = adapter_targets({"unet": stored.values()})

    names = modules_with_weight(unet)
    found = {each: targets["unet", flat(each)].parameter for each in names}
    assert found == {each: stored[each].removesuffix(".weight") for each in names}
    assert {key for _, key in targets} == {
        *map(flat, names),
        *(flat(stored[each]) for each in names),
        # Embeddings of sizes have the place that those of classes have.
        *(flat(each).replace("add_emb", "class_emb") for each in names),
    }


@pytest.mark.parametrize("name", RELEASED)
def test_kohyas_names_of_all_linear_layers_and_convolutions_are_found(name):
    unet = released_unet(name)
    stored = [each.removeprefix(UNET_PREFIX) for each in unet_names(unet.state_dict()).values()]
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = [each for each, module in unet.named_modules() if isinstance(module, kinds)]

    targets = adapter_targets({"unet": stored})

    assert len({targets["unet", flat(each)] for each in layers}) == len(layers)
    # Downsamplers and upsamplers are counted with the convolutions.
    assert len(layers) == COUNTS[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_unet_that_diffusers_loads_has_the_weights_of_the_modules(family):
    family = getattr(small_families, family)
    state = state_dict(family)
    theirs = load_unet(state, compvis_config(family.unet, family.autoencoder)).state_dict()
    ours = {
        name.removeprefix(UNET_PREFIX): value
        for name, value in state.items()
        if name.startswith(UNET_PREFIX)
    }

    targets = adapter_targets({"unet": ours})

    for name in (each for each in theirs if each.endswith(".weight")):
        parameter = targets["unet", flat(name)].parameter
        assert torch.equal(ours[f"{parameter}.weight"], theirs[name]), name


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("SD_1", "cond_stage_model.transformer."),
        ("SD_2", "cond_stage_model.model."),
    ],
)
def test_a_small_text_encoder_that_transformers_loads_has_the_weights(family, prefix, tmp_path):
    family = getattr(small_families, family)
    state = state_dict(family)
    spec = family.text_encoders[prefix]
    theirs = load_text_encoder(state, spec, tmp_path, CLIPTextModel).state_dict()
    ours = {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }

    targets = adapter_targets({"text_encoder": ours})

    names = [each for each in theirs if each.endswith(".weight") and "position" not in each]
    for name in names:
        target = targets["text_encoder", flat(f"text_model.{name.removeprefix('text_model.')}")]
        if target.part is None:
            weight = ours[f"{target.parameter}.weight"]
        else:
            weight = ours[target.parameter].chunk(3)[target.part]
        np.testing.assert_array_equal(weight, theirs[name], err_msg=name)
