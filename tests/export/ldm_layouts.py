"""The released models of the latent-diffusion paper as layouts, for tests.

Written from the released configurations and from nothing in `ldm_export`.
"""

from dataclasses import replace

from tests.export.sd_layout import Layout

_VQ_F4 = Layout(vae_mult=(1, 2, 4), codebook=8192, z_channels=3, embed_dim=3, conditioner="none")
_KL_F8 = Layout(conditioner="none")

_QKV_F4 = replace(
    _VQ_F4,
    in_channels=3,
    out_channels=3,
    attention="qkv",
    depth=(0, 1, 1, 1),
    channel_mult=(1, 2, 3, 4),
)
_CROSS_F4 = replace(
    _VQ_F4,
    in_channels=3,
    out_channels=3,
    model_channels=192,
    channel_mult=(1, 2, 3, 5),
    depth=(0, 1, 1, 1),
)

CELEBA = replace(_QKV_F4, model_channels=224)
CHURCHES = replace(
    _KL_F8,
    model_channels=192,
    channel_mult=(1, 2, 2, 4, 4),
    attention="qkv",
    scale_shift=True,
    updown=True,
    depth=(1, 1, 1, 1, 0),
)
CIN256 = Layout(
    model_channels=256,
    channel_mult=(1, 2, 4),
    depth=(1, 1, 1),
    context_dim=512,
    vae_mult=(1, 2, 2, 4),
    vae_attention=(3,),
    codebook=16384,
    conditioner="class",
    text_width=512,
)
CIN256_V2 = replace(_CROSS_F4, context_dim=512, conditioner="class", text_width=512, classes=1001)
TEXT2IMG256 = replace(
    _CROSS_F4,
    context_dim=640,
    conditioner="bert",
    text_width=640,
    text_layers=32,
    text_inner=2560,
    vocab_size=30522,
)
TXT2IMG_1P4B = replace(
    _KL_F8,
    context_dim=1280,
    conditioner="bert",
    text_width=1280,
    text_layers=32,
    text_inner=5120,
    vocab_size=30522,
)
LAYOUT2IMG = replace(
    _CROSS_F4,
    model_channels=128,
    channel_mult=(1, 2, 3, 4),
    depth=(0, 3, 3, 3),
    middle_depth=3,
    context_dim=512,
    conditioner="bert",
    text_width=512,
    text_layers=16,
    text_inner=2048,
    vocab_size=8192,
    max_tokens=92,
)
SEMANTIC = replace(
    _QKV_F4,
    in_channels=6,
    model_channels=128,
    channel_mult=(1, 4, 8),
    depth=(0, 0, 0),
    conditioner="segmentation_encoder",
)
BSR_SR = replace(
    _QKV_F4, in_channels=6, model_channels=160, channel_mult=(1, 2, 2, 4), depth=(0, 0, 0, 1)
)
INPAINTING = replace(
    _QKV_F4, in_channels=7, model_channels=256, updown=True, vae_middle=False, conditioner="none"
)
RDM = Layout(
    in_channels=16,
    out_channels=16,
    model_channels=448,
    channel_mult=(1, 2, 3, 4),
    depth=(1, 1, 1, 0),
    context_dim=768,
    vae_mult=(1, 1, 2, 2, 4),
    vae_attention=(4,),
    z_channels=16,
    embed_dim=16,
    conditioner="none",
)

#: The family that each must be recognised as.
RELEASED = {
    "ldm-celeba256, ldm-ffhq256 or ldm-lsun-beds256": CELEBA,
    "ldm-lsun-churches256": CHURCHES,
    "ldm-cin256": CIN256,
    "ldm-cin256-v2": CIN256_V2,
    "ldm-text2img256": TEXT2IMG256,
    "ldm-txt2img-1p4b": TXT2IMG_1P4B,
    "ldm-layout2img-openimages256": LAYOUT2IMG,
    "ldm-semantic-synthesis256 or -512": SEMANTIC,
    "ldm-bsr-sr": BSR_SR,
    "ldm-inpainting-big": INPAINTING,
    "ldm-retrieval-augmented-768": RDM,
}


def _kl(mult, channels, attention=()):
    return replace(
        _KL_F8, vae_mult=mult, z_channels=channels, embed_dim=channels, vae_attention=attention
    )


#: First stages alone.
AUTOENCODERS = {
    "ldm-vq-f4": _VQ_F4,
    "ldm-vq-f4-noattn": replace(_VQ_F4, vae_middle=False),
    "ldm-vq-f8": replace(_kl((1, 2, 2, 4), 4, (3,)), codebook=16384),
    "ldm-vq-f8-n256": replace(_kl((1, 2, 2, 4), 4, (3,)), codebook=256),
    "ldm-vq-f16": replace(_kl((1, 1, 2, 2, 4), 8, (4,)), codebook=16384),
    "ldm-kl-f4": _kl((1, 2, 4), 3),
    "ldm-kl-f8": _KL_F8,
    "ldm-kl-f16": _kl((1, 1, 2, 2, 4), 16, (4,)),
    "ldm-kl-f32": _kl((1, 1, 2, 2, 4, 4), 64, (4, 5)),
}
