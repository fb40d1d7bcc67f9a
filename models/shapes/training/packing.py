"""Writes a trained model as one CompVis checkpoint, in fp16, with its configuration next to it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from models.shapes.catalog.models import TrainedModel
from models.shapes.data import scenes
from models.shapes.data.labels import class_names, label_names
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
from models.shapes.training.task_model import trained_parts
from models.shapes.training.trainer import HERE
from models.shapes.training.velocity import alphas_cumprod
from models.shapes.training.vq import halves_of, load_vq

#: Names of what the requests of a task number.
_NAMES: Mapping[str, Callable[[], list[str]]] = MappingProxyType(
    {
        "class-to-image": label_names,
        "layout-to-image": label_names,
        "semantic-synthesis": class_names,
    }
)
#: Bytes that a checkpoint may have, so that all of them can come along.
MOST_BYTES = 12_000_000


def pack(model: TrainedModel) -> int:
    """Write `<name>.ckpt` and `<name>.yaml` next to the scripts; return the checkpoint's bytes.

    Raises:
        ValueError: The checkpoint is larger than it may be.
    """
    unet, conditioner, step = trained_parts(model)
    if model.encoder is not None:
        load = load_words if model.task == "text-to-image" else load_layouts
        conditioner = load().state_dict()
    autoencoder = load_vq(model.autoencoder)
    state = averaged_state(halves_of(autoencoder), conditioner, unet)
    state |= schedule_buffers(alphas_cumprod(model.noise))
    state["scale_factor"] = torch.tensor(load_scale(model.autoencoder))
    path = HERE / f"{model.name}.ckpt"
    write_checkpoint(path, state, step)
    write_model_config(HERE / f"{model.name}.yaml", config_of(model))
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than {MOST_BYTES:,}; shrink its UNet")
    return size


def config_of(model: TrainedModel) -> ModelConfig:
    """Return the configuration of a model's checkpoint."""
    spec = model.autoencoder.spec
    return ModelConfig(
        task=model.task,
        unet=model.unet,
        autoencoder=spec,
        text_encoder=model.encoder,
        class_embedder=model.embedder,
        segmentation_encoder=model.segmentation_encoder,
        class_dropout=CAPTION_DROPOUT if model.embedder is not None else 0.0,
        schedule=model.noise.schedule,
        latent_size=scenes.SIZE // spec.factor,
        sampling=model.sampling,
        label_names=tuple(_NAMES.get(model.task, list)()),
    )
