import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from ldm_export.checkpoint.file_fields import FileFields
from ldm_export.detection.detect import detect
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import ExportError, UnknownModelError, WeightsError
from ldm_export.families.table import FAMILIES
from ldm_export.hyperparameters.unet import read_unet
from ldm_export.networks.loading import check_weights
from tests.export.sd_layout import (
    REFINER,
    SD1,
    SD2,
    SDXL,
    TINY,
    FakeTensor,
    autoencoder_shapes,
    checkpoint,
    sdxl_checkpoint,
    text_shapes,
    unet_shapes,
    with_values,
)


def parameter_count(tensors, names):
    return sum(math.prod(tensors[name].shape) for name in names)


def sources(spec):
    return {
        assumption.field: (assumption.value, assumption.source) for assumption in spec.assumptions
    }


def test_stable_diffusion_1_is_read_from_its_shapes():
    spec = detect(checkpoint(SD1)).spec

    assert (spec.family, spec.task) == ("stable-diffusion-1", "text-to-image")
    assert spec.unet.model_channels == 320
    assert spec.unet.channel_mult == (1, 2, 4, 4)
    assert spec.unet.transformer_depth == (1, 1, 1, 0)
    assert (spec.unet.num_heads, spec.unet.num_head_channels) == (8, None)
    assert not spec.unet.linear_projection
    assert spec.autoencoder.factor == 8
    assert spec.autoencoder.latent_scale_factor == 0.18215
    assert (
        spec.networks["text_encoder"].num_heads,
        spec.networks["text_encoder"].pad_token_id,
    ) == (12, 49407)
    assert spec.prediction_type == "epsilon"
    assert (spec.defaults.height, spec.defaults.width) == (512, 512)


def test_the_components_of_stable_diffusion_1_have_the_published_sizes():
    tensors = checkpoint(SD1)

    weights = detect(tensors).weights

    millions = {
        component: round(parameter_count(tensors, names.values()) / 1e6, 2)
        for component, names in weights.items()
    }
    assert millions == {
        "unet": 859.52,
        "vae_decoder": 49.49,
        "vae_encoder": 34.16,
        "text_encoder": 123.06,
    }


def as_sgm(tensors):
    """Return a checkpoint with the names that SDXL's code gives a text encoder."""
    return {
        name.replace("cond_stage_model.", "conditioner.embedders.0."): tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("renamed", [dict, as_sgm])
def test_stable_diffusion_2_is_read_from_its_shapes(renamed):
    tensors = renamed(checkpoint(SD2))

    detection = detect(tensors)

    spec, text = detection.spec, detection.spec.networks["text_encoder"]
    assert spec.family.startswith("stable-diffusion-2")
    assert (spec.unet.num_heads, spec.unet.num_head_channels) == (None, 64)
    assert spec.unet.linear_projection
    assert (text.kind, text.num_layers, text.context_layers) == ("openclip", 24, 23)
    assert (text.num_heads, text.activation, text.pad_token_id) == (16, "gelu", 0)
    assert text.final_norm
    assert text.pooled_dim is None
    millions = {
        component: round(parameter_count(tensors, names.values()) / 1e6, 2)
        for component, names in detection.weights.items()
    }
    assert millions["unet"] == 865.91
    assert millions["text_encoder"] == 352.98  # 354.03 with the projection, which nothing needs
    assert sorted(detection.unused.values())[:2] == 2 * ["for comparing text with images only"]


@pytest.mark.parametrize(("layers", "passed"), [(24, 23), (23, 23), (22, 21)])
@pytest.mark.parametrize("renamed", [dict, as_sgm])
def test_context_of_stable_diffusion_2_passes_23_layers_also_if_the_file_has_no_more(
    renamed, layers, passed
):
    """As diffusers' converters of folders write it; the last number is of no released model."""
    tensors = renamed(checkpoint(replace(SD2, text_layers=layers)))
    for name in [each for each in tensors if each.endswith(("text_projection", "logit_scale"))]:
        del tensors[name]

    text = detect(tensors).spec.networks["text_encoder"]

    assert (text.num_layers, text.context_layers, text.final_norm) == (layers, passed, True)


def test_a_folder_of_stable_diffusion_2_is_read_to_the_last_layer_that_it_has():
    """diffusers' pipeline takes the output of the last one, however many there are."""
    stated = FileFields(text_layers_trimmed=True)

    text = detect(checkpoint(SD2), stated=stated).spec.networks["text_encoder"]

    assert (text.num_layers, text.context_layers) == (24, 24)


def test_context_of_sdxls_encoders_leaves_out_a_layer_of_any_number():
    """They have a pooled output of all layers, so that none was left out of the file."""
    tensors = sdxl_checkpoint(REFINER)
    last = "conditioner.embedders.0.model.transformer.resblocks.31."
    tensors = {name: each for name, each in tensors.items() if not name.startswith(last)}

    text = detect(tensors).spec.networks["text_encoder"]

    assert (text.num_layers, text.context_layers, text.pooled_dim) == (31, 30, 1280)


def millions(tensors, detection):
    return {
        component: round(parameter_count(tensors, names.values()) / 1e6, 2)
        for component, names in detection.weights.items()
    }


def test_sdxl_is_read_from_its_shapes():
    tensors = sdxl_checkpoint()

    detection = detect(tensors)

    spec = detection.spec
    assert (spec.family, spec.task, spec.null_prompt) == (
        "stable-diffusion-xl",
        "text-to-image",
        "zeros",
    )
    assert spec.unet.transformer_depth == (0, 2, 10)
    assert (spec.unet.vector_dim, spec.unet.num_head_channels) == (2816, 64)
    assert (spec.autoencoder.latent_scale_factor, spec.defaults.height) == (0.13025, 1024)
    first, second = (spec.networks[name] for name in ("text_encoder", "text_encoder_2"))
    assert (first.width, first.num_layers, first.context_layers) == (768, 12, 11)
    assert (second.width, second.num_layers, second.context_layers) == (1280, 32, 31)
    assert (first.pooled_dim, second.pooled_dim) == (None, 1280)
    assert (first.pad_token_id, second.pad_token_id) == (49407, 0)
    assert not first.final_norm
    assert not second.final_norm
    assert millions(tensors, detection) == {
        "unet": 2567.46,
        "vae_decoder": 49.49,
        "vae_encoder": 34.16,
        "text_encoder": 123.06,
        "text_encoder_2": 694.66,
    }


@pytest.mark.parametrize(
    "name",
    [
        "logit_scale",
        "transformer.logit_scale",
        "text_projection",
        "text_projection.weight",
        "transformer.text_projection.weight",
    ],
)
@pytest.mark.parametrize(
    ("prefix", "tensors"),
    [
        ("cond_stage_model.", checkpoint(SD1)),
        ("conditioner.embedders.0.", sdxl_checkpoint()),
    ],
)
def test_what_clip_compares_texts_with_images_by_is_left_out(prefix, tensors, name):
    """ComfyUI has saved it next to the first text encoder."""
    detection = detect(tensors | {prefix + name: FakeTensor(shape=(768, 768))})

    assert detection.unused[prefix + name] == "for comparing text with images only"
    assert detection.spec == detect(tensors).spec


@pytest.mark.parametrize("renamed", [dict, as_sgm])
@pytest.mark.parametrize("ending", ["", ".weight", ".weight.weight"])
def test_the_projection_of_stable_diffusion_2_is_left_out_under_every_name(renamed, ending):
    tensors = renamed(checkpoint(SD2))
    (name,) = (each for each in tensors if each.endswith("text_projection"))
    tensors[name + ending] = tensors.pop(name)

    detection = detect(tensors)

    assert detection.unused[name + ending] == "for comparing text with images only"
    assert detection.spec.networks["text_encoder"].pooled_dim is None


@pytest.mark.parametrize(
    ("name", "tensors"),
    [("stable-diffusion-1-lcm", checkpoint(SD1)), ("stable-diffusion-xl-lcm", sdxl_checkpoint())],
)
def test_a_unet_that_takes_the_guidance_scale_is_a_latent_consistency_model(name, tensors):
    projection = "model.diffusion_model.time_embedding.cond_proj.weight"

    spec = detect(tensors | {projection: FakeTensor(shape=(320, 256))}).spec

    defaults = spec.defaults
    assert (spec.family, spec.unet.guidance_dim) == (name, 256)
    assert (defaults.sampler, defaults.schedule, defaults.eta) == ("lcm", "consistency", 1.0)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (4, 8.5)


def test_a_projection_of_the_guidance_scale_of_another_width_is_named():
    tensors = checkpoint(SD1)
    tensors["model.diffusion_model.time_embedding.cond_proj.weight"] = FakeTensor(shape=(300, 256))

    found = detect(tensors)

    unet = {parameter: tensors[name] for parameter, name in found.weights["unet"].items()}
    with pytest.raises(WeightsError, match=r"time_embedding\.cond_proj\.weight"):
        check_weights("unet", found.spec, unet)


def test_the_refiner_of_sdxl_has_one_text_encoder_and_is_told_a_score():
    tensors = sdxl_checkpoint(REFINER)

    detection = detect(tensors)

    assert detection.spec.family == "stable-diffusion-xl-refiner"
    assert detection.spec.null_prompt == "encoded"
    assert (detection.spec.unet.vector_dim, detection.spec.unet.transformer_depth) == (
        2560,
        (0, 4, 4, 0),
    )
    assert millions(tensors, detection)["unet"] == 2259.53


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (replace(SDXL, vector_dim=2800), r"vector of 2800 .* 2816 or 2560"),
        (replace(SDXL, context_dim=2000), r"are 768 and 1280 wide, .* width 2000"),
    ],
)
def test_parts_of_sdxl_that_do_not_fit_are_an_error(layout, message):
    tensors = sdxl_checkpoint(SDXL) | checkpoint(layout)

    with pytest.raises(WeightsError, match=message):
        detect(tensors)


#: The entries of `configs/generate.yaml` of timbrooks/instruct-pix2pix that say something.
INSTRUCT_PIX2PIX = {
    "model": {
        "target": "ldm.models.diffusion.ddpm_edit.LatentDiffusion",
        "params": {
            "linear_start": 0.00085,
            "linear_end": 0.0120,
            "timesteps": 1000,
            "image_size": 64,
            "conditioning_key": "hybrid",
            "scale_factor": 0.18215,
            "use_ema": True,
            "load_ema": True,
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {"in_channels": 8, "out_channels": 4, "num_heads": 8},
            },
            "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
        },
    }
}


@pytest.mark.parametrize(("layout", "family"), [(SD1, "1"), (SD2, "2")])
def test_nine_channels_are_an_inpainting_model_that_predicts_noise(layout, family):
    spec = detect(checkpoint(replace(layout, in_channels=9))).spec

    assert spec.family == f"stable-diffusion-{family}-inpainting"
    assert (spec.task, spec.prediction_type) == ("text-inpainting", "epsilon")
    assert (spec.unet.concat_channels, spec.defaults.height) == (5, 512)


def test_eight_channels_are_instruct_pix2pix_with_the_sampling_of_its_script():
    layout = replace(SD1, in_channels=8)

    spec = detect(checkpoint(layout, ema=True), config=INSTRUCT_PIX2PIX).spec

    assert (spec.family, spec.task, spec.weights) == ("instruct-pix2pix", "image-editing", "ema")
    assert (spec.unet.concat_channels, spec.prediction_type) == (4, "epsilon")
    defaults = spec.defaults
    assert (defaults.sampler, defaults.schedule) == ("euler_ancestral", "linspace")
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.eta) == (100, 7.5, 1.0)
    assert detect(checkpoint(layout)).spec.weights == "model"


def test_eight_channels_of_sdxl_are_its_instruct_pix2pix_at_768_pixels():
    spec = detect(sdxl_checkpoint(replace(SDXL, in_channels=8))).spec

    assert spec.family == "stable-diffusion-xl-instruct-pix2pix"
    assert (spec.task, spec.null_prompt, spec.unet.vector_dim) == ("image-editing", "zeros", 2816)
    defaults = spec.defaults
    assert (defaults.height, defaults.width, defaults.guidance_scale) == (768, 768, 3.0)
    assert (defaults.sampler, defaults.num_inference_steps) == ("euler", 30)


def test_eight_channels_of_stable_diffusion_2_are_not_known():
    with pytest.raises(UnknownModelError):
        detect(checkpoint(replace(SD2, in_channels=8)))


@pytest.mark.parametrize(
    ("stated", "measured", "expected"),
    [
        (None, None, ("v_prediction", "family", 768)),
        (None, "epsilon", ("epsilon", "measured", 512)),
        (None, "v_prediction", ("v_prediction", "measured", 768)),
        ("epsilon", None, ("epsilon", "flag", 512)),
        ("v_prediction", "epsilon", ("v_prediction", "flag", 768)),
    ],
)
def test_the_size_of_stable_diffusion_2_follows_from_what_it_predicts(stated, measured, expected):
    overrides = Overrides(prediction_type=stated)

    detection = detect(checkpoint(SD2), overrides=overrides, measured=measured)

    value, source = sources(detection.spec)["prediction_type"]
    assert (value, source, detection.spec.defaults.height) == expected
    assert detection.siblings == ({"epsilon"} if source == "family" else set())


BOTH, DECODER = {"vae_decoder", "vae_encoder"}, {"vae_decoder"}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (sdxl_checkpoint(), BOTH),
        (sdxl_checkpoint(REFINER), BOTH),
        (checkpoint(SD1), set()),
        (checkpoint(SD2), set()),
    ],
    ids=["sdxl", "refiner", "sd1", "sd2"],
)
def test_autoencoders_of_sdxl_have_no_graph_in_half_precision_unless_files_say_they_may(
    tensors, expected
):
    fixed = FileFields(vae_fits_fp16=True)

    assert detect(tensors).fp32_components == expected
    assert detect(tensors, stated=fixed).fp32_components == set()


def test_the_decoder_of_the_x4_upscaler_has_no_graph_in_half_precision():
    (family,) = (each for each in FAMILIES if each.name == "stable-diffusion-x4-upscaler")

    assert set(family.family_defaults.fp32_halves) == DECODER


V_MODEL = {"model": {"params": {"parameterization": "v"}}}


@pytest.mark.parametrize(
    ("step", "config", "expected"),
    [
        (875_000, None, ("epsilon", "training step", 512)),
        (110_000, None, ("v_prediction", "family", 768)),
        (875_000, V_MODEL, ("v_prediction", "config", 768)),
    ],
)
def test_the_base_model_of_stable_diffusion_2_1_is_known_by_its_steps(step, config, expected):
    stated = FileFields(global_step=step)

    spec = detect(checkpoint(SD2), config=config, stated=stated).spec

    assert (*sources(spec)["prediction_type"], spec.defaults.height) == expected


def test_a_measurement_and_marks_outweigh_steps_of_training():
    stated = FileFields(global_step=875_000)
    marked = checkpoint(SD2) | {"v_pred": with_values(np.zeros(0))}

    by_step = detect(checkpoint(SD2), stated=stated)
    measured = detect(checkpoint(SD2), stated=stated, measured="v_prediction").spec
    by_mark = detect(marked, stated=stated).spec

    assert by_step.siblings == {"v_prediction"}
    assert sources(measured)["prediction_type"] == ("v_prediction", "measured")
    assert sources(by_mark)["prediction_type"] == ("v_prediction", "file")


def test_steps_of_training_mean_nothing_to_other_families():
    inpainting = replace(SD2, in_channels=9)

    spec = detect(checkpoint(inpainting), stated=FileFields(global_step=875_000)).spec

    assert sources(spec)["prediction_type"] == ("epsilon", "family")


def test_every_hyperparameter_of_a_small_sibling_is_read_from_its_shapes():
    spec = detect(checkpoint(TINY)).spec

    unet, autoencoder, text = spec.unet, spec.autoencoder, spec.networks["text_encoder"]
    for field in (
        *("in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks"),
        *("middle_depth", "context_dim", "linear_projection"),
    ):
        assert getattr(unet, field) == getattr(TINY, field), field
    assert unet.transformer_depth == TINY.depth
    assert (autoencoder.channels, autoencoder.channel_mult) == (32, (1, 2, 2))
    assert (autoencoder.num_res_blocks, autoencoder.attention_levels) == (1, (2,))
    assert (autoencoder.z_channels, autoencoder.embed_dim, autoencoder.factor) == (6, 4, 4)
    assert autoencoder.image_channels == 3
    assert (text.width, text.num_layers, text.feed_forward_dim) == (96, 3, 200)
    assert (text.vocab_size, text.max_tokens, text.pad_token_id) == (600, 24, 599)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (128, 2), (64, 1), (96, 1), (32, 1)])
def test_the_text_encoder_has_64_channels_a_head_where_that_divides_its_width(width, heads):
    layout = replace(TINY, text_width=width, context_dim=width)

    spec = detect(checkpoint(layout)).spec

    assert spec.networks["text_encoder"].num_heads == heads


def test_words_added_to_the_vocabulary_are_a_warning_and_do_not_move_the_padding(caplog):
    layout = replace(TINY, vocab_size=49411)

    spec = detect(checkpoint(layout)).spec

    assert spec.networks["text_encoder"].pad_token_id == 49407
    assert "has 3 tokens beyond CLIP's vocabulary of 49408" in caplog.text


def test_parameters_have_the_names_of_their_networks():
    weights = detect(checkpoint(TINY)).weights

    assert weights["unet"].keys() == unet_shapes(TINY).keys()
    assert weights["text_encoder"].keys() == text_shapes(TINY).keys()
    autoencoder = weights["vae_encoder"].keys() | weights["vae_decoder"].keys()
    assert autoencoder == autoencoder_shapes(TINY).keys()
    assert (
        weights["vae_decoder"]["post_quant_conv.bias"] == "first_stage_model.post_quant_conv.bias"
    )
    assert "quant_conv.bias" in weights["vae_encoder"]


def test_old_text_encoder_names_get_the_level_they_lack():
    new = checkpoint(TINY)
    old = {name.replace("transformer.text_model.", "transformer."): new[name] for name in new}

    weights = detect(old).weights["text_encoder"]

    assert weights.keys() == text_shapes(TINY).keys()
    name = "encoder.layers.0.mlp.fc1.weight"
    assert weights[f"text_model.{name}"] == f"cond_stage_model.transformer.{name}"


def test_a_second_spelling_of_a_text_encoder_is_ignored_if_it_repeats_the_first():
    tensors = checkpoint(TINY)
    name = "cond_stage_model.transformer.{}final_layer_norm.bias"
    tensors[name.format("text_model.")] = tensors[name.format("")] = with_values(np.arange(96.0))

    detection = detect(tensors)

    assert detection.unused[name.format("")] == "a copy under another name"
    assert detection.weights["text_encoder"].keys() == text_shapes(TINY).keys()


def test_two_spellings_of_a_text_encoder_that_differ_are_an_error_that_says_how_to_remove_one():
    tensors = checkpoint(TINY)
    name = "cond_stage_model.transformer.{}final_layer_norm.bias"
    tensors[name.format("text_model.")] = with_values(np.zeros(96))
    tensors[name.format("")] = with_values(np.ones(96))

    with pytest.raises(
        WeightsError,
        match=r"both the text_encoder's text_model\.final_layer_norm.*torch or safetensors, delete",
    ):
        detect(tensors)


#: Attention of an autoencoder as diffusers names it, by the names of the original.
VAE_SPELLINGS = [
    {"norm": "norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
    {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"},
]


@pytest.mark.parametrize("spelling", VAE_SPELLINGS)
def test_attention_of_an_autoencoder_is_read_under_the_names_of_diffusers(spelling):
    original = checkpoint(TINY)
    spelled = {
        re.sub(
            r"(?<=\.attn_1\.|.attn\.0\.)(norm|q|k|v|proj_out)(?=\.)",
            lambda found: spelling[found[1]],
            name,
        ): tensor
        for name, tensor in original.items()
    }
    assert len(spelled.keys() - original.keys()) >= 2 * 2 * 4 * 2  # weights and biases, both halves

    expected, found = detect(original), detect(spelled)

    assert found.spec == expected.spec
    for component in ("vae_encoder", "vae_decoder"):
        assert found.weights[component].keys() == expected.weights[component].keys()
    q = "decoder.mid.attn_1.q.weight"
    assert found.weights["vae_decoder"][q] == "first_stage_model." + q.replace(
        ".q.", f".{spelling['q']}."
    )


def test_attention_of_unknown_names_is_missing_and_not_only_unexpected():
    tensors = {
        name.replace("decoder.mid.attn_1.q.", "decoder.mid.attn_1.wq."): tensor
        for name, tensor in checkpoint(TINY).items()
    }
    detection = detect(tensors)
    names = detection.weights["vae_decoder"]

    with pytest.raises(WeightsError) as raised:
        check_weights("vae_decoder", detection.spec, {name: tensors[names[name]] for name in names})

    assert "missing: decoder.mid.attn_1.q.weight, decoder.mid.attn_1.q.bias" in str(raised.value)
    assert "not part of it: decoder.mid.attn_1.wq" in str(raised.value)


def test_an_autoencoder_of_other_images_than_rgb_is_refused_when_it_is_recognised():
    depth = checkpoint(replace(TINY, image_channels=1))

    with pytest.raises(WeightsError, match=r"takes images of 1 channels \(encoder.conv_in.weight"):
        detect(depth)


USE_EMA, NO_EMA = ({"model": {"params": {"use_ema": used}}} for used in (True, False))


def test_stable_diffusion_samples_from_its_last_weights_and_not_from_averages_beside_them():
    detection = detect(checkpoint(TINY, ema=True))

    assert detection.spec.weights == "model"
    assert sources(detection.spec)["weights"] == ("model", "family")


@pytest.mark.parametrize(
    ("config", "flag", "used"),
    [
        (USE_EMA, None, ("ema", "config")),
        (NO_EMA, None, ("model", "config")),
        (USE_EMA, "model", ("model", "flag")),
        (NO_EMA, "ema", ("ema", "flag")),
        (None, "ema", ("ema", "flag")),
    ],
)
def test_the_set_of_weights_is_that_of_the_flag_else_of_the_configuration(config, flag, used):
    overrides = Overrides(weights=flag)

    spec = detect(checkpoint(TINY, ema=True), config=config, overrides=overrides).spec

    assert spec.weights == used[0]
    assert sources(spec)["weights"] == used


def test_averages_that_are_not_there_are_replaced_by_the_last_weights_and_that_is_said():
    spec = detect(checkpoint(TINY), config=USE_EMA).spec

    assert spec.weights == "model"
    assert sources(spec)["weights"] == ("model", "file")


@pytest.mark.parametrize("layout", [TINY, SD1])
def test_a_unet_of_which_only_averages_are_there_is_exported_from_them_and_that_is_said(layout):
    whole = checkpoint(layout, ema=True)
    averages = {
        name: tensor
        for name, tensor in whole.items()
        if not name.startswith("model.diffusion_model.")
    }

    found = detect(averages)

    expected = detect(whole, config=USE_EMA)
    assert found.weights == expected.weights
    assert replace(found.spec, assumptions=()) == replace(expected.spec, assumptions=())
    assert sources(found.spec)["weights"] == ("ema", "file")
    assert found.unused.keys() == averages.keys() - {
        name for names in found.weights.values() for name in names.values()
    }
    with pytest.raises(WeightsError, match="only their moving averages; leave it out"):
        detect(averages, overrides=Overrides(weights="model"))


@pytest.mark.parametrize("value", ["no", 0, "yes please"])
def test_a_use_of_averages_that_is_neither_true_nor_false_is_an_error(value):
    with pytest.raises(ExportError, match=r"use_ema is .*; true or false was expected"):
        detect(checkpoint(TINY), config={"model": {"params": {"use_ema": value}}})


def test_moving_averages_take_the_place_of_all_weights_of_the_unet():
    detection = detect(checkpoint(TINY, ema=True), config=USE_EMA)

    assert detection.spec.weights == "ema"
    name = detection.weights["unet"]["input_blocks.0.0.weight"]
    assert name == "model_ema.diffusion_modelinput_blocks00weight"
    assert detection.weights["unet"].keys() == unet_shapes(TINY).keys()
    raw = "model.diffusion_model.input_blocks.0.0.weight"
    assert detection.unused[raw] == "training weights, their moving average is used"
    assert "model_ema.decay" in detection.unused


def test_training_weights_are_used_on_request():
    detection = detect(checkpoint(TINY, ema=True), overrides=Overrides(weights="model"))

    assert detection.spec.weights == "model"
    assert detection.weights["unet"]["out.2.bias"] == "model.diffusion_model.out.2.bias"
    assert detection.unused["model_ema.diffusion_modelout2bias"] == "moving average, not used"


def test_incomplete_moving_averages_are_not_used_and_said_to_be_incomplete(caplog):
    tensors = checkpoint(TINY, ema=True)
    del tensors["model_ema.diffusion_modelout2bias"]

    detection = detect(tensors, config=USE_EMA)

    assert detection.spec.weights == "model"
    assert "model_ema.diffusion_modelout2bias" in caplog.text


@pytest.mark.parametrize("ema", [False, True])
def test_asking_for_moving_averages_that_are_not_complete_is_an_error(ema):
    tensors = checkpoint(TINY, ema=ema)
    tensors.pop("model_ema.diffusion_modelout2bias", None)

    with pytest.raises(WeightsError, match=r"moving averages .* --weights model"):
        detect(tensors, overrides=Overrides(weights="ema"))


def test_a_moving_average_of_another_shape_is_an_error():
    tensors = checkpoint(TINY, ema=True)
    tensors["model_ema.diffusion_modelout2bias"] = FakeTensor(shape=(9,))

    with pytest.raises(WeightsError, match=r"modelout2bias has shape \(9,\)"):
        detect(tensors, config=USE_EMA)


def test_known_leftovers_are_kept_with_their_reason():
    tensors = checkpoint(TINY)
    for name in (
        "loss.logvar",
        "first_stage_model.loss.perceptual_loss.lin0.model.1.weight",
        "logvar",
        "cond_stage_model.logit_scale",
        "ddim_alphas_prev",
        "ddim_sigmas_for_original_num_steps",
    ):
        tensors[name] = FakeTensor(shape=(3,))

    unused = detect(tensors).unused

    assert unused["loss.logvar"] == "used in training only"
    assert unused["betas"] == "noise schedule, recorded in the bundle"
    assert "cond_stage_model.transformer.text_model.embeddings.position_ids" in unused
    assert len(unused) == 10


def test_every_tensor_is_in_a_component_or_among_the_leftovers():
    tensors = checkpoint(TINY, ema=True)

    detection = detect(tensors)

    claimed = [name for names in detection.weights.values() for name in names.values()]
    assert sorted([*claimed, *detection.unused]) == sorted(tensors)


def test_tensors_that_nobody_claims_are_counted_and_the_first_are_listed():
    tensors = checkpoint(TINY)
    for index in range(11):
        tensors[f"stray.{index:02}"] = FakeTensor(shape=(1,))

    with pytest.raises(WeightsError, match=r"^11 tensors .* stray\.00, .*stray\.07 and 3 more;"):
        detect(tensors)


@pytest.mark.parametrize(
    ("prefix", "component"),
    [
        ("first_stage_model.encoder.", "encoder.conv_in.weight"),
        ("model.diffusion_model.output_blocks.3.", r"output_blocks\.3 is missing"),
        ("cond_stage_model.transformer.text_model.encoder.", r"no layer"),
        ("model.diffusion_model.time_embed.0.weight", "time_embed.0.weight is missing"),
        ("model.diffusion_model.middle_block.1.", "no attention in its middle"),
        ("model.diffusion_model.output_blocks.5.", "5 output blocks; .* need 6"),
        ("first_stage_model.encoder.down.", r"no level under encoder\.down"),
        ("first_stage_model.decoder.mid.attn_1.", r"presence of decoder\.mid\.attn_1.* is F"),
        ("first_stage_model.decoder.up.1.upsample.", r"upsample\.conv\.weight is missing: level 1"),
    ],
)
def test_a_part_that_is_missing_is_named(prefix, component):
    tensors = {
        name: tensor for name, tensor in checkpoint(TINY).items() if not name.startswith(prefix)
    }

    with pytest.raises(WeightsError, match=component):
        detect(tensors)


def without(tensors, *parts):
    return {name: tensors[name] for name in tensors if not any(part in name for part in parts)}


def test_a_unet_that_never_attends_to_text_is_an_error():
    tensors = without(checkpoint(TINY), ".attn2.")

    with pytest.raises(WeightsError, match=r"no attention to a context"):
        detect(tensors)


def test_transformers_that_nothing_leads_into_are_an_error():
    shapes = without(unet_shapes(TINY), ".proj_in.")

    with pytest.raises(WeightsError, match=r"no proj_in\.weight"):
        read_unet(shapes, num_heads=8, num_head_channels=None)


def test_a_level_without_residual_blocks_is_an_error():
    tensors = checkpoint(TINY)
    block = "model.diffusion_model.input_blocks.3."
    tensors = without(tensors, block)
    tensors[f"{block}0.op.weight"] = FakeTensor(shape=(32, 32, 3, 3))

    with pytest.raises(WeightsError, match=r"level without residual blocks"):
        detect(tensors)


def test_a_checkpoint_without_encoder_says_which_component_is_missing():
    tensors = {
        name: tensor
        for name, tensor in checkpoint(TINY).items()
        if not name.startswith(("first_stage_model.encoder.", "first_stage_model.quant_conv."))
    }

    with pytest.raises(
        WeightsError,
        match=r"no weights for the vae_encoder \(first_stage_model\.enc.*; give it by --vae$",
    ):
        detect(tensors)


def test_sdxl_without_its_second_text_encoder_says_how_to_give_it():
    tensors = {
        name: tensor
        for name, tensor in sdxl_checkpoint().items()
        if not name.startswith("conditioner.embedders.1.")
    }

    with pytest.raises(WeightsError, match=r"the text_encoder_2 .*; give it by --text-encoder-2$"):
        detect(tensors)


U, F, C = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (f"{U}time_embed.0.weight", (64, 32), r"\(128, 32\)"),
        (f"{U}input_blocks.1.0.out_layers.3.weight", (32,), "4 axes"),
        (f"{U}input_blocks.1.0.emb_layers.1.weight", (64, 128), r"channels\) of .* is 1.0, but"),
        (f"{U}output_blocks.0.0.out_layers.3.weight", (64, 96, 3, 3), "output_blocks.0"),
        (f"{U}input_blocks.3.0.out_layers.3.weight", (50, 32, 3, 3), "not a multiple"),
        (f"{U}middle_block.1.transformer_blocks.0.attn2.to_k.weight", (96, 80), "attn2.to_k"),
        (f"{U}middle_block.1.transformer_blocks.0.attn1.to_k.weight", (96, 80), "no self-att"),
        (f"{U}middle_block.1.proj_in.weight", (96, 96), "rank"),
        (f"{U}input_blocks.0.0.weight", (48, 4, 3, 3), "UNet has 48 channels"),
        (f"{F}encoder.conv_in.weight", (48, 3, 3, 3), "multiple of 32"),
        (f"{F}decoder.up.2.block.1.conv1.weight", (96, 64, 3, 3), r"decoder\.up\.2\.block\.1"),
        (f"{F}decoder.conv_out.weight", (1, 32, 3, 3), "decoder.conv_out"),
        (f"{F}quant_conv.weight", (4, 12, 1, 1), r"\(8, 12\)"),
        (f"{C}embeddings.position_embedding.weight", (24, 64), "position_embedding"),
        (f"{C}encoder.layers.2.mlp.fc1.weight", (201, 96), r"layers\.2\.mlp"),
    ],
)
def test_shapes_that_contradict_each_other_are_an_error(name, shape, message):
    tensors = checkpoint(TINY)
    assert name in tensors
    tensors[name] = FakeTensor(shape=shape)
    if "input_blocks.3" in name:
        for other in ("output_blocks.2", "output_blocks.3"):
            tensors[f"{U}{other}.0.out_layers.3.weight"] = FakeTensor(shape=shape)

    with pytest.raises(WeightsError, match=message):
        detect(tensors)


def test_components_of_different_models_are_an_error():
    narrow_text = replace(TINY, text_width=64)
    other_latents = replace(TINY, embed_dim=3)

    with pytest.raises(WeightsError, match=r"64 wide, .* width 96"):
        detect(checkpoint(narrow_text))
    with pytest.raises(WeightsError, match=r"3 latent channels, .* predicts 4"):
        detect(checkpoint(other_latents))


def test_quantised_weights_are_an_error():
    tensors = checkpoint(TINY)
    tensors["model.diffusion_model.out.2.weight"] = FakeTensor(shape=(4, 32, 3, 3), dtype="int8")

    with pytest.raises(WeightsError, match="stored as int8"):
        detect(tensors)


def test_what_the_weights_cannot_tell_is_recorded_with_its_source():
    spec = detect(checkpoint(SD1)).spec

    assert sources(spec) == {
        "weights": ("model", "family"),
        "unet.num_heads": ("8", "family"),
        "autoencoder.latent_scale_factor": ("0.18215", "family"),
        "text_encoder.num_heads": ("12", "family"),
        "text_encoder.activation": ("quick_gelu", "family"),
        "text_encoder.pad_token_id": ("49407", "family"),
        "prediction_type": ("epsilon", "family"),
        "defaults.height": ("512", "family"),
        "defaults.width": ("512", "family"),
        "defaults.sampler": ("ddim", "family"),
        "defaults.num_inference_steps": ("25", "family"),
        "text_encoder.context_layers": ("12", "family"),
        "defaults.guidance_scale": ("7.5", "family"),
        "defaults.eta": ("0.0", "family"),
    }


def test_flags_win_over_the_configuration_which_wins_over_the_family():
    config = {
        "model": {
            "params": {
                "parameterization": "v",
                "scale_factor": 0.5,
                "image_size": 16,
                "unet_config": {"params": {"num_heads": -1, "num_head_channels": 16}},
            }
        }
    }
    flags = Overrides(prediction_type="sample", num_heads=4, width=128)

    by_config = detect(checkpoint(TINY), config=config).spec
    by_flags = detect(checkpoint(TINY), config=config, overrides=flags).spec

    assert by_config.prediction_type == "v_prediction"
    assert (by_config.unet.num_heads, by_config.unet.num_head_channels) == (None, 16)
    assert by_config.autoencoder.latent_scale_factor == 0.5
    assert (by_config.defaults.height, by_config.defaults.width) == (64, 64)
    assert by_flags.prediction_type == "sample"
    assert (by_flags.unet.num_heads, by_flags.unet.num_head_channels) == (4, None)
    assert (by_flags.defaults.height, by_flags.defaults.width) == (64, 128)
    assert sources(by_flags)["defaults.height"] == ("64", "config")
    assert sources(by_flags)["unet.num_heads"] == ("4", "flag")


def test_a_scale_factor_in_the_checkpoint_is_no_assumption():
    tensors = checkpoint(TINY) | {"scale_factor": with_values(0.75)}

    spec = detect(tensors).spec
    forced = detect(tensors, overrides=Overrides(latent_scale_factor=0.5)).spec

    assert spec.autoencoder.latent_scale_factor == 0.75
    assert "autoencoder.latent_scale_factor" not in sources(spec)
    assert forced.autoencoder.latent_scale_factor == 0.5
    assert sources(forced)["autoencoder.latent_scale_factor"] == ("0.5", "flag")


@pytest.mark.parametrize("value", [0.0, math.nan, [1.0, 2.0]])
def test_an_impossible_scale_factor_in_the_checkpoint_is_an_error(value):
    tensors = checkpoint(TINY) | {"scale_factor": with_values(value)}

    with pytest.raises(WeightsError, match="one positive number"):
        detect(tensors)


def test_a_scale_factor_that_contradicts_the_configuration_is_an_error_without_the_flag():
    tensors = checkpoint(TINY) | {"scale_factor": with_values(0.75)}
    config = {"model": {"params": {"scale_factor": 0.5}}}

    with pytest.raises(WeightsError, match=r"0\.75 in the checkpoint but 0\.5"):
        detect(tensors, config=config)
    spec = detect(tensors, config=config, overrides=Overrides(latent_scale_factor=0.5)).spec

    assert spec.autoencoder.latent_scale_factor == 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (Overrides(num_heads=4, num_head_channels=8), "exclude each other"),
        (Overrides(num_heads=0), "--num-heads is 0"),
        (Overrides(latent_scale_factor=math.nan), "--latent-scale-factor is nan"),
        (Overrides(height=-64), "--height is -64"),
        (Overrides(width=100), "multiples of 16 pixels; give --width 96"),
    ],
)
def test_impossible_flags_are_an_error(flags, message):
    with pytest.raises(ExportError, match=message):
        detect(checkpoint(TINY), overrides=flags)


@pytest.mark.parametrize("flags", [Overrides(num_heads=5), Overrides(num_head_channels=40)])
def test_heads_that_do_not_divide_the_channels_are_an_error(flags):
    with pytest.raises(WeightsError, match=r"do not divide the 64 channels .*attn1.*--num-heads"):
        detect(checkpoint(TINY), overrides=flags)


def test_the_schedule_is_the_checkpoints_own():
    tensors = checkpoint(TINY)
    own = np.linspace(0.99, 0.01, 50).astype(np.float32)
    tensors["alphas_cumprod"] = with_values(own)

    spec = detect(tensors).spec

    assert spec.alphas_cumprod == tuple(own.astype(np.float64).tolist())
    assert "alphas_cumprod" not in sources(spec)


def test_a_schedule_that_ends_in_noise_is_for_models_that_predict_v():
    tensors = checkpoint(TINY)
    own = np.append(np.linspace(0.99, 0.01, 49), 0.0).astype(np.float32)
    tensors["alphas_cumprod"] = with_values(own)

    with pytest.raises(WeightsError, match=r"ends at 0, .* give --prediction-type v_prediction"):
        detect(tensors)
    spec = detect(tensors, overrides=Overrides(prediction_type="v_prediction")).spec

    assert spec.alphas_cumprod[-1] == 2.0**-24
    assert sources(spec)["alphas_cumprod"] == ("ends at 2**-24 in place of 0", "file")


def test_detection_reads_no_weight_and_imports_nothing_heavy():
    code = "import sys, ldm_export.detection.detect; print(*sys.modules)"

    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    detect(checkpoint(TINY, ema=True))  # FakeTensor refuses to hand out weights

    assert {"torch", "onnx", "transformers", "yaml"}.isdisjoint(modules)
