"""The files next to a checkpoint in CompVis's layout, from which diffusers opens it."""

import gzip
import json
from pathlib import Path
from typing import Any

from ldm_runtime.specs.networks import AutoencoderSpec, TextEncoderSpec, UNetSpec
from measuring.rows import ROOT

#: CLIP's byte-pair merges, as OpenAI wrote them.
CLIP_MERGES = ROOT / "ldm_export/vocabularies/clip_bpe_simple_vocab_16e6.txt.gz"
#: The lines of that file that its vocabulary uses.
_MERGES = slice(1, 48895)


def compvis_config(unet: UNetSpec, autoencoder: AutoencoderSpec) -> dict[str, Any]:
    """Return `config.yaml` of a model, as far as diffusers reads it."""
    depths = {depth for depth in (*unet.transformer_depth, unet.middle_depth) if depth}
    (depth,) = depths  # the configurations of that time have one number
    heads = {"num_heads": unet.num_heads, "num_head_channels": unet.num_head_channels}
    unet_params: dict[str, Any] = {
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


def clip_config(spec: TextEncoderSpec) -> dict[str, Any]:
    """Return the entries of `config.json` of transformers' CLIP text encoder."""
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "intermediate_size": spec.feed_forward_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "max_position_embeddings": spec.max_tokens,
        "hidden_act": spec.activation,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": spec.pad_token_id,
        "projection_dim": spec.pooled_dim or spec.width,
    }


def write_clip_vocabulary(folder: Path) -> None:
    """Write CLIP's vocabulary as transformers' tokenizer reads it."""
    merges = gzip.decompress(CLIP_MERGES.read_bytes()).decode().split("\n")[_MERGES]
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
    symbols = [chr(byte) for byte in visible]
    symbols += [chr(0x100 + index) for index in range(0x100 - len(visible))]
    vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    vocabulary += [merge.replace(" ", "") for merge in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
