"""Rows of the family table: the models of the latent-diffusion paper and their variants.

A kind of model (what it generates, and what conditions it) is a row that fits every size; a
released model is its kind with the numbers of channels that were released. Where shapes leave a
feature open, mostly attention heads and the noise schedule, a kind assumes what its released model
has.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from ldm_export.families.records import (
    AUTOENCODER,
    BERT,
    CLASS_EMBEDDER,
    SEGMENTATION_ENCODER,
    UNET,
    Assignment,
    Expected,
    Family,
    FamilyDefaults,
)
from ldm_export.families.released_settings import (
    CAPTIONS,
    CHURCHES,
    CLASSES,
    CLASSES_AND_NULL,
    FACES,
    INPAINTING,
    LAYOUTS,
    NEIGHBOURS,
    SEGMENTATION_MAPS,
    TXT2IMG,
    UPSCALER,
)

Features = Mapping[str, Expected]

_WHOLE: Features = {"autoencoder": ("vq", "kl"), "vector": "none", "extra": "none"}
_QKV: Features = {**_WHOLE, "attention": "qkv", "context_dim": "none"}
_CROSS: Features = {
    **_WHOLE,
    "attention": "transformer",
    "projection": "convolution",
    "concat": "none",
}
_UNCONDITIONAL: Features = {**_QKV, "concat": "none", "conditioner": "none"}
_PLAIN: Features = {**_UNCONDITIONAL, "time_embedding": "added"}
_SCALE_SHIFT: Features = {**_UNCONDITIONAL, "time_embedding": "scale and shift"}
_SUPER_RESOLUTION: Features = {**_QKV, "concat": "image", "conditioner": "none"}
_INPAINTING: Features = {
    **_QKV,
    "concat": "masked latents",
    "conditioner": ("none", "autoencoder"),
}
_SEMANTIC: Features = {**_QKV, "conditioner": "segmentation encoder"}
_CLASS: Features = {**_CROSS, "conditioner": "class embedding"}
_IMAGENET_AND_NULL: Features = {**_CLASS, "classes": 1001}
_TEXT: Features = {**_CROSS, "conditioner": "bert", "tokens": "words"}
_TEXT_VQ: Features = {**_TEXT, "autoencoder": "vq"}
_TEXT_KL: Features = {**_TEXT, "autoencoder": "kl"}
_LAYOUT: Features = {**_CROSS, "conditioner": "bert", "tokens": "layout"}
_RETRIEVAL: Features = {**_CROSS, "conditioner": "none"}

_UNET_AND_AUTOENCODER = UNET + AUTOENCODER


def _row(
    name: str,
    features: Features,
    family_defaults: FamilyDefaults,
    conditioner: tuple[Assignment, ...] = (),
    *,
    copies: tuple[tuple[str, str], ...] = (),
) -> Family:
    return Family(
        name=name,
        features=MappingProxyType(dict(features)),
        family_defaults=family_defaults,
        assignments=_UNET_AND_AUTOENCODER + conditioner,
        copies=copies,
    )


def _released(name: str, kind: str, *channels: int, **features: Expected) -> Family:
    """Return a released model: a kind with the channels of its UNet.

    They are the channels of the first level, of input and output, and of the middle.
    """
    places = ("model_channels", "in_channels", "out_channels", "middle_channels")
    numbers = dict(zip(places, channels, strict=True))
    return replace(
        _KINDS[kind],
        name=name,
        features=MappingProxyType({**_KINDS[kind].features, **numbers, **features}),
    )


def _without(lost: str, *, of: str) -> Family:
    """Return the row of a released model without its conditioner, often like another kind."""
    nothing = {"conditioner": "none", "classes": "none", "tokens": "none"}
    return Family(
        name=f"{of} without its {lost}",
        features=MappingProxyType({**_RELEASED[of].features, **nothing}),
        is_whole=False,
    )


_KINDS = {
    family.name: family
    for family in (
        _row("ldm-unconditional", _PLAIN, FACES),
        _row("ldm-unconditional-scale-shift", _SCALE_SHIFT, CHURCHES),
        _row("ldm-class", _CLASS, CLASSES, CLASS_EMBEDDER),
        _row("ldm-class-imagenet-guided", _IMAGENET_AND_NULL, CLASSES_AND_NULL, CLASS_EMBEDDER),
        _row("ldm-text-vq", _TEXT_VQ, CAPTIONS, BERT),
        _row("ldm-text-kl", _TEXT_KL, TXT2IMG, BERT),
        _row("ldm-layout", _LAYOUT, LAYOUTS, BERT),
        _row("ldm-semantic-synthesis", _SEMANTIC, SEGMENTATION_MAPS, SEGMENTATION_ENCODER),
        _row("ldm-super-resolution", _SUPER_RESOLUTION, UPSCALER),
        _row(
            "ldm-inpainting",
            _INPAINTING,
            INPAINTING,
            copies=(("cond_stage_model.", "first_stage_model."),),
        ),
        _row("ldm-retrieval", _RETRIEVAL, NEIGHBOURS),
    )
}

_RELEASED = {
    family.name: family
    for family in (
        _released(
            "ldm-celeba256, ldm-ffhq256 or ldm-lsun-beds256", "ldm-unconditional", 224, 3, 3, 896
        ),
        _released("ldm-lsun-churches256", "ldm-unconditional-scale-shift", 192, 4, 4, 768),
        _released("ldm-cin256", "ldm-class", 256, 4, 4, 1024, context_dim=512, classes=1000),
        _released("ldm-cin256-v2", "ldm-class-imagenet-guided", 192, 3, 3, 960, context_dim=512),
        _released("ldm-text2img256", "ldm-text-vq", 192, 3, 3, 960, context_dim=640),
        _released("ldm-txt2img-1p4b", "ldm-text-kl", 320, 4, 4, 1280, context_dim=1280),
        _released("ldm-layout2img-openimages256", "ldm-layout", 128, 3, 3, 512, context_dim=512),
        _released("ldm-semantic-synthesis256 or -512", "ldm-semantic-synthesis", 128, 6, 3, 1024),
        _released("ldm-bsr-sr", "ldm-super-resolution", 160, 6, 3, 640),
        _released("ldm-inpainting-big", "ldm-inpainting", 256, 7, 3, 1024),
        replace(
            _released(
                "ldm-retrieval-augmented-768", "ldm-retrieval", 448, 16, 16, 1792, context_dim=768
            ),
            family_defaults=replace(NEIGHBOURS, latent_scale_factor=0.22765929),
        ),
    )
}

_TEXT_ENCODER = "text encoder (cond_stage_model.transformer.*)"
_CLASS_EMBEDDING = "class embedding (cond_stage_model.embedding.*)"
_TXT2IMG_WITHOUT = _without(_TEXT_ENCODER, of="ldm-txt2img-1p4b")
#: Without their conditioners these would pass for retrieval models, or for an upscaler.
_INCOMPLETE = (
    _without(_CLASS_EMBEDDING, of="ldm-cin256"),
    _without(_CLASS_EMBEDDING, of="ldm-cin256-v2"),
    _without(_TEXT_ENCODER, of="ldm-text2img256"),
    _TXT2IMG_WITHOUT,
    replace(
        _TXT2IMG_WITHOUT,
        name=f"stable-diffusion-1 without its {_TEXT_ENCODER}",
        features=MappingProxyType({**_TXT2IMG_WITHOUT.features, "context_dim": 768}),
        remedy="give it by --text-encoder",
    ),
    _without("layout encoder (cond_stage_model.transformer.*)", of="ldm-layout2img-openimages256"),
    _without(
        "segmentation encoder (cond_stage_model.channel_mapper.*)",
        of="ldm-semantic-synthesis256 or -512",
    ),
    # Of any size: models of texts, classes and layouts have 3 or 4 latent channels, the released
    # retrieval model has 16. A retrieval model of so few is known by its configuration.
    Family(
        name="a latent diffusion model without its text encoder or other conditioner "
        "(cond_stage_model.*)",
        features=MappingProxyType(
            {**_RETRIEVAL, "latent_channels": (3, 4), "stated_condition": "none"}
        ),
        is_whole=False,
        remedy="give the whole checkpoint, or, of Stable Diffusion, the text encoder by "
        "--text-encoder; or, if embeddings condition it (retrieval), its config.yaml with "
        "--config, whose cond_stage_config is torch.nn.Identity",
    ),
)

LDM_FAMILIES: tuple[Family, ...] = (
    *_RELEASED.values(),
    *_KINDS.values(),
    *_INCOMPLETE,
)
