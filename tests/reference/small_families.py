"""Small checkpoints of the families of Stable Diffusion with random weights, and their pipelines.

The checkpoints are written in the layout of the released single files. Our networks run in torch,
behind the runtime's own loop, so that no graph has to be traced.
"""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch
from torch import nn

from ldm_export.detection.detect import detect
from ldm_export.graphs.torch_engine import TorchEngine
from ldm_export.intake.opening import open_model
from ldm_export.networks.autoencoder import LatentDecoder, LatentEncoder
from ldm_export.networks.clip import ClipTextEncoder
from ldm_export.networks.loading import load_network
from ldm_export.networks.openclip import ClipImageEncoder, OpenClipTextEncoder
from ldm_export.networks.unet import UNet
from ldm_runtime.specs.networks import (
    AutoencoderSpec,
    ImageEncoderSpec,
    TextEncoderSpec,
    UNetSpec,
)
from ldm_runtime.testing import text_encoder_spec
from tests.export.small_checkpoint import (
    AUTOENCODER,
    TEXT_ENCODER,
    UNET,
    randomise,
    schedule_buffers,
)

_MODULES = {"clip": ClipTextEncoder, "openclip": OpenClipTextEncoder}


@dataclass(frozen=True, kw_only=True)
class SmallFamily:
    """One family, small.

    Attributes:
        unet: Of its UNet.
        autoencoder: Of its autoencoder.
        text_encoders: By the beginning of their names in the checkpoint.
        image_encoder: Of its image encoder, if it has one.
        extra: Further tensors of its files.
        betas: First and last one of its noise schedule.
    """

    unet: UNetSpec
    autoencoder: AutoencoderSpec = AUTOENCODER
    text_encoders: dict[str, TextEncoderSpec]
    image_encoder: ImageEncoderSpec | None = None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    betas: tuple[float, float] = (0.00085, 0.012)


#: A width of 128 makes two heads of 64 channels, as the families have them.
_OPENCLIP = text_encoder_spec(
    kind="openclip",
    width=128,
    num_layers=3,
    context_layers=2,
    num_heads=2,
    feed_forward_dim=512,
    activation="gelu",
    pad_token_id=0,
)
_LINEAR = {
    "model_channels": 64,
    "num_heads": None,
    "num_head_channels": 64,
    "linear_projection": True,
    "context_dim": 128,
}


def state_dict(family: SmallFamily, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the tensors of a random checkpoint."""
    torch.manual_seed(seed)
    parts: list[tuple[str, nn.Module]] = [
        ("model.diffusion_model.", UNet(family.unet)),
        ("first_stage_model.", LatentEncoder(family.autoencoder)),
        ("first_stage_model.", LatentDecoder(family.autoencoder)),
        *((prefix, _MODULES[spec.kind](spec)) for prefix, spec in family.text_encoders.items()),
    ]
    if family.image_encoder is not None:
        parts.append(("embedder.model.visual.", ClipImageEncoder(family.image_encoder)))
    state = {**schedule_buffers(*family.betas), **family.extra}
    for prefix, network in parts:
        randomise(network)
        state |= {prefix + name: value for name, value in network.state_dict().items()}
    return state


@dataclass(frozen=True)
class _Stored:
    value: torch.Tensor

    @property
    def shape(self):
        return tuple(self.value.shape)

    @property
    def dtype(self):
        return str(self.value.dtype).removeprefix("torch.")

    def numpy(self):
        return self.value.numpy()


def open_networks(state: dict[str, torch.Tensor], **arguments):
    """Detect a checkpoint: its specification, and its networks in torch by component."""
    return _opened({name: _Stored(value) for name, value in state.items()}, **arguments)


def open_folder_networks(folder):
    """Detect a diffusers folder likewise, by what its files say."""
    checkpoint = open_model(folder)
    return _opened(checkpoint.tensors, stated=checkpoint.stated)


def _opened(tensors, **arguments):
    detection = detect(tensors, **arguments)

    def network(component):
        names = detection.weights[component]
        weights = {name: tensors[stored] for name, stored in names.items()}
        return TorchEngine(component, load_network(component, detection.spec, weights))

    return SimpleNamespace(spec=detection.spec, unused=detection.unused, network=network, words=())


#: The widths of both text encoders together are 1280: diffusers knows SDXL's UNets by it.
_CLIP_OF_SDXL = text_encoder_spec(
    width=256,
    num_layers=3,
    context_layers=2,
    final_norm=False,
    num_heads=4,
    feed_forward_dim=512,
)
_OPENCLIP_OF_SDXL = replace(
    _OPENCLIP, width=1024, num_heads=16, feed_forward_dim=1024, final_norm=False, pooled_dim=1024
)
_UNET_OF_SDXL = replace(
    UNET,
    **_LINEAR | {"context_dim": 1280},
    transformer_depth=(0, 2),
    middle_depth=2,
    vector_dim=1024 + 6 * 256,
)
_TEXT_OF_SDXL = {
    "conditioner.embedders.0.transformer.": _CLIP_OF_SDXL,
    "conditioner.embedders.1.model.": _OPENCLIP_OF_SDXL,
}
SDXL = SmallFamily(
    unet=_UNET_OF_SDXL,
    autoencoder=replace(AUTOENCODER, latent_scale_factor=0.13025),
    text_encoders=_TEXT_OF_SDXL,
)
#: With the released statistics of latents, and far wider ranges of noise than a schedule has.
PLAYGROUND = replace(
    SDXL,
    autoencoder=replace(
        AUTOENCODER,
        latent_scale_factor=0.5,
        latents_mean=(-1.6574, 1.886, -1.383, 2.5155),
        latents_std=(8.4927, 5.9022, 6.5498, 5.2299),
    ),
    extra={
        "edm_mean": torch.tensor([-1.6574, 1.886, -1.383, 2.5155]).reshape(1, 4, 1, 1),
        "edm_std": torch.tensor([8.4927, 5.9022, 6.5498, 5.2299]).reshape(1, 4, 1, 1),
    },
)
COSXL = replace(
    SDXL,
    extra={
        "edm_vpred.sigma_max": torch.tensor(120.0),
        "edm_vpred.sigma_min": torch.tensor(0.002),
    },
)
COSXL_EDIT = replace(COSXL, unet=replace(_UNET_OF_SDXL, in_channels=8))
SDXL_INPAINTING = replace(SDXL, unet=replace(_UNET_OF_SDXL, in_channels=9))
#: diffusers knows the refiner's UNet by a context of width 1280 and the length of its vector.
SDXL_REFINER = SmallFamily(
    unet=replace(_UNET_OF_SDXL, vector_dim=1280 + 5 * 256),
    autoencoder=SDXL.autoencoder,
    text_encoders={
        "conditioner.embedders.0.model.": replace(
            _OPENCLIP_OF_SDXL, width=1280, num_heads=20, pooled_dim=1280
        )
    },
)
SDXL_INSTRUCT_PIX2PIX = replace(SDXL, unet=replace(_UNET_OF_SDXL, in_channels=8))
SD_1 = SmallFamily(unet=UNET, text_encoders={"cond_stage_model.transformer.": TEXT_ENCODER})
SD_1_INPAINTING = SmallFamily(
    unet=replace(UNET, in_channels=9), text_encoders={"cond_stage_model.transformer.": TEXT_ENCODER}
)
INSTRUCT_PIX2PIX = SmallFamily(
    unet=replace(UNET, in_channels=8), text_encoders={"cond_stage_model.transformer.": TEXT_ENCODER}
)
SD_2_INPAINTING = SmallFamily(
    unet=replace(UNET, in_channels=9, **_LINEAR),
    text_encoders={"cond_stage_model.model.": _OPENCLIP},
)
#: The first level attends to the context twice; the others, as wide as the context, to themselves.
X4_UPSCALER = SmallFamily(
    unet=replace(
        UNET,
        **_LINEAR | {"num_heads": 8, "num_head_channels": None},
        in_channels=7,
        channel_mult=(1, 2, 2),
        transformer_depth=(1, 1, 1),
        cross_attention_only=(0,),
        num_classes=1000,
    ),
    autoencoder=replace(AUTOENCODER, latent_scale_factor=0.08333),
    text_encoders={"cond_stage_model.model.": _OPENCLIP},
    betas=(0.0001, 0.02),
)
SD_2 = SmallFamily(
    unet=replace(UNET, **_LINEAR),
    text_encoders={"cond_stage_model.model.": _OPENCLIP},
)


def _unclip(image_encoder: ImageEncoderSpec, **extra: torch.Tensor) -> SmallFamily:
    """Return a model that varies images, with what its files hold of CLIP's text encoder."""
    rest = {
        "logit_scale": torch.ones(()),
        "positional_embedding": torch.ones(77, 64),
        "ln_final.weight": torch.ones(64),
        **extra,
    }
    return replace(
        SD_2,
        unet=replace(SD_2.unet, vector_dim=2 * image_encoder.embed_dim),
        image_encoder=image_encoder,
        extra={f"embedder.model.{name}": tensor for name, tensor in rest.items()},
    )


#: The UNet's vector is as long as in the released models, which tells them apart.
UNCLIP_H = _unclip(
    ImageEncoderSpec(
        width=160,
        num_layers=2,
        num_heads=2,
        feed_forward_dim=320,
        activation="gelu",
        patch_size=14,
        image_size=56,
        embed_dim=1024,
        pixel_mean=(0.48145466, 0.4578275, 0.40821073),
        pixel_std=(0.26862954, 0.26130258, 0.27577711),
    )
)
UNCLIP_L = _unclip(
    replace(
        UNCLIP_H.image_encoder,
        width=128,
        feed_forward_dim=256,
        activation="quick_gelu",
        embed_dim=768,
    ),
    **{"transformer.resblocks.0.ln_1.weight": torch.ones(64)},
)
