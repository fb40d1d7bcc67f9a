"""Writes trained weights as a CompVis-style checkpoint with its configuration beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ldm_runtime.manifest import AutoencoderSpec, TextEncoderSpec, UNetSpec

Weights = Mapping[str, Tensor]


def write_checkpoint(path: Path, state: Mapping[str, Tensor], step: int) -> None:
    """Write a checkpoint as PyTorch Lightning lays it out."""
    contents = {"epoch": 0, "global_step": step, "state_dict": dict(state)}
    torch.save(contents, path)


def compvis_state(
    first_stage: Weights, text: Weights, unet: Weights, unet_ema: Weights
) -> dict[str, Tensor]:
    """Return weights in fp16 under the names of `ldm.models.diffusion.ddpm.LatentDiffusion`.

    Args:
        first_stage: The autoencoder's, by their names in `AutoencoderKL`.
        text: The text encoder's, by their names in `transformers.CLIPTextModel`.
        unet: The UNet's last weights.
        unet_ema: Their moving average.
    """
    state = {f"model.diffusion_model.{name}": value for name, value in unet.items()}
    for name, value in unet_ema.items():
        state["model_ema." + f"diffusion_model.{name}".replace(".", "")] = value
    state |= {f"first_stage_model.{name}": value for name, value in first_stage.items()}
    state |= {f"cond_stage_model.transformer.{name}": value for name, value in text.items()}
    return {name: value.half().contiguous() for name, value in state.items()}


def schedule_buffers(alphas_cumprod: Tensor) -> dict[str, Tensor]:
    """Return the float32 buffers a CompVis checkpoint holds for a noise schedule.

    Source: Ho et al. 2020 (arXiv:2006.11239), equations 4 to 7.

    Args:
        alphas_cumprod: (num_train_timesteps,) float64.
    """
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    alphas = alphas_cumprod / previous
    betas, rest = 1 - alphas, 1 - alphas_cumprod
    variance = betas * (1 - previous) / rest
    buffers = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": rest.sqrt(),
        "log_one_minus_alphas_cumprod": rest.log(),
        "sqrt_recip_alphas_cumprod": alphas_cumprod.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas_cumprod - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / rest,
        "posterior_mean_coef2": (1 - previous) * alphas.sqrt() / rest,
    }
    return {name: value.float() for name, value in buffers.items()}


def write_config(
    path: Path,
    *,
    unet: UNetSpec,
    autoencoder: AutoencoderSpec,
    text_encoder: TextEncoderSpec,
    schedule: tuple[float, float, int],
    latent_size: int,
) -> None:
    """Write what the weights cannot tell, and what they can, as a CompVis configuration."""
    start, end, timesteps = schedule
    factors = [2**level for level, depth in enumerate(unet.transformer_depth) if depth]
    params: dict[str, Any] = {
        "linear_start": start,
        "linear_end": end,
        "timesteps": timesteps,
        "parameterization": "v",
        "image_size": latent_size,
        "channels": unet.in_channels,
        "scale_by_std": True,
        "conditioning_key": "crossattn",
        "unet_config": {
            "params": {
                "in_channels": unet.in_channels,
                "out_channels": unet.out_channels,
                "model_channels": unet.model_channels,
                "channel_mult": list(unet.channel_mult),
                "num_res_blocks": unet.num_res_blocks,
                "attention_resolutions": factors,
                "num_heads": unet.num_heads,
                "use_spatial_transformer": True,
                "transformer_depth": unet.middle_depth,
                "context_dim": unet.context_dim,
                "legacy": False,
            }
        },
        "first_stage_config": {
            "params": {
                "embed_dim": autoencoder.embed_dim,
                "ddconfig": {
                    "double_z": True,
                    "z_channels": autoencoder.z_channels,
                    "resolution": latent_size * autoencoder.factor,
                    "in_channels": autoencoder.image_channels,
                    "out_ch": autoencoder.image_channels,
                    "ch": autoencoder.channels,
                    "ch_mult": list(autoencoder.channel_mult),
                    "num_res_blocks": autoencoder.num_res_blocks,
                    "attn_resolutions": [],
                    "dropout": 0.0,
                },
            }
        },
        "cond_stage_config": {
            "params": {
                "num_attention_heads": text_encoder.num_heads,
                "hidden_act": text_encoder.activation,
            }
        },
    }
    path.write_text(yaml.safe_dump({"model": {"params": params}}, sort_keys=False))
