"""Released models of the Stable Diffusion line, as the hyperparameters of their networks.

Sources: `configs/stable-diffusion/*` of CompVis/stable-diffusion (21f890f9) and
Stability-AI/stablediffusion (cf1d67a), `configs/inference/*` of Stability-AI/generative-models
(0ad7de9), and segmind/SSD-1B (e7fd132). One model of every UNet; others of the same networks, such
as fine-tunes, differ in what their weights are.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ldm_runtime.specs.networks import DepthEstimatorSpec, ImageEncoderSpec, Networks
from ldm_runtime.testing import autoencoder_spec, text_encoder_spec, unet_spec
from released.records import ReleasedModel

_LINEAR = {"num_heads": None, "num_head_channels": 64, "linear_projection": True}
_SD_2_UNET = unet_spec(**_LINEAR, context_dim=1024)
_SDXL_UNET = unet_spec(
    **_LINEAR,
    channel_mult=(1, 2, 4),
    transformer_depth=(0, 2, 10),
    middle_depth=10,
    context_dim=2048,
    vector_dim=2816,
)

#: OpenCLIP ViT-H/14 runs to the last layer but one and has a projection that nothing uses.
_VIT_H = text_encoder_spec(
    kind="openclip",
    width=1024,
    num_layers=24,
    context_layers=23,
    num_heads=16,
    feed_forward_dim=4096,
    activation="gelu",
    pad_token_id=0,
)
_VIT_BIG_G = replace(
    _VIT_H,
    width=1280,
    num_layers=32,
    context_layers=31,
    num_heads=20,
    feed_forward_dim=5120,
    final_norm=False,
    pooled_dim=1280,
)
_CLIP_OF_SDXL = text_encoder_spec(context_layers=11, final_norm=False)

_BOTH_ENCODERS = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


def _stable_diffusion(name: str, **fields: Any) -> ReleasedModel:  # noqa: ANN401
    """Return a row with the task and the noise schedule of the line unless told otherwise."""
    usual = {"task": "text-to-image", "linear_start": 0.00085, "linear_end": 0.012}
    return ReleasedModel(name=name, **{**usual, **fields})


def _openclip(prefix: str, **unused: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
    """Return the weights that compare text with images, which a file has beside a text tower."""
    return {f"{prefix}{name}": shape for name, shape in {"logit_scale": (), **unused}.items()}


def _stable_diffusion_2(
    name: str,
    prefixes: Mapping[str, str] = MappingProxyType({}),
    unused: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    **fields: Any,  # noqa: ANN401
) -> ReleasedModel:
    """Return a row of a model with the text tower of OpenCLIP ViT-H/14."""
    return _stable_diffusion(
        name,
        prefixes={"text_encoder": "cond_stage_model.model.", **prefixes},
        unused={**_openclip("cond_stage_model.model.", text_projection=(1024, 1024)), **unused},
        **fields,
    )


def _sdxl(name: str, *prefixes: str, **fields: Any) -> ReleasedModel:  # noqa: ANN401
    """Return a row in the layout of sgm, whose released files have fp16 weights.

    Args:
        name: Of the model.
        prefixes: Beginning of each text encoder's names; the last one is OpenCLIP ViT-bigG/14.
        fields: Of the record.
    """
    return _stable_diffusion(
        name,
        half=True,
        prefixes=dict(zip(("text_encoder", "text_encoder_2"), prefixes, strict=False)),
        unused=_openclip(prefixes[-1]),
        **fields,
    )


#: What DPT-Hybrid has and no depth depends on: its transformer's end and half of a fusion.
_UNUSED_BY_MIDAS = {
    "depth_model.model.pretrained.model.norm.weight": (768,),
    "depth_model.model.pretrained.model.norm.bias": (768,),
    "depth_model.model.pretrained.model.head.weight": (1000, 768),
    "depth_model.model.pretrained.model.head.bias": (1000,),
    **{
        f"depth_model.model.scratch.refinenet4.resConfUnit1.conv{layer}.{kind}": shape
        for layer in (1, 2)
        for kind, shape in (("weight", (256, 256, 3, 3)), ("bias", (256,)))
    },
}

_AUTOENCODER = autoencoder_spec()
_SDXL_AUTOENCODER = autoencoder_spec(latent_scale_factor=0.13025)
_SDXL_NETWORKS = Networks(
    unet=_SDXL_UNET,
    autoencoder=_SDXL_AUTOENCODER,
    text_encoder=_CLIP_OF_SDXL,
    text_encoder_2=_VIT_BIG_G,
)

_MODELS = (
    _stable_diffusion(
        "v1-5-pruned-emaonly",
        parameters_millions=(859.52, 83.65, 123.06),
        networks=Networks(
            unet=unet_spec(), autoencoder=_AUTOENCODER, text_encoder=text_encoder_spec()
        ),
    ),
    _stable_diffusion(
        "sd-v1-5-inpainting",
        task="text-inpainting",
        parameters_millions=(859.54, 83.65, 123.06),
        networks=Networks(
            unet=unet_spec(in_channels=9),
            autoencoder=_AUTOENCODER,
            text_encoder=text_encoder_spec(),
        ),
    ),
    _stable_diffusion_2(
        "v2-1_768-ema-pruned",
        parameters_millions=(865.91, 83.65, 354.03),
        networks=Networks(unet=_SD_2_UNET, autoencoder=_AUTOENCODER, text_encoder=_VIT_H),
    ),
    _stable_diffusion_2(
        "512-depth-ema",
        unused=_UNUSED_BY_MIDAS,
        task="depth-to-image",
        parameters_millions=(865.91, 83.65, 354.03 + 123.15),
        networks=Networks(
            unet=replace(_SD_2_UNET, in_channels=5),
            autoencoder=_AUTOENCODER,
            text_encoder=_VIT_H,
            depth_estimator=DepthEstimatorSpec(
                image_channels=3,
                stem_channels=64,
                level_channels=(256, 512, 1024),
                bottleneck_channels=(64, 128, 256),
                level_blocks=(3, 4, 9),
                width=768,
                num_heads=12,
                feed_forward_dim=3072,
                grid=24,
                fusion_channels=256,
                head_channels=32,
            ),
        ),
    ),
    _stable_diffusion_2(
        "x4-upscaler-ema",
        task="text-super-resolution",
        linear_start=0.0001,
        linear_end=0.02,
        parameters_millions=(473.40, 55.33, 354.03),
        networks=Networks(
            unet=replace(
                _SD_2_UNET,
                in_channels=7,
                model_channels=256,
                channel_mult=(1, 2, 2, 4),
                transformer_depth=(0, 1, 1, 1),
                cross_attention_only=(1, 2),
                num_heads=8,
                num_head_channels=None,
                num_classes=1000,
            ),
            autoencoder=autoencoder_spec(channel_mult=(1, 2, 4), latent_scale_factor=0.08333),
            text_encoder=_VIT_H,
        ),
    ),
    _stable_diffusion_2(
        "sd21-unclip-h",
        {"image_encoder": "embedder.model.visual."},
        task="image-variation",
        parameters_millions=(870.17, 83.65, 354.03 + 632.08),
        networks=Networks(
            unet=replace(_SD_2_UNET, vector_dim=2048),
            autoencoder=_AUTOENCODER,
            text_encoder=_VIT_H,
            image_encoder=ImageEncoderSpec(
                width=1280,
                num_layers=32,
                num_heads=16,
                feed_forward_dim=5120,
                activation="gelu",
                patch_size=14,
                image_size=224,
                embed_dim=1024,
                pixel_mean=(0.48145466, 0.4578275, 0.40821073),
                pixel_std=(0.26862954, 0.26130258, 0.27577711),
            ),
        ),
    ),
    _sdxl(
        "sd_xl_base_1.0",
        *_BOTH_ENCODERS,
        parameters_millions=(2567.46, 83.65, 817.72),
        networks=_SDXL_NETWORKS,
    ),
    _sdxl(
        "sd_xl_refiner_1.0",
        "conditioner.embedders.0.model.",
        parameters_millions=(2259.53, 83.65, 694.66),
        networks=Networks(
            unet=replace(
                _SDXL_UNET,
                model_channels=384,
                channel_mult=(1, 2, 4, 4),
                transformer_depth=(0, 4, 4, 0),
                middle_depth=4,
                context_dim=1280,
                vector_dim=2560,
            ),
            autoencoder=_SDXL_AUTOENCODER,
            text_encoder=_VIT_BIG_G,
        ),
    ),
    _sdxl(
        "SSD-1B",
        *_BOTH_ENCODERS,
        parameters_millions=(1331.33, 83.65, 817.72),
        networks=_SDXL_NETWORKS.changed(
            unet=replace(
                _SDXL_UNET,
                transformer_depth=(0, 2, 4),
                output_depth=(0, (2, 1, 1), (4, 4, 10)),
                middle_depth=0,
            )
        ),
    ),
)

#: Every model of the line, by name.
STABLE_DIFFUSION_MODELS: Mapping[str, ReleasedModel] = MappingProxyType(
    {model.name: model for model in _MODELS}
)
