"""The networks of diffusers and transformers for a checkpoint in the CompVis layout.

Names and hyperparameters are translated by diffusers' own single-file loader, from the checkpoint
and a configuration as CompVis wrote them, so that a misreading of ours cannot cancel out.
"""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from released.compvis_files import CLIP_MERGES, clip_config, write_clip_vocabulary

VOCABULARY = CLIP_MERGES
TRAINED = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
SCHEDULERS = {
    "ddim": DDIMScheduler(**TRAINED, set_alpha_to_one=False, clip_sample=False),
    "euler": EulerDiscreteScheduler(**TRAINED),
}


def load_unet(checkpoint, config):
    """Return diffusers' UNet for a checkpoint: a path or a state dict."""
    return _loaded(UNet2DConditionModel, checkpoint, config)


def load_autoencoder(checkpoint, config):
    """Return diffusers' first stage for a checkpoint: a path or a state dict."""
    return _loaded(AutoencoderKL, checkpoint, config)


def load_text_encoder(state, spec, folder, kind=CLIPTextModel):
    """Return transformers' text encoder for a state dict; `folder` takes its configuration."""
    config = CLIPTextConfig(**clip_config(spec))
    config.save_pretrained(folder)
    twin = create_diffusers_clip_model_from_ldm(
        kind, state, config=str(folder), torch_dtype=torch.float32, local_files_only=True
    )
    return twin.requires_grad_(False)


def _loaded(network, checkpoint, config):
    twin = network.from_single_file(
        checkpoint, original_config=config, torch_dtype=torch.float32, local_files_only=True
    )
    return twin.eval().requires_grad_(False)


def clip_tokenizer(folder):
    """Return transformers' tokenizer over CLIP's vocabulary; `folder` takes its files."""
    write_clip_vocabulary(folder)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=77)
