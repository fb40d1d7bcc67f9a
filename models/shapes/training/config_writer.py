"""Writes a CompVis configuration of a checkpoint, as the released models have next to them.

What the weights can tell is in it, too. Classes are named for people; the reader here
compares the names and imports nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from ldm_runtime.specs.model import Task
from ldm_runtime.specs.networks import (
    AutoencoderSpec,
    ClassEmbedderSpec,
    SegmentationEncoderSpec,
    TextEncoderSpec,
    UNetSpec,
)

_ENCODERS = "ldm.modules.encoders.modules"
#: Those of a model of captions that is not in the catalog: as it is evaluated.
TEXT_SAMPLING: Mapping[str, str | float] = MappingProxyType(
    {"sampler": "ddim", "num_inference_steps": 50, "eta": 1.0, "guidance_scale": 3.0}
)
_LEFT_OPEN = -1  # CompVis's way to say that the other of two numbers counts


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The hyperparameters of a checkpoint.

    Attributes:
        task: Its task.
        unet: Its UNet.
        autoencoder: Its autoencoder.
        text_encoder: Encoder of prompts or layouts, if any.
        class_embedder: Encoder of classes, if any.
        segmentation_encoder: Encoder of segmentation maps, if any.
        class_dropout: Share of classes that training replaced by the last.
        schedule: First and last beta, and how many there are.
        says_prediction_type: Whether it says that the UNet predicts v; the checkpoint does if not.
        latent_size: Height and width in latent pixels.
        use_ema: Whether the checkpoint holds moving averages, to sample with.
        sampling: Sampling defaults, as fields of a request.
        label_names: Names of the labels 0, 1, …, if they have any.
    """

    task: Task
    unet: UNetSpec
    autoencoder: AutoencoderSpec
    text_encoder: TextEncoderSpec | None = None
    class_embedder: ClassEmbedderSpec | None = None
    segmentation_encoder: SegmentationEncoderSpec | None = None
    class_dropout: float = 0.0
    schedule: tuple[float, float, int]
    says_prediction_type: bool = True
    latent_size: int
    use_ema: bool = False
    sampling: Mapping[str, str | float] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()


def write_config(
    path: Path,
    *,
    unet: UNetSpec,
    autoencoder: AutoencoderSpec,
    text_encoder: TextEncoderSpec,
    schedule: tuple[float, float, int],
    latent_size: int,
) -> None:
    """Write the configuration of a text-to-image model whose checkpoint has moving averages."""
    write_model_config(
        path,
        ModelConfig(
            task="text-to-image",
            unet=unet,
            autoencoder=autoencoder,
            text_encoder=text_encoder,
            schedule=schedule,
            latent_size=latent_size,
            use_ema=True,
            sampling=TEXT_SAMPLING,
        ),
    )


def write_model_config(path: Path, model: ModelConfig) -> None:
    """Write a configuration; beyond CompVis' entries it has the sections that only we read."""
    config: dict[str, Any] = {"model": {"params": params_of(model)}}
    if model.sampling:
        config["sampling"] = dict(model.sampling)
    if model.label_names:
        config["label_names"] = list(model.label_names)
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def params_of(model: ModelConfig) -> dict[str, Any]:
    """Return the content of `model: params:`."""
    start, end, timesteps = model.schedule
    params: dict[str, Any] = {
        "linear_start": start,
        "linear_end": end,
        "timesteps": timesteps,
        **({"parameterization": "v"} if model.says_prediction_type else {}),
        "image_size": model.latent_size,
        "channels": model.unet.out_channels,
        "scale_by_std": True,
        "use_ema": model.use_ema,
    }
    if model.unet.context_dim is not None:
        params["conditioning_key"] = "hybrid" if model.unet.concat_channels else "crossattn"
    elif model.unet.concat_channels:
        params["concat_mode"] = True
    return params | {
        "unet_config": {"params": _unet(model.unet)},
        "first_stage_config": _autoencoder(model),
        "cond_stage_config": _conditioner(model),
    }


def _unet(unet: UNetSpec) -> dict[str, Any]:
    params: dict[str, Any] = {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": unet.model_channels,
        "channel_mult": list(unet.channel_mult),
        "num_res_blocks": unet.num_res_blocks,
        "attention_resolutions": [
            2**level for level, depth in enumerate(unet.transformer_depth) if depth
        ],
        "num_heads": unet.num_heads if unet.num_heads is not None else _LEFT_OPEN,
    }
    if unet.num_head_channels is not None:
        params["num_head_channels"] = unet.num_head_channels
    for flag in ("scale_shift_norm", "resblock_updown"):
        if getattr(unet, flag):
            params["resblock_updown" if flag == "resblock_updown" else f"use_{flag}"] = True
    if unet.attention == "transformer":
        params |= {
            "use_spatial_transformer": True,
            "transformer_depth": unet.middle_depth,
            "context_dim": unet.context_dim,
            "legacy": False,
        }
    return params


def _autoencoder(model: ModelConfig) -> dict[str, Any]:
    spec = model.autoencoder
    details: dict[str, Any] = {
        "double_z": spec.kind == "kl",
        "z_channels": spec.z_channels,
        "resolution": model.latent_size * spec.factor,
        "in_channels": spec.image_channels,
        "out_ch": spec.image_channels,
        "ch": spec.channels,
        "ch_mult": list(spec.channel_mult),
        "num_res_blocks": spec.num_res_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    if not spec.middle_attention:
        details["attn_type"] = "none"
    if spec.kind == "kl":
        return {"params": {"embed_dim": spec.embed_dim, "ddconfig": details}}
    return {
        "target": "ldm.models.autoencoder.VQModelInterface",
        "params": {
            "embed_dim": spec.embed_dim,
            "n_embed": spec.codebook_size,
            "ddconfig": details,
        },
    }


def _conditioner(model: ModelConfig) -> str | dict[str, Any]:
    """Return the conditioner as the released models of a task have it."""
    match model.task:
        case "unconditional":
            return "__is_unconditional__"
        case "inpainting":
            return "__is_first_stage__"
        case "super-resolution":
            return {"target": "torch.nn.Identity"}
        case _:
            return _learned_conditioner(model)


def _learned_conditioner(model: ModelConfig) -> dict[str, Any]:
    if model.class_embedder is not None:
        embedder = model.class_embedder
        params: Mapping[str, Any] = {
            "embed_dim": embedder.width,
            "n_classes": embedder.num_classes,
            "key": "class_label",
            "ucg_rate": model.class_dropout,
        }
        return {"target": f"{_ENCODERS}.ClassEmbedder", "params": dict(params)}
    if model.segmentation_encoder is not None:
        segmentation_encoder = model.segmentation_encoder
        params = {
            "n_stages": segmentation_encoder.num_downsampling_steps,
            "in_channels": segmentation_encoder.num_classes,
            "out_channels": segmentation_encoder.out_channels,
        }
        return {"target": f"{_ENCODERS}.SpatialRescaler", "params": dict(params)}
    assert model.text_encoder is not None, f"{model.task} has a conditioner"
    return _transformer(model.task, model.text_encoder)


def _transformer(task: Task, encoder: TextEncoderSpec) -> dict[str, Any]:
    if encoder.kind == "clip":
        heads = {"num_attention_heads": encoder.num_heads, "hidden_act": encoder.activation}
        return {"params": heads}
    params: dict[str, Any] = {"n_embed": encoder.width, "n_layer": encoder.num_layers}
    if task == "layout-to-image":
        params |= {
            "vocab_size": encoder.vocab_size,
            "max_seq_len": encoder.max_tokens,
            "use_tokenizer": False,
        }
    return {"target": f"{_ENCODERS}.BERTEmbedder", "params": params}
