"""Configurations of the latent-diffusion paper's models agree with their weights, or both show."""

import math
from dataclasses import replace

import pytest

from ldm_export.detection.compvis_config import config_fields
from ldm_export.detection.detect import detect
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import ExportError, WeightsError
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
    SEMANTIC,
    TXT2IMG_1P4B,
)
from tests.export.sd_layout import FakeTensor, autoencoder_shapes, checkpoint, with_values


def of_params(**params):
    return {"model": {"params": params}}


def part(target="", **params):
    return ({"target": target} if target else {}) | {"params": params}


def autoencoder_part(layout, resolution=256, attended=(), **params):
    ddconfig = {
        "double_z": layout.codebook is None,
        "z_channels": layout.z_channels,
        "resolution": resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": layout.vae_channels,
        "ch_mult": list(layout.vae_mult),
        "num_res_blocks": layout.vae_res_blocks,
        "attn_resolutions": list(attended),
        "dropout": 0.0,
    }
    named = {} if layout.codebook is None else {"n_embed": layout.codebook}
    return {"embed_dim": layout.embed_dim, **named, "ddconfig": ddconfig | params}


def unet_part(layout, attended, **params):
    return part(
        "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        image_size=64,
        in_channels=layout.in_channels,
        out_channels=layout.out_channels,
        model_channels=layout.model_channels,
        attention_resolutions=list(attended),
        num_res_blocks=2,
        channel_mult=list(layout.channel_mult),
        **params,
    )


MODULES = "ldm.modules.encoders.modules"
#: As in configs/ and models/ of CompVis/latent-diffusion, without what only training uses.
RELEASED = {
    "celeba": (
        CELEBA,
        of_params(
            linear_start=0.0015,
            linear_end=0.0195,
            image_size=64,
            unet_config=unet_part(CELEBA, (8, 4, 2), num_head_channels=32),
            first_stage_config={"params": autoencoder_part(CELEBA)},
            cond_stage_config="__is_unconditional__",
        ),
    ),
    "churches": (
        CHURCHES,
        of_params(
            linear_start=0.0015,
            linear_end=0.0155,
            image_size=32,
            scale_by_std=True,
            cond_stage_config="__is_unconditional__",
            unet_config=unet_part(
                CHURCHES,
                (1, 2, 4, 8),
                num_heads=8,
                use_scale_shift_norm=True,
                resblock_updown=True,
            ),
            first_stage_config={"params": autoencoder_part(CHURCHES)},
        ),
    ),
    "cin256-v2": (
        CIN256_V2,
        of_params(
            conditioning_key="crossattn",
            cond_stage_config=part(f"{MODULES}.ClassEmbedder", n_classes=1001, embed_dim=512),
            unet_config=unet_part(
                CIN256_V2,
                (8, 4, 2),
                num_heads=1,
                use_spatial_transformer=True,
                transformer_depth=1,
                context_dim=512,
            ),
        ),
    ),
    "txt2img-1p4b": (
        TXT2IMG_1P4B,
        of_params(
            linear_start=0.00085,
            linear_end=0.012,
            scale_factor=0.18215,
            conditioning_key="crossattn",
            cond_stage_config=part(f"{MODULES}.BERTEmbedder", n_embed=1280, n_layer=32),
            unet_config=unet_part(
                TXT2IMG_1P4B,
                (4, 2, 1),
                num_heads=8,
                use_spatial_transformer=True,
                context_dim=1280,
                legacy=False,
            ),
        ),
    ),
    "layout2img": (
        LAYOUT2IMG,
        of_params(
            conditioning_key="crossattn",
            cond_stage_config=part(
                f"{MODULES}.BERTEmbedder",
                n_embed=512,
                n_layer=16,
                vocab_size=8192,
                max_seq_len=92,
                use_tokenizer=False,
            ),
            unet_config=unet_part(
                LAYOUT2IMG,
                (8, 4, 2),
                num_head_channels=32,
                use_spatial_transformer=True,
                transformer_depth=3,
                context_dim=512,
            ),
        ),
    ),
    "semantic": (
        SEMANTIC,
        of_params(
            concat_mode=True,
            image_size=128,
            cond_stage_config=part(
                f"{MODULES}.SpatialRescaler", n_stages=2, in_channels=182, out_channels=3
            ),
            unet_config=unet_part(SEMANTIC, (32, 16, 8), num_heads=8),
        ),
    ),
    "bsr": (
        BSR_SR,
        of_params(
            concat_mode=True,
            cond_stage_config={"target": "torch.nn.Identity"},
            unet_config=unet_part(BSR_SR, (16, 8), num_head_channels=32),
        ),
    ),
    "inpainting": (
        INPAINTING,
        of_params(
            concat_mode=True,
            linear_end=0.0205,
            cond_stage_config="__is_first_stage__",
            unet_config=unet_part(INPAINTING, (8, 4, 2), num_heads=8, resblock_updown=True),
            first_stage_config={"params": autoencoder_part(INPAINTING, attn_type="none")},
        ),
    ),
    "rdm": (
        RDM,
        of_params(
            conditioning_key="crossattn",
            scale_factor=0.22765929,
            cond_stage_config={"target": "torch.nn.Identity"},
            unet_config=unet_part(
                RDM,
                (4, 2, 1),
                num_head_channels=32,
                use_spatial_transformer=True,
                context_dim=768,
            ),
            first_stage_config={"params": autoencoder_part(RDM, attended=(16,))},
        ),
    ),
}


def alone(layout):
    return {name: FakeTensor(shape=shape) for name, shape in autoencoder_shapes(layout).items()}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_configuration_agrees_with_weights_and_family(name):
    layout, config = RELEASED[name]
    tensors = checkpoint(layout, schedule=False)
    if layout is CHURCHES:
        tensors["scale_factor"] = with_values(0.75)

    with_config, without = detect(tensors, config=config).spec, detect(tensors).spec

    sources = {each.field: each.source for each in with_config.assumptions}
    heads = "unet.num_heads" if with_config.unet.num_heads else "unet.num_head_channels"
    assert sources[heads] == "config"
    assert with_config.unet == without.unet
    assert with_config.alphas_cumprod == without.alphas_cumprod
    assert with_config.autoencoder == without.autoencoder


def test_a_scale_measured_in_training_must_be_in_the_checkpoint_or_given():
    config, tensors = of_params(scale_by_std=True), checkpoint(CHURCHES)

    with pytest.raises(WeightsError, match=r"scale_by_std, .* --latent-scale-factor"):
        detect(tensors, config=config)
    given = detect(tensors, config=config, overrides=Overrides(latent_scale_factor=0.22))

    assert given.spec.autoencoder.latent_scale_factor == 0.22


def test_the_size_of_semantic_synthesis_512_comes_from_its_configuration():
    layout, config = RELEASED["semantic"]

    assert detect(checkpoint(layout), config=config).spec.defaults.height == 512
    assert detect(checkpoint(layout)).spec.defaults.height == 256


def test_a_size_that_the_weights_leave_open_is_a_warning_that_names_the_flags(caplog):
    layout, config = RELEASED["semantic"]

    detect(checkpoint(layout), config=config)
    detect(checkpoint(layout), overrides=Overrides(height=512, width=512))
    assert not [each for each in caplog.records if each.levelname == "WARNING"]
    detect(checkpoint(layout))

    (warning,) = [each.message for each in caplog.records if each.levelname == "WARNING"]
    assert "at 512 pixels and at 256" in warning
    assert "256 is taken, --height and --width" in warning


def test_a_configuration_gives_a_sibling_its_heads():
    layout = replace(CIN256_V2, classes=10)
    config = RELEASED["cin256-v2"][1]
    config = of_params(unet_config=config["model"]["params"]["unet_config"])

    assert detect(checkpoint(layout)).spec.unet.num_head_channels == 32
    assert detect(checkpoint(layout), config=config).spec.unet.num_heads == 1


@pytest.mark.parametrize("name", ["ldm-vq-f8", "ldm-kl-f16", "ldm-kl-f32", "ldm-vq-f4-noattn"])
def test_the_configuration_of_a_first_stage_alone_is_read(name):
    layout = AUTOENCODERS[name]
    attended = [256 // 2**level for level in layout.vae_attention]
    params = autoencoder_part(layout, attended=attended)
    params["ddconfig"]["resolution"] = 256
    if not layout.vae_middle:
        params["ddconfig"]["attn_type"] = "none"

    spec = detect(alone(layout), config=of_params(**params)).spec

    assert spec.family == name
    sources = {each.field: each.source for each in spec.assumptions}
    assert sources["defaults.height"] == "config"


def unet_says(**params):
    return {"unet_config": {"params": params}}


def autoencoder_says(**params):
    return {"first_stage_config": {"params": params}}


def conditioner_says(**params):
    return {"cond_stage_config": {"params": params}}


@pytest.mark.parametrize(
    ("layout", "params", "message"),
    [
        (CELEBA, unet_says(use_scale_shift_norm=True), "use_scale_shift_norm is True, .* False"),
        (CHURCHES, unet_says(resblock_updown=False), "resblock_updown is False, .* have True"),
        (CELEBA, unet_says(use_spatial_transformer=True), "use_spatial_transformer is True"),
        (BSR_SR, unet_says(attention_resolutions=[8, 4]), r"resolutions is \[8, 4\], .* \(8,\)"),
        (LAYOUT2IMG, unet_says(transformer_depth=1), "transformer_depth is 1, .* have 3"),
        (CELEBA, autoencoder_says(n_embed=16384), "n_embed is 16384, .* have 8192"),
        (CELEBA, autoencoder_says(ddconfig={"double_z": True}), "double_z is True"),
        (CELEBA, autoencoder_says(ddconfig={"attn_type": "none"}), "none, .* have vanilla"),
        (INPAINTING, autoencoder_says(ddconfig={"attn_type": "vanilla"}), "vanilla, .* have none"),
        (
            CIN256,
            autoencoder_says(ddconfig={"resolution": 256, "attn_resolutions": [16]}),
            r"attn_resolutions is \[16\], .* have \(32,\)",
        ),
        (CIN256, conditioner_says(embed_dim=640), "embed_dim is 640, .* have 512"),
        (SEMANTIC, conditioner_says(in_channels=151), "in_channels is 151, .* have 182"),
        (LAYOUT2IMG, conditioner_says(max_seq_len=77), "max_seq_len is 77, .* have 92"),
        (LAYOUT2IMG, conditioner_says(use_tokenizer=True), "use_tokenizer is True"),
        (TXT2IMG_1P4B, conditioner_says(n_layer=16), "n_layer is 16, .* have 32"),
        (SEMANTIC, {"conditioning_key": "crossattn"}, "key is crossattn, .* have concat"),
        (RDM, {"conditioning_key": "concat"}, "key is concat, .* have crossattn"),
        (CELEBA, {"cond_stage_config": "__is_first_stage__"}, "first_stage__, .* unconditional"),
        (
            BSR_SR,
            {"cond_stage_config": {"target": f"{MODULES}.SpatialRescaler"}},
            "SpatialRescaler, .* super-resolution",
        ),
        (CELEBA, unet_says(channel_mult=[[1], [2]]), r"channel_mult is \[\[1\], \[2\]\]"),
        (
            CELEBA,
            {"first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL"}},
            "AutoencoderKL, .* VQ autoencoder",
        ),
        (
            CELEBA,
            {"first_stage_config": {"target": "ldm.models.autoencoder.VQModel"}},
            "VQModel, which decodes without its codebook",
        ),
    ],
)
def test_a_configuration_of_another_model_is_an_error_that_shows_both(layout, params, message):
    with pytest.raises(WeightsError, match=f"the configuration says .*{message}"):
        detect(checkpoint(layout), config=of_params(**params))


def test_a_first_stage_alone_is_compared_with_its_configuration():
    layout = AUTOENCODERS["ldm-vq-f8"]
    params = autoencoder_part(layout, attended=(32,)) | {"n_embed": 256}

    with pytest.raises(WeightsError, match=r"params\.n_embed is 256, .* have 16384"):
        detect(alone(layout), config=of_params(**params))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (unet_says(use_new_attention_order=True), "use_new_attention_order True is not exported"),
        (unet_says(num_heads_upsample=4), "num_heads_upsample 4 is not exported"),
        (unet_says(conv_resample=False), "conv_resample False is not exported"),
        (autoencoder_says(ddconfig={"tanh_out": True}), "ddconfig.tanh_out True is not exported"),
        (conditioner_says(method="bicubic"), "method 'bicubic' is not exported"),
        (conditioner_says(multiplier=0.25), "multiplier 0.25 is not exported"),
        (conditioner_says(ucg_rate=1.5), "ucg_rate is 1.5; a number from 0 to 1"),
        (conditioner_says(ucg_rate=math.nan), "ucg_rate is nan"),
        (conditioner_says(n_stages=0), "n_stages is 0; a positive integer"),
    ],
)
def test_what_is_not_exported_is_an_error_that_names_the_entry(params, message):
    with pytest.raises(ExportError, match=message):
        config_fields(of_params(**params))
