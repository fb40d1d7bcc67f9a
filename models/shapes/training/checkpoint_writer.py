"""Writes trained weights as a CompVis-style checkpoint; `config_writer.py` describes them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

# Callers find both halves of a release in one place.
from models.shapes.training.config_writer import ModelConfig as ModelConfig
from models.shapes.training.config_writer import write_config as write_config

Weights = Mapping[str, Tensor]


def write_checkpoint(path: Path, state: Mapping[str, Tensor], step: int) -> None:
    """Write a checkpoint as PyTorch Lightning lays it out."""
    contents = {"epoch": 0, "global_step": step, "state_dict": dict(state)}
    torch.save(contents, path)


def compvis_state(
    autoencoder: Weights, text: Weights, unet: Weights, unet_ema: Weights
) -> dict[str, Tensor]:
    """Return weights in fp16 under the names of `ldm.models.diffusion.ddpm.LatentDiffusion`.

    Args:
        autoencoder: The autoencoder's, by their names in `AutoencoderKL`.
        text: The text encoder's, by their names in `transformers.CLIPTextModel`.
        unet: The UNet's last weights.
        unet_ema: Their moving average.
    """
    conditioner = {f"transformer.{name}": value for name, value in text.items()}
    state = averaged_state(autoencoder, conditioner, unet)
    for name, value in unet_ema.items():
        state["model_ema." + f"diffusion_model.{name}".replace(".", "")] = _stored(value)
    return state


def averaged_state(autoencoder: Weights, conditioner: Weights, unet: Weights) -> dict[str, Tensor]:
    """Return one set of weights in fp16 under the names of `LatentDiffusion`.

    Where the UNet's last weights and their average do not both fit, the average alone is stored as
    if it were the weights, as in Stable Diffusion's "ema-pruned" files.

    Args:
        autoencoder: The autoencoder's, by their names in `AutoencoderKL` or `VQModelInterface`.
        conditioner: Those of `cond_stage_model`, none if it has none.
        unet: The UNet's.
    """
    parts = {
        "model.diffusion_model": unet,
        "first_stage_model": autoencoder,
        "cond_stage_model": conditioner,
    }
    return {
        f"{part}.{name}": _stored(value)
        for part, weights in parts.items()
        for name, value in weights.items()
    }


def _stored(weight: Tensor) -> Tensor:
    return weight.half().contiguous()


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
