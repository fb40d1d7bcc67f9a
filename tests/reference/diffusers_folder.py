"""A small Stable Diffusion as diffusers builds and saves it, random in every layer, for tests."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from tests.reference.twins import clip_tokenizer

#: Three levels and two ResNet blocks each, so that no numbering is right by accident.
UNET = {
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "sample_size": 8,
}
AUTOENCODER = {
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": 4,
    "scaling_factor": 0.25,
}
TEXT_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
}
SCHEDULER = {
    "beta_start": 0.001,
    "beta_end": 0.01,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Return a module in which no layer is zero, nor any output large."""
    for name, parameter in module.eval().requires_grad_(False).named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.5 if "embedding." in name else parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
    return module


def small_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Return a pipeline; the tokenizer's files are written to `folder`."""
    torch.manual_seed(3)
    return StableDiffusionPipeline(
        unet=randomised(UNet2DConditionModel(**UNET)),
        vae=randomised(AutoencoderKL(**AUTOENCODER)),
        text_encoder=randomised(CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))),
        tokenizer=clip_tokenizer(folder),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def edit_json(path: Path, **changes: object) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
