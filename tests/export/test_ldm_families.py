"""The models of the latent-diffusion paper are recognised at their released sizes and at any other.

Expected numbers are those of the released configurations, of the paper's tables, and counts of
parameters that were made from the released code.
"""

import math
from dataclasses import replace

import pytest

from ldm_export.detection.averages_only import lost_names
from ldm_export.detection.detect import detect
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import ExportError, UnknownModelError, WeightsError
from ldm_export.networks.loading import build_network
from ldm_runtime.specs.model import components_of
from tests.export.ldm_layouts import (
    AUTOENCODERS,
    BSR_SR,
    CELEBA,
    CHURCHES,
    CIN256,
    CIN256_V2,
    INPAINTING,
    LAYOUT2IMG,
    RDM,
    RELEASED,
    SEMANTIC,
    TEXT2IMG256,
    TXT2IMG_1P4B,
)
from tests.export.sd_layout import SD1, TINY, FakeTensor, autoencoder_shapes, checkpoint
from tests.export.small_systems import SIZE, SMALL_SYSTEMS, small_system

NAMES = {id(layout): name for name, layout in RELEASED.items()}

#: (task, latent scale, pixels), (heads, channels a head), largest sigma, (steps, guidance, eta).
FACTS = [
    (CELEBA, ("unconditional", 1.0, 256), (None, 32), 83.82, (50, 1.0, 1.0)),
    (CHURCHES, ("unconditional", 1.0, 256), (8, None), 38.66, (50, 1.0, 1.0)),
    (CIN256, ("class-to-image", 1.0, 256), (None, 32), 83.82, (200, 1.0, 1.0)),
    (CIN256_V2, ("class-to-image", 1.0, 256), (1, None), 83.82, (20, 3.0, 0.0)),
    (TEXT2IMG256, ("text-to-image", 1.0, 256), (None, 32), 83.82, (100, 1.0, 0.0)),
    (TXT2IMG_1P4B, ("text-to-image", 0.18215, 256), (8, None), 14.61, (50, 5.0, 0.0)),
    (LAYOUT2IMG, ("layout-to-image", 1.0, 256), (None, 32), 101.58, (200, 1.0, 0.0)),
    (SEMANTIC, ("semantic-synthesis", 1.0, 256), (8, None), 101.58, (200, 1.0, 1.0)),
    (BSR_SR, ("super-resolution", 1.0, 256), (None, 32), 38.66, (100, 1.0, 1.0)),
    (INPAINTING, ("inpainting", 1.0, 256), (8, None), 101.58, (50, 1.0, 0.0)),
    (RDM, ("retrieval", 0.22765929, 768), (None, 32), 35.07, (50, 5.0, 0.0)),
]
#: Millions of parameters of the UNet, encoder, decoder and conditioner.
MILLIONS = [
    (CELEBA, (274.06, 22.34, 32.99, 0)),
    (CHURCHES, (294.97, 34.16, 49.49, 0)),
    (CIN256, (394.98, 27.40, 40.32, 0.51)),
    (CIN256_V2, (400.92, 22.34, 32.99, 0.51)),
    (TEXT2IMG256, (403.62, 22.34, 32.99, 166.59)),
    (TXT2IMG_1P4B, (872.30, 34.16, 49.49, 542.90)),
    (LAYOUT2IMG, (246.28, 22.34, 32.99, 54.66)),
    (SEMANTIC, (215.23, 22.34, 32.99, 546e-6)),
    (BSR_SR, (113.62, 22.34, 32.99, 0)),
    (INPAINTING, (387.25, 21.29, 31.93, 0)),
    (RDM, (1335.48, 28.27, 41.34, 0)),
]


def name_of(value):
    return NAMES.get(id(value))


def of_params(**params):
    return {"model": {"params": params}}


def changed(tensors, *, without="\0", **added):
    kept = {name: tensors[name] for name in tensors if not name.startswith(without)}
    return kept | {name: FakeTensor(shape=shape) for name, shape in added.items()}


def autoencoder(layout, prefix="", *, ema=False):
    shapes = autoencoder_shapes(layout) | {"loss.logvar": (), "loss.discriminator.bias": (3,)}
    averages = {"model_ema." + name.replace(".", ""): shapes[name] for name in shapes}
    names = {prefix + name: shape for name, shape in shapes.items()}
    return {
        name: FakeTensor(shape=shape) for name, shape in (names | (averages if ema else {})).items()
    }


@pytest.mark.parametrize(
    ("layout", "features", "heads", "sigma_max", "sampling"), FACTS, ids=name_of
)
def test_a_released_model_needs_no_flag(layout, features, heads, sigma_max, sampling):
    spec = detect(checkpoint(layout, schedule=False)).spec

    defaults = spec.defaults
    assert spec.family == name_of(layout)
    assert (spec.task, spec.autoencoder.latent_scale_factor, defaults.height) == features
    assert (spec.unet.num_heads, spec.unet.num_head_channels) == heads
    assert math.sqrt(1 / spec.alphas_cumprod[-1] - 1) == pytest.approx(sigma_max, abs=0.005)
    assert len(spec.alphas_cumprod) == 1000
    assert defaults.width == defaults.height
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.eta) == sampling
    assert (defaults.sampler, spec.prediction_type) == ("ddim", "epsilon")


@pytest.mark.parametrize("layout", RELEASED.values(), ids=name_of)
def test_the_shapes_of_a_released_model_are_read(layout):
    spec = detect(checkpoint(layout, schedule=False)).spec

    unet, autoencoder = spec.unet, spec.autoencoder
    for field in (
        *("in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks"),
        *("attention", "middle_depth"),
    ):
        assert getattr(unet, field) == getattr(layout, field), field
    assert unet.transformer_depth == layout.depth
    assert unet.scale_shift_norm == layout.scale_shift
    assert unet.resblock_updown == layout.updown
    assert not unet.linear_projection
    assert unet.context_dim == (layout.context_dim if layout.attention == "transformer" else None)
    assert autoencoder.kind == ("kl" if layout.codebook is None else "vq")
    assert autoencoder.codebook_size == layout.codebook
    assert autoencoder.channel_mult == layout.vae_mult
    assert autoencoder.attention_levels == layout.vae_attention
    assert autoencoder.middle_attention == layout.vae_middle
    assert (autoencoder.z_channels, autoencoder.embed_dim) == (layout.z_channels, layout.embed_dim)


@pytest.mark.parametrize(("layout", "millions"), MILLIONS, ids=name_of)
def test_the_components_of_a_released_model_have_the_published_sizes(layout, millions):
    tensors = checkpoint(layout)

    weights = detect(tensors).weights

    counts = dict.fromkeys(("unet", "vae_encoder", "vae_decoder"), 0.0) | {"conditioner": 0.0}
    for component, names in weights.items():
        key = component if component in counts else "conditioner"
        counts[key] += sum(math.prod(tensors[name].shape) for name in names.values()) / 1e6
    assert tuple(counts.values()) == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("layout", RELEASED.values(), ids=name_of)
def test_every_tensor_of_a_released_model_fits_its_network(layout):
    tensors = checkpoint(layout)

    detection = detect(tensors)

    assert detection.weights.keys() == components_of(detection.spec).keys()
    for component, names in detection.weights.items():
        network = build_network(component, detection.spec).state_dict()
        expected = {name: tuple(parameter.shape) for name, parameter in network.items()}
        assert {name: tensors[stored].shape for name, stored in names.items()} == expected


def test_the_text_encoder_of_the_paper_has_eight_heads_of_64_whatever_its_width():
    for layout in (TEXT2IMG256, TXT2IMG_1P4B, LAYOUT2IMG):
        text = detect(checkpoint(layout)).spec.networks["text_encoder"]

        assert (text.kind, text.activation, text.num_heads) == ("bert", "gelu", 8)
        assert text.width == layout.text_width
        assert text.num_layers == layout.text_layers
        assert text.feed_forward_dim == 4 * layout.text_width


def test_prompts_are_filled_with_zeros_and_layouts_with_the_last_token():
    prompts = detect(checkpoint(TXT2IMG_1P4B)).spec.networks["text_encoder"]
    layouts = detect(checkpoint(LAYOUT2IMG)).spec.networks["text_encoder"]

    assert (prompts.pad_token_id, prompts.max_tokens) == (0, 77)
    assert (layouts.pad_token_id, layouts.max_tokens) == (8191, 92)


def test_conditioners_without_layers_are_read():
    classes = detect(checkpoint(CIN256)).spec.networks["class_embedder"]
    segmentation_encoder = detect(checkpoint(SEMANTIC)).spec.networks["segmentation_encoder"]

    assert (classes.num_classes, classes.width, classes.null_class) == (1000, 512, None)
    assert (
        segmentation_encoder.num_classes,
        segmentation_encoder.out_channels,
        segmentation_encoder.num_downsampling_steps,
    ) == (182, 3, 2)
    assert detect(checkpoint(CIN256_V2)).spec.networks["class_embedder"].null_class == 1000


def test_moving_averages_of_every_released_unet_are_found():
    for layout in RELEASED.values():
        detection = detect(checkpoint(layout, ema=True))

        assert detection.spec.weights == "ema"
        assert all(name.startswith("model_ema.") for name in detection.weights["unet"].values())


def test_names_of_every_released_unet_are_found_again_in_those_of_its_averages():
    for layout in RELEASED.values():
        whole = checkpoint(layout, ema=True)
        unet = {name for name in whole if name.startswith("model.diffusion_model.")}

        found = lost_names({name: whole[name] for name in whole.keys() - unet})

        assert found.keys() == unet
        assert all(
            average == "model_ema." + name.removeprefix("model.").replace(".", "")
            for name, average in found.items()
        )
        assert lost_names(whole) == {}


def test_averages_of_something_else_than_a_unet_of_compvis_are_left_alone():
    names = ("model_ema.diffusion_modelinput_blocks00weight", "model_ema.diffusion_modellayersx")

    assert lost_names(dict.fromkeys(names, FakeTensor(shape=(1,)))) == {}


@pytest.mark.parametrize("name", SMALL_SYSTEMS)
def test_a_small_sibling_is_recognised_without_a_flag_but_its_size(name):
    system = small_system(name)
    tensors = {name: as_stored(tensor) for name, tensor in system.state.items()}

    detection = detect(tensors, overrides=Overrides(height=SIZE, width=SIZE))

    assert replace(detection.spec, assumptions=()) == system.spec
    assumed = {assumption.field for assumption in detection.spec.assumptions}
    assert ({"unet.num_heads", "unet.num_head_channels"} & assumed != set()) == (
        system.spec.unet is not None
    )


@pytest.mark.parametrize("name", SMALL_SYSTEMS)
def test_a_small_sibling_fills_its_networks_and_leaves_nothing_unexplained(name):
    system = small_system(name)
    tensors = {name: as_stored(tensor) for name, tensor in system.state.items()}

    detection = detect(tensors, overrides=Overrides(height=SIZE, width=SIZE))

    for component, names in detection.weights.items():
        network = build_network(component, detection.spec).state_dict()
        found = {parameter: tensors[stored].shape for parameter, stored in names.items()}
        assert found == {key: tuple(each.shape) for key, each in network.items()}
    claimed = [stored for names in detection.weights.values() for stored in names.values()]
    assert sorted([*claimed, *detection.unused]) == sorted(tensors)


def as_stored(tensor):
    return FakeTensor(shape=tuple(tensor.shape), values=tensor.numpy())


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_a_released_first_stage_is_recognised_alone(name, prefix):
    layout = AUTOENCODERS[name]

    detection = detect(autoencoder(layout, prefix))

    spec = detection.spec
    assert (spec.family, spec.task, spec.unet) == (name, "autoencoder", None)
    assert detection.weights.keys() == {"vae_decoder", "vae_encoder"}
    assert spec.autoencoder.factor == int(name.split("-f")[1].split("-")[0])
    assert spec.autoencoder.codebook_size == layout.codebook
    assert spec.autoencoder.attention_levels == layout.vae_attention
    assert spec.alphas_cumprod == ()
    assert (spec.defaults.height, spec.defaults.width) == (256, 256)
    assert {detection.unused[f"{prefix}loss.{part}"] for part in ("logvar", "discriminator.bias")}


def test_moving_averages_of_a_first_stage_alone_are_used():
    detection = detect(autoencoder(AUTOENCODERS["ldm-vq-f4"], ema=True))

    assert detection.spec.weights == "ema"
    assert detection.weights["vae_decoder"]["quantize.embedding.weight"] == (
        "model_ema.quantizeembeddingweight"
    )
    assert detection.weights["vae_encoder"]["quant_conv.bias"] == "model_ema.quant_convbias"
    assert detection.unused["model_ema.losslogvar"] == "moving average, not used"


def test_a_copy_of_the_first_stage_is_left_over_where_the_paper_left_it():
    tensors = checkpoint(replace(INPAINTING, conditioner="autoencoder"))
    name = "cond_stage_model.encoder.conv_in.weight"

    detection = detect(tensors)

    assert detection.spec.family == "ldm-inpainting-big"
    assert detection.unused[name] == "a copy of first_stage_model.*"
    tensors[name] = FakeTensor(shape=(128, 4, 3, 3))
    with pytest.raises(WeightsError, match=r"1 tensors belong .* cond_stage_model\.encoder\.conv_"):
        detect(tensors)


def test_a_word_predictor_is_left_over():
    unused = detect(checkpoint(TXT2IMG_1P4B)).unused

    assert unused["cond_stage_model.transformer.to_logits.weight"] == "for predicting words only"


# Neighbours that are easily taken for each other.


@pytest.mark.parametrize(
    ("layout", "family"),
    [
        (replace(CELEBA, scale_shift=True, updown=True), "ldm-unconditional-scale-shift"),
        (replace(CELEBA, channel_mult=(1, 2, 3, 5)), "ldm-unconditional"),
        (replace(CHURCHES, scale_shift=False), "ldm-unconditional"),
        (replace(CIN256_V2, classes=1000), "ldm-class"),
        (replace(CIN256, classes=1001), "ldm-class-imagenet-guided"),
        (replace(LAYOUT2IMG, vocab_size=30522, max_tokens=77), "ldm-text-vq"),
        (replace(TEXT2IMG256, vocab_size=8192, max_tokens=92), "ldm-layout"),
        (replace(BSR_SR, in_channels=7), "ldm-inpainting"),
        (replace(INPAINTING, in_channels=6), "ldm-super-resolution"),
        (replace(BSR_SR, conditioner="segmentation_encoder"), "ldm-semantic-synthesis"),
        (replace(RDM, model_channels=320), "ldm-retrieval"),
        (SD1, "stable-diffusion-1"),
        (replace(SD1, context_dim=1280, text_width=1280), "stable-diffusion-1"),
    ],
)
def test_a_neighbour_is_not_taken_for_the_released_model(layout, family):
    assert detect(checkpoint(layout)).spec.family == family


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (CIN256, r"this is ldm-cin256 without its class embedding \(cond_stage_model\.embedding"),
        (CIN256_V2, "ldm-cin256-v2 without its class embedding"),
        (TEXT2IMG256, "ldm-text2img256 without its text encoder"),
        (TXT2IMG_1P4B, "ldm-txt2img-1p4b without its text encoder"),
        (SD1, "stable-diffusion-1 without its text encoder"),
        (LAYOUT2IMG, "without its layout encoder"),
        (SEMANTIC, "without its segmentation encoder"),
    ],
)
def test_a_released_model_without_its_conditioner_is_not_taken_for_another(layout, message):
    tensors = changed(checkpoint(layout), without="cond_stage_model.")

    with pytest.raises(UnknownModelError, match=message):
        detect(tensors)


@pytest.mark.parametrize("layout", [TINY, replace(CIN256_V2, model_channels=64), LAYOUT2IMG])
def test_a_small_model_without_its_conditioner_is_not_taken_for_a_retrieval_model(layout):
    tensors = changed(checkpoint(replace(layout, model_channels=32)), without="cond_stage_model.")

    with pytest.raises(UnknownModelError, match=r"without its text encoder or other conditioner"):
        detect(tensors)


def test_a_configuration_says_that_a_small_model_takes_embeddings():
    tensors = changed(checkpoint(TINY), without="cond_stage_model.")
    config = of_params(cond_stage_config={"target": "torch.nn.Identity"})

    with pytest.raises(UnknownModelError, match=r"config\.yaml .* torch\.nn\.Identity"):
        detect(tensors)
    spec = detect(tensors, config=config).spec

    assert (spec.family, spec.task) == ("ldm-retrieval", "retrieval")


def test_extra_channels_that_are_neither_picture_nor_masked_latents_are_of_no_family():
    for in_channels in (5, 8):
        with pytest.raises(UnknownModelError, match="concat: found something else"):
            detect(checkpoint(replace(BSR_SR, in_channels=in_channels)))


def test_extra_channels_that_could_be_either_are_not_guessed():
    layout = replace(BSR_SR, in_channels=5, out_channels=2, z_channels=2, embed_dim=2)

    with pytest.raises(UnknownModelError, match="concat: found image or masked latents"):
        detect(checkpoint(layout))


def test_a_first_stage_in_the_layout_of_diffusers_is_told_from_the_papers():
    names = ("post_quant_conv.weight", "quant_conv.weight", "decoder.up_blocks.0.conv.weight")
    tensors = {name: FakeTensor(shape=(4, 4, 1, 1)) for name in names}

    with pytest.raises(UnknownModelError, match="layout of diffusers"):
        detect(tensors)


# What shapes cannot tell, and who settles it.


@pytest.mark.parametrize(
    ("rows", "params", "flags", "expected"),
    [
        (1001, {}, Overrides(), (1000, "family")),
        (1000, {}, Overrides(), (None, "family")),
        (1001, {"n_classes": 1001}, Overrides(), (1000, "family")),
        (11, {"n_classes": 11}, Overrides(), (None, "family")),
        (11, {"n_classes": 10}, Overrides(), (10, "config")),
        (11, {"ucg_rate": 0.1}, Overrides(), (10, "config")),
        (1001, {"ucg_rate": 0.0}, Overrides(), (None, "config")),
        (11, {"n_classes": 10}, Overrides(null_class=0), (0, "flag")),
    ],
)
def test_the_null_class_is_settled(rows, params, flags, expected):
    config = of_params(cond_stage_config={"params": params})

    spec = detect(checkpoint(replace(CIN256, classes=rows)), config=config, overrides=flags).spec

    source = {each.field: each.source for each in spec.assumptions}["class_embedder.null_class"]
    assert (spec.networks["class_embedder"].null_class, source) == expected
    assert (spec.defaults.guidance_scale == 1.0) == (expected[0] is None)


def test_an_impossible_null_class_is_an_error():
    with pytest.raises(ExportError, match=r"null class is 1000 \(from flag\), .* 0 to 999"):
        detect(checkpoint(CIN256), overrides=Overrides(null_class=1000))
    with pytest.raises(WeightsError, match="n_classes is 998, but the weights have 1000 rows"):
        detect(
            checkpoint(CIN256), config=of_params(cond_stage_config={"params": {"n_classes": 998}})
        )


@pytest.mark.parametrize(
    ("layout", "flags", "message"),
    [
        (CELEBA, Overrides(null_class=3), "--null-class 3 does not go .* for unconditional"),
        (TXT2IMG_1P4B, Overrides(null_class=0), "--null-class 0 .* for text-to-image"),
    ],
)
def test_a_flag_about_what_a_model_lacks_is_an_error(layout, flags, message):
    with pytest.raises(ExportError, match=message):
        detect(checkpoint(layout), overrides=flags)


@pytest.mark.parametrize(
    "flags",
    [
        Overrides(num_heads=8),
        Overrides(num_head_channels=32),
        Overrides(prediction_type="sample"),
    ],
)
def test_a_first_stage_alone_has_no_flags_of_a_unet(flags):
    with pytest.raises(ExportError, match=r"does not go .* for autoencoder"):
        detect(autoencoder(AUTOENCODERS["ldm-kl-f8"]), overrides=flags)


def test_the_scale_of_churches_is_the_checkpoints_own():
    tensors = checkpoint(CHURCHES)
    tensors["scale_factor"] = as_stored(small_system("churches").state["scale_factor"])

    spec = detect(tensors, config=of_params(scale_by_std=True, scale_factor=1.0)).spec

    assert spec.autoencoder.latent_scale_factor == 0.75


# Components that are not of one model.


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (replace(CIN256, text_width=384), "class embedder is 384 wide, .* width 512"),
        (replace(LAYOUT2IMG, text_width=640), "text encoder is 640 wide, .* width 512"),
        (replace(CELEBA, embed_dim=4, z_channels=4), "4 latent channels, .* predicts 3"),
    ],
)
def test_components_of_different_models_are_an_error(layout, message):
    with pytest.raises(WeightsError, match=message):
        detect(checkpoint(layout))


def test_a_segmentation_encoder_of_another_model_is_an_error():
    name = "cond_stage_model.channel_mapper.weight"
    tensors = checkpoint(SEMANTIC) | {name: FakeTensor(shape=(4, 182, 1, 1))}

    with pytest.raises(WeightsError, match=r"takes 6 channels .* \(a segmentation map\) has 4"):
        detect(tensors)


def test_a_segmentation_encoder_that_misses_the_size_of_the_latents_is_an_error():
    config = of_params(cond_stage_config={"params": {"n_stages": 3}})

    with pytest.raises(WeightsError, match=r"3 downsampling steps .* factor of 4;"):
        detect(checkpoint(SEMANTIC), config=config)


def test_a_default_size_that_cannot_be_drawn_is_an_error():
    with pytest.raises(ExportError, match="multiples of 128 pixels; give --height 128"):
        detect(checkpoint(CHURCHES), overrides=Overrides(height=160))
    with pytest.raises(ExportError, match="multiples of 4 pixels"):
        detect(autoencoder(AUTOENCODERS["ldm-vq-f4"]), overrides=Overrides(width=66))
