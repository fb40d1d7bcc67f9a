"""Rows of the family table: Stable Diffusion and its descendants.

Sources: the released configurations of CompVis/stable-diffusion (21f890f9),
Stability-AI/stablediffusion (cf1d67a) and Stability-AI/generative-models (0ad7de9).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from ldm_export.families.records import (
    AUTOENCODER,
    CLIP,
    UNET,
    Assignment,
    Expected,
    Family,
    FamilyDefaults,
    openclip,
    recognised,
)
from ldm_export.families.unused_tensors import FOR_COMPARING

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
)
#: Version 2.0 and 2.1 at 768 pixels predict v, their base models at 512 pixels the noise. Context
#: is the output of the last layer but one (`layer: "penultimate"`), after the final LayerNorm.
_SD_2 = replace(
    _SD_1,
    num_heads=None,
    num_head_channels=64,
    prediction_type="v_prediction",
    latent_size=96,
    guidance_scale=9.0,
    text_layers_left_out=1,
    siblings=MappingProxyType({"epsilon": 64}),
)

_SD_2_INPAINTING = replace(
    _SD_2, task="text-inpainting", prediction_type="epsilon", latent_size=64, siblings={}
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
    **features: Expected,
) -> Family:
    """Return a row of Stable Diffusion 2 whose text encoder has names after `prefix`."""
    return _family(
        name,
        family_defaults,
        openclip(prefix),
        unused=((rf"{re.escape(prefix)}text_projection", FOR_COMPARING),),
        **{"projection": "linear", "conditioner": conditioner, **features},
    )


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
    recognised(
        "instruct-pix2pix",
        projection="convolution",
        conditioning_channels=4,
        autoencoder="kl",
        conditioner="clip",
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
    recognised(
        "stable-diffusion-2-depth",
        projection="linear",
        conditioning_channels=1,
        conditioner="openclip",
    ),
    recognised(
        "stable-diffusion-x4-upscaler",
        projection="linear",
        conditioning_channels=3,
        vector="embedding",
        conditioner="openclip",
    ),
    recognised("stable-diffusion-2-unclip-h", projection="linear", vector="mlp", vector_width=2048),
    recognised("stable-diffusion-2-unclip-l", projection="linear", vector="mlp", vector_width=1536),
    recognised(
        "stable-diffusion-xl",
        projection="linear",
        conditioning_channels=0,
        conditioner="clip + openclip",
    ),
    recognised(
        "stable-diffusion-xl-inpainting",
        projection="linear",
        conditioning_channels=5,
        conditioner="clip + openclip",
    ),
    recognised("stable-diffusion-xl-refiner", projection="linear", vector="mlp", vector_width=2560),
    # What is left of a kind, whatever its size.
    recognised("a latent diffusion model with label embeddings", vector="embedding"),
    recognised("a latent diffusion model with vector conditioning", vector="mlp"),
)
