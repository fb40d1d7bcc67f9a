"""Rows of the family table: Stable Diffusion and its descendants.

Sources: the released configurations of CompVis/stable-diffusion (21f890f9),
Stability-AI/stablediffusion (cf1d67a), Stability-AI/generative-models (0ad7de9) and
timothybrooks/instruct-pix2pix (0dffd1e); for models of EDM `comfy/supported_models.py` of ComfyUI
and the single-file loader of diffusers 0.42.1.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from ldm_export.families.records import (
    AUTOENCODER,
    CLIP,
    DEPTH_ESTIMATOR,
    IMAGE_ENCODER,
    UNET,
    Assignment,
    Expected,
    Family,
    FamilyDefaults,
    assignment,
    openclip,
    recognised,
)
from ldm_export.families.unused_tensors import FOR_COMPARING
from ldm_runtime.specs.model import EdmSpec

_SD_1 = FamilyDefaults(
    task="text-to-image",
    weights="model",
    num_heads=8,
    num_head_channels=None,
    prediction_type="epsilon",
    latent_scale_factor=0.18215,
    linear_start=0.00085,
    linear_end=0.012,
    num_train_timesteps=1000,
    clip_activation="quick_gelu",
    null_class=None,
    latent_size=64,
    sampler="ddim",
    # 16 are as good as many in docs/quality.md; half as many again, for richer images.
    num_inference_steps=25,
    guidance_scale=7.5,
    eta=0.0,
    is_merged=True,
)
#: `edit_cli.py` samples with the moving averages, at 512 pixels, down the sigmas of equally spaced
#: timesteps.
_INSTRUCT_PIX2PIX = replace(
    _SD_1,
    task="image-editing",
    weights="ema",
    sampler="euler_ancestral",
    schedule="linspace",
    num_inference_steps=100,
    eta=1.0,
)
#: Version 2.0 and 2.1 at 768 pixels predict v, their base models at 512 pixels the noise. Context
#: is the output of the last layer but one (`layer: "penultimate"`), after the final LayerNorm. By
#: its steps diffusers recognises the base model of 2.1 (`convert_from_ckpt.py` of 0.42.1).
_SD_2 = replace(
    _SD_1,
    num_heads=None,
    num_head_channels=64,
    prediction_type="v_prediction",
    latent_size=96,
    guidance_scale=9.0,
    text_layers_left_out=1,
    siblings=MappingProxyType({"epsilon": 64}),
    released_steps=MappingProxyType({875_000: "epsilon"}),
)

_SD_2_INPAINTING = replace(
    _SD_2, task="text-inpainting", prediction_type="epsilon", latent_size=64, siblings={}
)

#: `depth2img.py` of `scripts/gradio` and `v2-midas-inference.yaml`; the released checkpoint is
#: 512-depth-ema.
_SD_2_DEPTH = replace(_SD_2_INPAINTING, task="depth-to-image")
_UNUSED_OF_MIDAS = (
    (
        r"depth_model\.model\.pretrained\.model\.(norm|head)\..*",
        "for classifying images, not for their depth",
    ),
    (
        r"depth_model\.model\.scratch\.refinenet4\.resConfUnit1\..*",
        "the coarsest feature map has none to add",
    ),
)

#: `superresolution.py` samples so; the configuration has its own noise schedule, and says of the
#: decoder that it "seems to break in half precision (UNet is fine though)".
_X4_UPSCALER = replace(
    _SD_2,
    task="text-super-resolution",
    num_heads=8,
    num_head_channels=None,
    latent_scale_factor=0.08333,
    linear_start=0.0001,
    linear_end=0.02,
    latent_size=128,
    num_inference_steps=75,
    guidance_scale=10.0,
    siblings={},
    fp32_halves=("vae_decoder",),
)

#: `stableunclip.py` samples so, from the moving averages. Heads of OpenCLIP's ViT-H have 80
#: channels (`model_configs/ViT-H-14.json` of mlfoundations/open_clip, 89fb801).
_UNCLIP_H = replace(
    _SD_2,
    task="image-variation",
    weights="ema",
    num_inference_steps=20,
    guidance_scale=10.0,
    image_head_channels=80,
    image_activation="gelu",
    siblings={},
)
#: Its image encoder is OpenAI's ViT-L. The configuration says `use_ema: False`, and takes mean and
#: standard deviation of embeddings from a file of its own (`clip_stats_path`).
_UNCLIP_L = replace(
    _UNCLIP_H,
    weights="model",
    image_head_channels=64,
    image_activation="quick_gelu",
    normalises_embeddings=True,
)

#: Context of both text encoders is the output of the last layer but one, without LayerNorm. An
#: empty negative prompt is zeros (`force_uc_zero_embeddings`), but not in the refiner. Its
#: autoencoder never runs in half precision (`disable_first_stage_autocast`).
_SDXL = replace(
    _SD_1,
    num_heads=None,
    num_head_channels=64,
    latent_scale_factor=0.13025,
    latent_size=128,
    sampler="euler",
    num_inference_steps=30,
    guidance_scale=5.0,
    text_layers_left_out=1,
    text_final_norm=False,
    null_prompt="zeros",
    fp32_halves=("vae_decoder", "vae_encoder"),
)
#: Size, steps and scale are those of the example of `StableDiffusionXLInstructPix2PixPipeline` in
#: diffusers 0.42.1, for sdxl-instructpix2pix-768.
_SDXL_INSTRUCT_PIX2PIX = replace(_SDXL, task="image-editing", latent_size=96, guidance_scale=3.0)
#: Steps and scale are of the model card of playground-v2.5-1024px-aesthetic, sampler and schedule
#: those of its scheduler. Its files hold the statistics of its latents.
_PLAYGROUND = replace(
    _SDXL,
    latent_scale_factor=0.5,
    sampler="dpmpp_2m",
    schedule="karras",
    num_inference_steps=50,
    guidance_scale=3.0,
    edm=EdmSpec(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
)
#: Steps and scale are those of its demo, which also has an exponential grid. sigma_data and where
#: the range ends are as in `V_PREDICTION_EDM` of ComfyUI; a file has the range itself.
_COSXL = replace(
    _SDXL,
    prediction_type="v_prediction",
    schedule="exponential",
    num_inference_steps=20,
    guidance_scale=7.0,
    edm=EdmSpec(sigma_min=0.002, sigma_max=120.0, sigma_data=1.0),
)
_COSXL_RANGE = ((r"edm_vpred\.sigma_(min|max)", "range of noise levels, recorded in the bundle"),)
_SDXL_TEXT = (
    assignment("text_encoder", "conditioner.embedders.0.transformer.text_model.", "text_model."),
    *openclip("conditioner.embedders.1.model.", "text_encoder_2"),
)

_TEXT_TO_IMAGE: Mapping[str, Expected] = {
    "attention": "transformer",
    "conditioning_channels": 0,
    "vector": "none",
    "autoencoder": "kl",
    "extra": "none",
}


def _stable_diffusion_2(
    name: str,
    conditioner: str,
    prefix: str,
    family_defaults: FamilyDefaults = _SD_2,
    unused: tuple[tuple[str, str], ...] = (),
    optional: tuple[Assignment, ...] = (),
    **features: Expected,
) -> Family:
    """Return a row of Stable Diffusion 2 whose text encoder has names after `prefix`."""
    row = _family(
        name,
        family_defaults,
        openclip(prefix),
        unused=((rf"{re.escape(prefix)}text_projection(\.weight)*", FOR_COMPARING), *unused),
        **{"projection": "linear", "conditioner": conditioner, **features},
    )
    return replace(row, optional=optional)


def _unclip(name: str, family_defaults: FamilyDefaults, vector_width: int) -> Family:
    """Return a row of Stable Diffusion 2 that varies an image, whose encoder it has."""
    row = _stable_diffusion_2(
        name,
        "openclip",
        "cond_stage_model.model.",
        family_defaults,
        unused=(
            (r"noise_augmentor\..*", "noise schedule of embeddings, recorded in the bundle"),
            (
                r"embedder\.model\.(?!visual\.).*",  # the text tower, whole or in part
                FOR_COMPARING,
            ),
        ),
        vector="mlp",
        vector_width=vector_width,
        extra="image embedder",
    )
    return replace(row, assignments=row.assignments + IMAGE_ENCODER)


def _sdxl(
    name: str,
    family_defaults: FamilyDefaults,
    text_encoders: tuple[Assignment, ...],
    unused: tuple[tuple[str, str], ...] = (),
    **features: Expected,
) -> Family:
    """Return a row of SDXL, whose UNet takes a vector."""
    shown: Mapping[str, Expected] = {
        "projection": "linear",
        "vector": "mlp",
        "middle": "attention",
        **features,
    }
    return _family(name, family_defaults, text_encoders, unused, **shown)


def _family(
    name: str,
    family_defaults: FamilyDefaults,
    text_encoders: tuple[Assignment, ...],
    unused: tuple[tuple[str, str], ...] = (),
    **features: Expected,
) -> Family:
    return Family(
        name=name,
        features=MappingProxyType({**_TEXT_TO_IMAGE, **features}),
        family_defaults=family_defaults,
        assignments=UNET + AUTOENCODER + text_encoders,
        unused=unused,
    )


SD_FAMILIES: tuple[Family, ...] = (
    _family("stable-diffusion-1", _SD_1, CLIP, projection="convolution", conditioner="clip"),
    _family(
        "stable-diffusion-1-inpainting",
        replace(_SD_1, task="text-inpainting"),
        CLIP,
        projection="convolution",
        conditioner="clip",
        conditioning_channels=5,
    ),
    _family(
        "instruct-pix2pix",
        _INSTRUCT_PIX2PIX,
        CLIP,
        projection="convolution",
        conditioner="clip",
        conditioning_channels=4,
    ),
    _stable_diffusion_2("stable-diffusion-2", "openclip", "cond_stage_model.model."),
    _stable_diffusion_2(
        "stable-diffusion-2-sgm", "openclip (sgm)", "conditioner.embedders.0.model."
    ),
    _stable_diffusion_2(
        "stable-diffusion-2-inpainting",
        "openclip",
        "cond_stage_model.model.",
        _SD_2_INPAINTING,
        conditioning_channels=5,
    ),
    _stable_diffusion_2(
        "stable-diffusion-2-depth",
        "openclip",
        "cond_stage_model.model.",
        _SD_2_DEPTH,
        unused=_UNUSED_OF_MIDAS,
        optional=DEPTH_ESTIMATOR,
        conditioning_channels=1,
        extra=("none", "depth estimator"),
    ),
    _stable_diffusion_2(
        "stable-diffusion-x4-upscaler",
        "openclip",
        "cond_stage_model.model.",
        _X4_UPSCALER,
        unused=((r"low_scale_model\..*", "noise schedule of the small image, always the same"),),
        conditioning_channels=3,
        vector="embedding",
        extra=("none", "low-resolution image"),
    ),
    _unclip("stable-diffusion-2-unclip-h", _UNCLIP_H, vector_width=2048),
    _unclip("stable-diffusion-2-unclip-l", _UNCLIP_L, vector_width=1536),
    _sdxl("stable-diffusion-xl", _SDXL, _SDXL_TEXT, conditioner="clip + openclip"),
    _sdxl(
        "playground-v2.5",
        _PLAYGROUND,
        _SDXL_TEXT,
        ((r"edm_(mean|std)", "statistics of latents, recorded in the bundle"),),
        conditioner="clip + openclip",
        edm="epsilon",
    ),
    _sdxl(
        "cosxl",
        _COSXL,
        _SDXL_TEXT,
        _COSXL_RANGE,
        conditioner="clip + openclip",
        edm="v_prediction",
    ),
    _sdxl(
        "cosxl-edit",
        replace(_COSXL, task="image-editing", scales_image=True),
        _SDXL_TEXT,
        _COSXL_RANGE,
        conditioner="clip + openclip",
        conditioning_channels=4,
        edm="v_prediction",
    ),
    _sdxl(
        "stable-diffusion-xl-inpainting",
        replace(_SDXL, task="text-inpainting"),
        _SDXL_TEXT,
        conditioner="clip + openclip",
        conditioning_channels=5,
    ),
    _sdxl(
        "stable-diffusion-xl-instruct-pix2pix",
        _SDXL_INSTRUCT_PIX2PIX,
        _SDXL_TEXT,
        conditioner="clip + openclip",
        conditioning_channels=4,
    ),
    replace(
        _sdxl(
            "stable-diffusion-xl-refiner",
            replace(_SDXL, null_prompt="encoded"),
            openclip("conditioner.embedders.0.model."),
            conditioner="openclip (sgm)",
        ),
        usual=MappingProxyType({"vector_width": 2560}),
    ),
    # What is left of a kind, whatever its size.
    recognised("a latent diffusion model with label embeddings", vector="embedding"),
    recognised("a latent diffusion model with vector conditioning", vector="mlp"),
)
