"""Specifications of the tiny models: one of every task, as small as their records allow."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from ldm_runtime.specs.model import ModelSpec, NoiseAugmentation, SamplingDefaults, Task
from ldm_runtime.specs.networks import (
    AutoencoderSpec,
    ClassEmbedderSpec,
    DepthEstimatorSpec,
    ImageEncoderSpec,
    Networks,
    NetworkSpec,
    SegmentationEncoderSpec,
    TextEncoderSpec,
    UNetSpec,
)

_UNET = UNetSpec(
    in_channels=4,
    out_channels=4,
    model_channels=320,
    channel_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    attention="transformer",
    transformer_depth=(1, 1, 1, 0),
    output_depth=None,
    middle_depth=1,
    num_heads=8,
    num_head_channels=None,
    context_dim=768,
    linear_projection=False,
    cross_attention_only=(),
    vector_dim=None,
    num_classes=None,
    guidance_dim=None,
    scale_shift_norm=False,
    resblock_updown=False,
    shallow_blocks=None,
)
_AUTOENCODER = AutoencoderSpec(
    kind="kl",
    image_channels=3,
    channels=128,
    channel_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    attention_levels=(),
    middle_attention=True,
    z_channels=4,
    embed_dim=4,
    codebook_size=None,
    latent_scale_factor=0.18215,
    latents_mean=(),
    latents_std=(),
)
_TEXT_ENCODER = TextEncoderSpec(
    kind="clip",
    width=768,
    num_layers=12,
    context_layers=12,
    final_norm=True,
    pooled_dim=None,
    num_heads=12,
    feed_forward_dim=3072,
    vocab_size=49408,
    max_tokens=77,
    activation="quick_gelu",
    pad_token_id=49407,
)


def unet_spec(**changes: Any) -> UNetSpec:  # noqa: ANN401  (the record checks them)
    """Return the hyperparameters of Stable Diffusion 1.5's UNet, with some changed."""
    return replace(_UNET, **changes)


def autoencoder_spec(**changes: Any) -> AutoencoderSpec:  # noqa: ANN401
    """Return the hyperparameters of Stable Diffusion 1.5's autoencoder, with some changed."""
    return replace(_AUTOENCODER, **changes)


def text_encoder_spec(**changes: Any) -> TextEncoderSpec:  # noqa: ANN401
    """Return the hyperparameters of CLIP ViT-L/14's text encoder, with some changed.

    Context is taken after the last layer unless `context_layers` says otherwise.
    """
    layers = changes.get("num_layers", _TEXT_ENCODER.num_layers)
    return replace(_TEXT_ENCODER, **{"context_layers": layers, **changes})


MERGES = ("r e", "re d</w>", "c i", "ci r", "cir c", "circ l", "circl e</w>")

_WIDTH = 8
_VOCABULARY = 2 * 256 + len(MERGES) + 2

TINY_SPEC = ModelSpec(
    family="tiny",
    task="text-to-image",
    weights="model",
    networks=Networks(
        unet=unet_spec(
            model_channels=4,
            channel_mult=(1, 2),
            num_res_blocks=1,
            transformer_depth=(0, 1),
            num_heads=1,
            context_dim=_WIDTH,
        ),
        autoencoder=autoencoder_spec(
            channels=4, channel_mult=(1, 1), num_res_blocks=1, latent_scale_factor=0.5
        ),
        text_encoder=text_encoder_spec(
            width=_WIDTH,
            num_layers=2,
            num_heads=1,
            feed_forward_dim=_WIDTH,
            vocab_size=_VOCABULARY,
            max_tokens=16,
            pad_token_id=_VOCABULARY - 1,
        ),
    ),
    alphas_cumprod=tuple(
        float(value) for value in np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    ),
    edm=None,
    prediction_type="v_prediction",  # bounded, whatever the network says
    null_prompt="encoded",
    noise_augmentation=None,
    scales_image=False,
    defaults=SamplingDefaults(
        height=16,
        width=16,
        sampler="ddim",
        schedule=None,
        num_inference_steps=4,
        guidance_scale=3.0,
        eta=0.0,
    ),
    label_names=(),
    assumptions=(),
)

_VQ = replace(
    TINY_SPEC.autoencoder,
    kind="vq",
    z_channels=3,
    embed_dim=3,
    codebook_size=16,
    latent_scale_factor=1.0,
)
_LAYOUTS = text_encoder_spec(
    kind="bert",
    width=_WIDTH,
    num_layers=1,
    num_heads=8,
    feed_forward_dim=_WIDTH,
    vocab_size=101,  # a grid of 10 by 10
    max_tokens=11,  # three objects and the crop
    activation="gelu",
    pad_token_id=100,
)
_CLASSES = ClassEmbedderSpec(num_classes=5, width=_WIDTH, null_class=4)
_IMAGE_ENCODER = ImageEncoderSpec(
    width=_WIDTH,
    num_layers=1,
    num_heads=1,
    feed_forward_dim=_WIDTH,
    activation="gelu",
    patch_size=4,
    image_size=8,
    embed_dim=6,
    pixel_mean=(0.5, 0.4, 0.3),
    pixel_std=(0.2, 0.3, 0.4),
)
_MAPS = SegmentationEncoderSpec(num_classes=6, out_channels=3, num_downsampling_steps=1)

_DEPTHS = DepthEstimatorSpec(
    image_channels=3,
    stem_channels=32,
    level_channels=(32, 32, 32),
    bottleneck_channels=(32, 32, 32),
    level_blocks=(1, 1, 1),
    width=_WIDTH,
    num_heads=1,
    feed_forward_dim=_WIDTH,
    grid=1,
    fusion_channels=2,
    head_channels=1,
)


def tiny_spec(task: Task = "text-to-image") -> ModelSpec:
    """Return the tiny model of a task. Images have twice the sides of their latents."""
    return _SPECS[task]


def _spec(task: Task, *, concat: int = 0, **conditioner: NetworkSpec) -> ModelSpec:
    """Return a model with a VQ autoencoder, and cross-attention unless it has concat channels."""
    lacks_context = concat or task == "unconditional"
    unet = replace(
        TINY_SPEC.network(UNetSpec),
        in_channels=_VQ.embed_dim + concat,
        out_channels=_VQ.embed_dim,
        attention="qkv" if lacks_context else "transformer",
        context_dim=None if lacks_context else _WIDTH,
    )
    scale = 1.0 if lacks_context else TINY_SPEC.defaults.guidance_scale
    defaults = replace(TINY_SPEC.defaults, guidance_scale=scale)
    spec = replace(TINY_SPEC, task=task, defaults=defaults)
    return replace(spec, networks=Networks(unet=unet, autoencoder=_VQ, **conditioner))


def _with_unet(spec: ModelSpec, task: Task, **changes: Any) -> ModelSpec:  # noqa: ANN401
    """Return another task's model with the same networks but for changes to the UNet."""
    unet = replace(spec.network(UNetSpec), **changes)
    return replace(spec.with_networks(unet=unet), task=task)


_SPECS: Mapping[Task, ModelSpec] = MappingProxyType(
    {
        "unconditional": _spec("unconditional"),
        "class-to-image": _spec("class-to-image", class_embedder=_CLASSES),
        "text-to-image": TINY_SPEC,
        "layout-to-image": _spec("layout-to-image", text_encoder=_LAYOUTS),
        "semantic-synthesis": _spec("semantic-synthesis", concat=3, segmentation_encoder=_MAPS),
        "super-resolution": _spec("super-resolution", concat=3),
        "text-super-resolution": _with_unet(
            TINY_SPEC, "text-super-resolution", in_channels=7, num_classes=1000
        ),
        "inpainting": _spec("inpainting", concat=4),
        "text-inpainting": _with_unet(TINY_SPEC, "text-inpainting", in_channels=9),
        "image-editing": _with_unet(TINY_SPEC, "image-editing", in_channels=8),
        "image-variation": replace(
            _with_unet(
                TINY_SPEC.with_networks(image_encoder=_IMAGE_ENCODER),
                "image-variation",
                vector_dim=2 * _IMAGE_ENCODER.embed_dim,
            ),
            noise_augmentation=NoiseAugmentation(
                alphas_cumprod=TINY_SPEC.alphas_cumprod,
                mean=(0.5,) * _IMAGE_ENCODER.embed_dim,
                std=(2.0,) * _IMAGE_ENCODER.embed_dim,
            ),
        ),
        "depth-to-image": replace(
            TINY_SPEC.with_networks(
                unet=replace(TINY_SPEC.network(UNetSpec), in_channels=5), depth_estimator=_DEPTHS
            ),
            task="depth-to-image",
        ),
        "retrieval": _spec("retrieval"),
        "autoencoder": replace(
            _spec("unconditional").with_networks(unet=None), task="autoencoder", alphas_cumprod=()
        ),
    }
)
