"""Writes a trained system as one CompVis checkpoint, in fp16, with its configuration beside it."""

import torch

from models.shapes.catalog.systems import System
from models.shapes.data import scenes
from models.shapes.training.bert_text import load_words
from models.shapes.training.checkpoint_writer import (
    averaged_state,
    schedule_buffers,
    write_checkpoint,
)
from models.shapes.training.config_writer import ModelConfig, write_model_config
from models.shapes.training.corpus import load_scale
from models.shapes.training.diffusion import CAPTION_DROPOUT
from models.shapes.training.layouts import load_layouts
from models.shapes.training.system import trained_parts
from models.shapes.training.trainer import HERE
from models.shapes.training.velocity import alphas_cumprod
from models.shapes.training.vq import halves_of, load_first_stage

#: Bytes that a checkpoint may have, so that all of them can come along.
MOST_BYTES = 12_000_000


def pack(system: System) -> int:
    """Write `<name>.ckpt` and `<name>.yaml` beside the scripts; return the checkpoint's bytes.

    Raises:
        ValueError: The checkpoint is larger than it may be.
    """
    unet, conditioner, step = trained_parts(system)
    if system.encoder is not None:
        load = load_words if system.task == "text-to-image" else load_layouts
        conditioner = load().state_dict()
    first_stage = load_first_stage(system.first_stage)
    state = averaged_state(halves_of(first_stage), conditioner, unet)
    state |= schedule_buffers(alphas_cumprod(system.noise))
    state["scale_factor"] = torch.tensor(load_scale(system.first_stage))
    path = HERE / f"{system.name}.ckpt"
    write_checkpoint(path, state, step)
    write_model_config(HERE / f"{system.name}.yaml", config_of(system))
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than {MOST_BYTES:,}; shrink its UNet")
    return size


def config_of(system: System) -> ModelConfig:
    """Return what a system's checkpoint is."""
    spec = system.first_stage.spec
    return ModelConfig(
        task=system.task,
        unet=system.unet,
        autoencoder=spec,
        text_encoder=system.encoder,
        class_embedder=system.embedder,
        segmentation_encoder=system.segmentation_encoder,
        class_dropout=CAPTION_DROPOUT if system.embedder is not None else 0.0,
        schedule=system.noise.schedule,
        latent_size=scenes.SIZE // spec.factor,
    )
