"""A small Stable Diffusion in the CompVis layout with random weights, for tests.

Every layer is random, also those that training starts at zero: a fresh UNet of this family returns
zeros, and every comparison of zeros succeeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ldm_export.networks.autoencoder import LatentDecoder, LatentEncoder
from ldm_export.networks.clip import ClipTextEncoder
from ldm_export.networks.unet import UNet
from ldm_runtime.testing import autoencoder_spec, text_encoder_spec, unet_spec

UNET = unet_spec(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    transformer_depth=(0, 1),
    context_dim=64,
)
AUTOENCODER = autoencoder_spec(channels=32, channel_mult=(1, 1, 2), num_res_blocks=1)
TEXT_ENCODER = text_encoder_spec(width=64, num_layers=2, num_heads=1, feed_forward_dim=256)
#: What the weights cannot tell; pass as `height` and `width`.
SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The four networks, random and in float32."""

    text_encoder: nn.Module
    unet: nn.Module
    vae_decoder: nn.Module
    vae_encoder: nn.Module


def random_networks(seed: int = 0) -> Networks:
    """Return networks whose outputs are neither zero nor large."""
    torch.manual_seed(seed)
    networks = Networks(
        text_encoder=ClipTextEncoder(TEXT_ENCODER),
        unet=UNet(UNET),
        vae_decoder=LatentDecoder(AUTOENCODER),
        vae_encoder=LatentEncoder(AUTOENCODER),
    )
    for network in vars(networks).values():
        randomise(network)
    return networks


def randomise(network: nn.Module) -> None:
    """Give a network, which is not to be trained, weights from torch's generator."""
    for name, parameter in network.eval().requires_grad_(False).named_parameters():
        if parameter.ndim > 1:
            spread = 0.5 if "embedding" in name else parameter[0].numel() ** -0.5
            parameter.normal_(std=spread)
        else:
            center = 1.0 if name.endswith("weight") else 0.0
            parameter.normal_(mean=center, std=0.1)


def schedule_buffers(start: float = 0.00085, end: float = 0.012) -> dict[str, torch.Tensor]:
    """Return a noise schedule, of Stable Diffusion if not told, as checkpoints hold it, float32."""
    betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64).square()
    return {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, 0).float()}


def state_dict(networks: Networks, *, ema: bool = False) -> dict[str, torch.Tensor]:
    """Return all tensors by their names in a CompVis checkpoint."""
    return {
        **schedule_buffers(),
        **dict(_prefixed("model.diffusion_model.", networks.unet)),
        **dict(_prefixed("first_stage_model.", networks.vae_encoder)),
        **dict(_prefixed("first_stage_model.", networks.vae_decoder)),
        **dict(_prefixed("cond_stage_model.transformer.", networks.text_encoder)),
        **(dict(_averaged(networks.unet)) if ema else {}),
    }


def write_checkpoint(path: Path, networks: Networks, *, ema: bool = False) -> Path:
    """Write a checkpoint as torch does and return its path."""
    torch.save({"state_dict": state_dict(networks, ema=ema), "global_step": 1}, path)
    return path


def _prefixed(prefix: str, network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in network.state_dict().items():
        yield prefix + name, parameter


def _averaged(unet: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in unet.state_dict().items():
        yield "model_ema." + f"diffusion_model.{name}".replace(".", ""), parameter.clone()
