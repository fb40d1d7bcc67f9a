"""The released models of the latent-diffusion paper, as the hyperparameters of their networks.

Sources: the `config.yaml` of each model in CompVis/latent-diffusion, `models/ldm/*` and
`models/first_stage_models/*`. Models of equal networks share a row.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

from ldm_runtime.specs.networks import (
    AutoencoderSpec,
    ClassEmbedderSpec,
    Networks,
    SegmentationEncoderSpec,
)
from ldm_runtime.testing import autoencoder_spec, text_encoder_spec, unet_spec
from released.records import ReleasedModel


def _autoencoder(
    kind: Literal["kl", "vq"],
    channel_mult: tuple[int, ...],
    channels: int,
    codebook_size: int | None = None,
    attention_levels: tuple[int, ...] = (),
) -> AutoencoderSpec:
    return autoencoder_spec(
        kind=kind,
        channel_mult=channel_mult,
        attention_levels=attention_levels,
        z_channels=channels,
        embed_dim=channels,
        codebook_size=codebook_size,
        latent_scale_factor=1.0,
    )


#: The zoo of autoencoders.
AUTOENCODERS: Mapping[str, AutoencoderSpec] = MappingProxyType(
    {
        "vq-f4": _autoencoder("vq", (1, 2, 4), 3, 8192),
        "vq-f4-noattn": replace(_autoencoder("vq", (1, 2, 4), 3, 8192), middle_attention=False),
        "vq-f8": _autoencoder("vq", (1, 2, 2, 4), 4, 16384, (3,)),
        "vq-f8-n256": _autoencoder("vq", (1, 2, 2, 4), 4, 256, (3,)),
        "vq-f16": _autoencoder("vq", (1, 1, 2, 2, 4), 8, 16384, (4,)),
        "kl-f4": _autoencoder("kl", (1, 2, 4), 3),
        "kl-f8": _autoencoder("kl", (1, 2, 4, 4), 4),
        "kl-f16": _autoencoder("kl", (1, 1, 2, 2, 4), 16, None, (4,)),
        "kl-f32": _autoencoder("kl", (1, 1, 2, 2, 4, 4), 64, None, (4, 5)),
    }
)
_AUTOENCODER_MILLIONS = MappingProxyType(
    {
        "vq-f4": 55.32,
        "vq-f4-noattn": 53.22,
        "vq-f8": 67.72,
        "vq-f8-n256": 67.65,
        "vq-f16": 69.59,
        "kl-f4": 55.31,
        "kl-f8": 83.65,
        "kl-f16": 69.61,
        "kl-f32": 103.88,
    }
)

_QKV = unet_spec(
    in_channels=3,
    out_channels=3,
    model_channels=224,
    channel_mult=(1, 2, 3, 4),
    attention="qkv",
    transformer_depth=(0, 1, 1, 1),
    num_heads=None,
    num_head_channels=32,
    context_dim=None,
)
_TRANSFORMER = replace(
    _QKV, model_channels=192, channel_mult=(1, 2, 3, 5), attention="transformer", context_dim=640
)
_BERT = text_encoder_spec(
    kind="bert",
    width=640,
    num_layers=32,
    num_heads=8,
    feed_forward_dim=2560,
    vocab_size=30522,
    activation="gelu",
    pad_token_id=0,
)

_MODELS: tuple[ReleasedModel, ...] = (
    ReleasedModel(
        name="celeba256",  # ffhq256 and lsun_beds256 are the same networks
        task="unconditional",
        parameters_millions=(274.06, 55.32, 0.0),
        networks=Networks(autoencoder=AUTOENCODERS["vq-f4"], unet=_QKV),
    ),
    ReleasedModel(
        name="lsun_churches256",
        task="unconditional",
        linear_end=0.0155,
        scale_by_std=True,  # the released factor is in the checkpoint alone; this one is not it
        parameters_millions=(294.97, 83.65, 0.0),
        networks=Networks(
            autoencoder=replace(AUTOENCODERS["kl-f8"], latent_scale_factor=0.25),
            unet=replace(
                _QKV,
                in_channels=4,
                out_channels=4,
                model_channels=192,
                channel_mult=(1, 2, 2, 4, 4),
                transformer_depth=(1, 1, 1, 1, 0),
                num_heads=8,
                num_head_channels=None,
                scale_shift_norm=True,
                resblock_updown=True,
            ),
        ),
    ),
    ReleasedModel(
        name="cin256",
        task="class-to-image",
        parameters_millions=(394.98, 67.72, 0.51),
        networks=Networks(
            autoencoder=AUTOENCODERS["vq-f8"],
            unet=replace(
                _TRANSFORMER,
                in_channels=4,
                out_channels=4,
                model_channels=256,
                channel_mult=(1, 2, 4),
                transformer_depth=(1, 1, 1),
                context_dim=512,
            ),
            class_embedder=ClassEmbedderSpec(num_classes=1000, width=512, null_class=None),
        ),
    ),
    ReleasedModel(
        name="cin256-v2",
        task="class-to-image",
        parameters_millions=(400.92, 55.32, 0.51),
        networks=Networks(
            autoencoder=AUTOENCODERS["vq-f4"],
            unet=replace(_TRANSFORMER, num_heads=1, num_head_channels=None, context_dim=512),
            class_embedder=ClassEmbedderSpec(num_classes=1001, width=512, null_class=1000),
        ),
    ),
    ReleasedModel(
        name="text2img256",
        task="text-to-image",
        parameters_millions=(403.62, 55.32, 186.15),
        networks=Networks(autoencoder=AUTOENCODERS["vq-f4"], unet=_TRANSFORMER, text_encoder=_BERT),
    ),
    ReleasedModel(
        name="txt2img-1p4B",
        task="text-to-image",
        linear_start=0.00085,
        linear_end=0.012,
        parameters_millions=(872.30, 83.65, 581.99),
        networks=Networks(
            autoencoder=replace(AUTOENCODERS["kl-f8"], latent_scale_factor=0.18215),
            unet=replace(
                _TRANSFORMER,
                in_channels=4,
                out_channels=4,
                model_channels=320,
                channel_mult=(1, 2, 4, 4),
                transformer_depth=(1, 1, 1, 0),
                num_heads=8,
                num_head_channels=None,
                context_dim=1280,
            ),
            text_encoder=replace(_BERT, width=1280, feed_forward_dim=5120),
        ),
    ),
    ReleasedModel(
        name="layout2img-openimages256",
        task="layout-to-image",
        linear_end=0.0205,
        parameters_millions=(246.28, 55.32, 58.86),
        networks=Networks(
            autoencoder=AUTOENCODERS["vq-f4"],
            unet=replace(
                _TRANSFORMER,
                model_channels=128,
                channel_mult=(1, 2, 3, 4),
                transformer_depth=(0, 3, 3, 3),
                middle_depth=3,
                context_dim=512,
            ),
            text_encoder=replace(
                _BERT,
                width=512,
                num_layers=16,
                context_layers=16,
                feed_forward_dim=2048,
                vocab_size=8192,
                max_tokens=92,
                pad_token_id=8191,
            ),
        ),
    ),
    ReleasedModel(
        name="semantic_synthesis256",  # semantic_synthesis512 is the same networks
        task="semantic-synthesis",
        linear_end=0.0205,
        parameters_millions=(215.23, 55.32, 0.0),
        networks=Networks(
            autoencoder=AUTOENCODERS["vq-f4"],
            unet=replace(
                _QKV,
                in_channels=6,
                model_channels=128,
                channel_mult=(1, 4, 8),
                transformer_depth=(0, 0, 0),
                num_heads=8,
                num_head_channels=None,
            ),
            segmentation_encoder=SegmentationEncoderSpec(
                num_classes=182, out_channels=3, num_downsampling_steps=2
            ),
        ),
    ),
    ReleasedModel(
        name="bsr_sr",
        task="super-resolution",
        linear_end=0.0155,
        parameters_millions=(113.62, 55.32, 0.0),
        networks=Networks(
            autoencoder=AUTOENCODERS["vq-f4"],
            unet=replace(
                _QKV,
                in_channels=6,
                model_channels=160,
                channel_mult=(1, 2, 2, 4),
                transformer_depth=(0, 0, 0, 1),
            ),
        ),
    ),
    ReleasedModel(
        name="inpainting_big",
        task="inpainting",
        linear_end=0.0205,
        parameters_millions=(387.25, 53.22, 0.0),
        networks=Networks(
            autoencoder=AUTOENCODERS["vq-f4-noattn"],
            unet=replace(
                _QKV,
                in_channels=7,
                model_channels=256,
                num_heads=8,
                num_head_channels=None,
                resblock_updown=True,
            ),
        ),
    ),
    ReleasedModel(
        name="rdm-768",
        task="retrieval",
        linear_end=0.015,
        parameters_millions=(1335.48, 69.61, 0.0),
        networks=Networks(
            autoencoder=replace(AUTOENCODERS["kl-f16"], latent_scale_factor=0.22765929),
            unet=replace(
                _TRANSFORMER,
                in_channels=16,
                out_channels=16,
                model_channels=448,
                channel_mult=(1, 2, 3, 4),
                transformer_depth=(1, 1, 1, 0),
                context_dim=768,
            ),
        ),
    ),
    *(
        ReleasedModel(
            name=name,
            task="autoencoder",
            parameters_millions=(0.0, _AUTOENCODER_MILLIONS[name], 0.0),
            networks=Networks(autoencoder=autoencoder),
        )
        for name, autoencoder in AUTOENCODERS.items()
    ),
)

#: Every model of the paper, by name.
PAPER_MODELS: Mapping[str, ReleasedModel] = MappingProxyType(
    {model.name: model for model in _MODELS}
)
