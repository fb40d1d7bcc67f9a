import pytest

from ldm_runtime.adapters.names import Target, adapter_targets
from ldm_runtime.adapters.spellings import understood


def unet(*modules):
    """The parameters of a UNet with these modules."""
    return {"unet": [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]}


def found(modules, name):
    target = adapter_targets(unet(*modules)).get(("unet", name))
    return target and target.parameter


RESNET = "in_layers.2"
ATTENTION = "transformer_blocks.0.attn1.to_q"
#: Two levels of one ResNet block each, as in a UNet of CompVis; the first has attention.
SMALL = (
    "input_blocks.0.0",
    f"input_blocks.1.0.{RESNET}",
    f"input_blocks.1.1.{ATTENTION}",
    "input_blocks.2.0.op",
    f"input_blocks.3.0.{RESNET}",
    f"middle_block.0.{RESNET}",
    f"middle_block.1.{ATTENTION}",
    f"middle_block.2.{RESNET}",
    f"output_blocks.0.0.{RESNET}",
    f"output_blocks.1.0.{RESNET}",
    "output_blocks.1.1.conv",
    f"output_blocks.2.0.{RESNET}",
    f"output_blocks.2.1.{ATTENTION}",
    f"output_blocks.3.0.{RESNET}",
    f"output_blocks.3.1.{ATTENTION}",
)
#: Names of the modules above in diffusers, written by hand from its UNet2DConditionModel.
IN_DIFFUSERS = (
    "conv_in",
    "down_blocks.0.resnets.0.conv1",
    f"down_blocks.0.attentions.0.{ATTENTION}",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.resnets.0.conv1",
    "mid_block.resnets.0.conv1",
    f"mid_block.attentions.0.{ATTENTION}",
    "mid_block.resnets.1.conv1",
    "up_blocks.0.resnets.0.conv1",
    "up_blocks.0.resnets.1.conv1",
    "up_blocks.0.upsamplers.0.conv",
    "up_blocks.1.resnets.0.conv1",
    f"up_blocks.1.attentions.0.{ATTENTION}",
    "up_blocks.1.resnets.1.conv1",
    f"up_blocks.1.attentions.1.{ATTENTION}",
)


@pytest.mark.parametrize(("module", "name"), list(zip(SMALL, IN_DIFFUSERS, strict=True)))
def test_a_module_of_the_unet_has_its_names_in_diffusers_and_in_compvis(module, name):
    assert found(SMALL, name.replace(".", "_")) == module
    assert found(SMALL, module.replace(".", "_")) == module


def test_the_unet_has_no_other_names():
    names = {name.replace(".", "_") for name in SMALL + IN_DIFFUSERS}

    assert adapter_targets(unet(*SMALL)).keys() == {("unet", name) for name in names}


def test_the_upsampler_follows_the_attention_of_its_block():
    modules = (
        f"output_blocks.0.0.{RESNET}",
        f"output_blocks.0.1.{ATTENTION}",
        "output_blocks.0.2.conv",
        f"output_blocks.1.0.{RESNET}",
    )

    assert found(modules, "up_blocks_0_upsamplers_0_conv") == "output_blocks.0.2.conv"
    assert found(modules, "up_blocks_1_resnets_0_conv1") == f"output_blocks.1.0.{RESNET}"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("in_layers.0", "norm1"),
        ("in_layers.2", "conv1"),
        ("emb_layers.1", "time_emb_proj"),
        ("out_layers.0", "norm2"),
        ("out_layers.3", "conv2"),
        ("skip_connection", "conv_shortcut"),
    ],
)
def test_layers_of_a_resnet_block_have_names_of_their_own(module, name):
    modules = [f"input_blocks.1.0.{module}"]

    assert found(modules, f"down_blocks_0_resnets_0_{name}") == modules[0]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("time_embed.0", ["time_embedding_linear_1"]),
        ("time_embed.2", ["time_embedding_linear_2"]),
        ("label_emb.0.0", ["add_embedding_linear_1", "class_embedding_linear_1"]),
        ("label_emb.0.2", ["add_embedding_linear_2", "class_embedding_linear_2"]),
        ("label_emb", ["class_embedding"]),
        ("time_embedding.cond_proj", ["time_embedding_cond_proj"]),
        ("out.0", ["conv_norm_out"]),
        ("out.2", ["conv_out"]),
    ],
)
def test_layers_outside_the_blocks_have_names(module, names):
    assert [found([module], name) for name in names] == [module] * len(names)


def test_numbers_beyond_nine_are_in_the_order_of_numbers():
    modules = [f"input_blocks.{number}.0.{RESNET}" for number in (10, 2, 1)]

    assert found(modules, "down_blocks_0_resnets_2_conv1") == f"input_blocks.10.0.{RESNET}"


def test_clip_has_the_names_that_transformers_gives():
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    names = [f"{layer}.weight", f"{layer}.bias"]

    assert adapter_targets({"text_encoder": names}) == {
        ("text_encoder", "text_model_encoder_layers_0_self_attn_q_proj"): Target(
            component="text_encoder", parameter=layer, part=None
        )
    }


OPENCLIP = (
    "positional_embedding",
    "text_projection",
    "token_embedding.weight",
    "ln_final.weight",
    "ln_final.bias",
    *(
        f"transformer.resblocks.{layer}.{name}"
        for layer in (0, 11)
        for name in (
            "ln_1.weight",
            "ln_2.weight",
            "attn.in_proj_weight",
            "attn.in_proj_bias",
            "attn.out_proj.weight",
            "mlp.c_fc.weight",
            "mlp.c_proj.weight",
            "mlp.c_proj.bias",
        )
    ),
)


@pytest.mark.parametrize(
    ("name", "parameter", "part"),
    [
        ("self_attn_q_proj", "attn.in_proj_weight", 0),
        ("self_attn_k_proj", "attn.in_proj_weight", 1),
        ("self_attn_v_proj", "attn.in_proj_weight", 2),
        ("self_attn_out_proj", "attn.out_proj", None),
        ("mlp_fc1", "mlp.c_fc", None),
        ("mlp_fc2", "mlp.c_proj", None),
        ("layer_norm1", "ln_1", None),
        ("layer_norm2", "ln_2", None),
    ],
)
def test_openclip_has_the_names_that_transformers_gives(name, parameter, part):
    targets = adapter_targets({"text_encoder_2": OPENCLIP})

    assert targets["text_encoder_2", f"text_model_encoder_layers_11_{name}"] == Target(
        component="text_encoder_2", parameter=f"transformer.resblocks.11.{parameter}", part=part
    )


@pytest.mark.parametrize(
    ("key", "component"),
    [
        ("lora_te2_text_projection.lora_up.weight", "text_encoder_2"),
        ("text_encoder_2.text_projection.lora_B.weight", "text_encoder_2"),
        ("lora_te_text_projection.lora_up.weight", "text_encoder"),
    ],
)
def test_the_projection_of_the_pooled_prompt_is_a_layer_without_a_module(key, component):
    target = adapter_targets({component: OPENCLIP})[understood(key).layer]

    assert (target.component, target.parameter_of("weight")) == (component, "text_projection")
    assert target.rows(1280) == slice(1280)


def test_weights_and_biases_have_the_names_of_their_parameters():
    targets = adapter_targets({"text_encoder": OPENCLIP})
    layer = "text_model_encoder_layers_0"

    for name, parameter in (
        ("self_attn_k_proj", "attn.in_proj_weight"),
        ("self_attn_out_proj", "attn.out_proj.weight"),
    ):
        target = targets["text_encoder", f"{layer}_{name}"]
        assert target.parameter_of("weight") == f"transformer.resblocks.0.{parameter}"
        bias = f"transformer.resblocks.0.{parameter.removesuffix('weight')}bias"
        assert target.parameter_of("bias") == bias


def test_openclip_has_no_other_names():
    names = [name for _, name in adapter_targets({"text_encoder": OPENCLIP})]

    assert len(names) == 2 * 8 + 3
    assert {"text_model_embeddings_token_embedding", "text_model_final_layer_norm"} < {*names}


def test_components_are_apart():
    layer = "text_model.encoder.layers.0.mlp.fc1"

    targets = adapter_targets(
        {"text_encoder": [f"{layer}.weight"], "unet": ["input_blocks.0.0.weight"]}
    )

    assert [each.component for each in targets.values()] == ["text_encoder", "unet", "unet"]
