"""Networks of the latent-diffusion paper, small: each kind that Stable Diffusion does not have."""

from dataclasses import replace

from ldm_runtime.specs.model import NoiseAugmentation
from ldm_runtime.specs.networks import (
    ClassEmbedderSpec,
    ImageEncoderSpec,
    SegmentationEncoderSpec,
)
from ldm_runtime.testing import text_encoder_spec
from tests.export.small_spec import SPEC

VQ = replace(
    SPEC.autoencoder,
    kind="vq",
    channel_mult=(1, 2),
    z_channels=3,
    embed_dim=3,
    codebook_size=1100,  # in three pieces, the last one shorter
    latent_scale_factor=1.0,
)
QKV = replace(
    SPEC.unet,
    in_channels=7,
    out_channels=3,
    attention="qkv",
    context_dim=None,
    scale_shift_norm=True,
    resblock_updown=True,
)
BERT = text_encoder_spec(
    kind="bert",
    width=96,
    num_layers=2,
    num_heads=2,
    feed_forward_dim=384,
    vocab_size=8192,
    max_tokens=92,
    activation="gelu",
    pad_token_id=0,
)
FIRST_STAGE = replace(
    SPEC.with_networks(unet=None, autoencoder=VQ, text_encoder=None),
    task="autoencoder",
    alphas_cumprod=(),
)
INPAINTING = replace(
    SPEC.with_networks(
        unet=QKV, autoencoder=replace(VQ, middle_attention=False), text_encoder=None
    ),
    task="inpainting",
)
CLASSES = replace(
    INPAINTING.with_networks(
        unet=replace(
            SPEC.unet,
            in_channels=3,
            out_channels=3,
            channel_mult=(1, 3),
            num_heads=1,
            context_dim=48,
        ),
        class_embedder=ClassEmbedderSpec(num_classes=11, width=48, null_class=10),
    ),
    task="class-to-image",
)
LAYOUTS = replace(
    CLASSES.with_networks(
        unet=replace(CLASSES.unet, context_dim=96), class_embedder=None, text_encoder=BERT
    ),
    task="layout-to-image",
)
SEMANTIC = replace(
    INPAINTING.with_networks(
        unet=replace(QKV, in_channels=6, transformer_depth=(0, 0)),
        segmentation_encoder=SegmentationEncoderSpec(
            num_classes=182, out_channels=3, num_downsampling_steps=1
        ),
    ),
    task="semantic-synthesis",
)
#: Not of the paper: the first level attends to the context alone, and a class is embedded.
UPSCALER = replace(
    SPEC.with_networks(
        unet=replace(
            SPEC.unet,
            in_channels=7,
            transformer_depth=(1, 1),
            context_dim=96,
            cross_attention_only=(0,),
            num_classes=1000,
        )
    ),
    task="text-super-resolution",
)
#: Nor is this: the embedding of an image is the UNet's vector.
VARIATION = replace(
    SPEC.with_networks(
        unet=replace(SPEC.unet, vector_dim=96),
        image_encoder=ImageEncoderSpec(
            width=64,
            num_layers=2,
            num_heads=2,
            feed_forward_dim=128,
            activation="gelu",
            patch_size=4,
            image_size=12,
            embed_dim=48,
            pixel_mean=(0.5, 0.5, 0.5),
            pixel_std=(0.25, 0.25, 0.25),
        ),
    ),
    task="image-variation",
    noise_augmentation=NoiseAugmentation(
        alphas_cumprod=(0.9, 0.1), mean=(0.0,) * 48, std=(1.0,) * 48
    ),
)

#: Component and model of every kind of network, by what is new in it.
CASES = {
    "unet_of_attention_blocks": ("unet", INPAINTING),
    "unet_of_one_head_and_one_token": ("unet", CLASSES),
    "unet_of_classes": ("unet", UPSCALER),
    "bert": ("text_encoder", LAYOUTS),
    "unet_of_vectors": ("unet", VARIATION),
    "image_encoder": ("image_encoder", VARIATION),
    "class_embedder": ("class_embedder", CLASSES),
    "segmentation_encoder": ("segmentation_encoder", SEMANTIC),
    "encoder_without_attention": ("vae_encoder", INPAINTING),
    "decoder_with_a_codebook": ("vae_decoder", FIRST_STAGE),
}
