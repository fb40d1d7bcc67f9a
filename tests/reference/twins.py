"""The networks of diffusers and transformers for a checkpoint in the CompVis layout.

Names and hyperparameters are translated by diffusers' own single-file loader, from the checkpoint
and a configuration as CompVis wrote them, so that a misreading of ours cannot cancel out.
"""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

VOCABULARY = Path(
    find_spec("ldm_export").submodule_search_locations[0],
    "vocabularies",
    "clip_bpe_simple_vocab_16e6.txt.gz",
)
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


def compvis_config(unet, autoencoder):
    """Return `config.yaml` of a model, as far as diffusers reads it."""
    depths = {depth for depth in (*unet.transformer_depth, unet.middle_depth) if depth}
    (depth,) = depths  # the configurations of that time have one number
    heads = {"num_heads": unet.num_heads, "num_head_channels": unet.num_head_channels}
    unet_params = {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": unet.model_channels,
        "attention_resolutions": [
            2**level for level, depth in enumerate(unet.transformer_depth) if depth
        ],
        "num_res_blocks": unet.num_res_blocks,
        "channel_mult": list(unet.channel_mult),
        "use_spatial_transformer": True,
        "use_linear_in_transformer": unet.linear_projection,
        "transformer_depth": depth,
        "context_dim": unet.context_dim,
        **{name: value for name, value in heads.items() if value is not None},
    }
    if unet.vector_dim is not None:
        unet_params |= {"num_classes": "sequential", "adm_in_channels": unet.vector_dim}
    if unet.num_classes is not None:
        unet_params |= {
            "num_classes": unet.num_classes,
            "disable_self_attentions": [
                level in unet.cross_attention_only for level in range(len(unet.channel_mult))
            ],
        }
    ddconfig = {
        "z_channels": autoencoder.z_channels,
        "in_channels": autoencoder.image_channels,
        "out_ch": autoencoder.image_channels,
        "ch": autoencoder.channels,
        "ch_mult": list(autoencoder.channel_mult),
        "num_res_blocks": autoencoder.num_res_blocks,
        "attn_resolutions": [],
    }
    return {
        "model": {
            "params": {
                "scale_factor": autoencoder.latent_scale_factor,
                "unet_config": {"params": unet_params},
                "first_stage_config": {"params": {"ddconfig": ddconfig}},
            }
        }
    }


def load_unet(checkpoint, config):
    """Return diffusers' UNet for a checkpoint: a path or a state dict."""
    return _loaded(UNet2DConditionModel, checkpoint, config)


def load_autoencoder(checkpoint, config):
    """Return diffusers' first stage for a checkpoint: a path or a state dict."""
    return _loaded(AutoencoderKL, checkpoint, config)


def load_text_encoder(state, spec, folder, kind=CLIPTextModel):
    """Return transformers' text encoder for a state dict; `folder` takes its configuration."""
    config = CLIPTextConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.width,
        intermediate_size=spec.feed_forward_dim,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        max_position_embeddings=spec.max_tokens,
        hidden_act=spec.activation,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=spec.pad_token_id,
        projection_dim=spec.pooled_dim or spec.width,
    )
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
    merges = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")[1:48895]
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
    symbols = [chr(byte) for byte in visible]
    symbols += [chr(0x100 + index) for index in range(0x100 - len(visible))]
    vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    vocabulary += [merge.replace(" ", "") for merge in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=77)
