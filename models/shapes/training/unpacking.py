"""Goes back from a packed model to the state that its training goes on from.

The state of the optimizer and the last weights are not in a checkpoint: training goes on from the
averages, with a warm-up.
"""

from pathlib import Path

import torch
from torch import Tensor

from models.shapes.catalog.autoencoders import AutoencoderConfig
from models.shapes.catalog.models import TrainedModel
from models.shapes.training.autoencoder import under
from models.shapes.training.bert_text import unpacked_words
from models.shapes.training.task_model import TaskModel
from models.shapes.training.trainer import HERE, WORK
from models.shapes.training.vq import Autoencoder

_ENCODING = ("encoder.", "quant_conv.")


def unpack(model: TrainedModel, *, folder: Path = HERE, work: Path = WORK) -> int:
    """Write a packed model's trained parts, and return the step they are from.

    Its autoencoder is written only where there is none: others may share it.

    Args:
        model: The model.
        folder: Where its checkpoint lies.
        work: Where training looks for its states.
    """
    packed = torch.load(folder / f"{model.name}.ckpt", weights_only=True)
    step = int(packed["global_step"])
    state = {name: value.float() for name, value in packed["state_dict"].items()}
    work.mkdir(exist_ok=True)
    autoencoder = work / f"{model.autoencoder.run}.pt"
    if not autoencoder.exists():
        weights = _autoencoder(model.autoencoder, under("first_stage_model.", state))
        _write(autoencoder, weights, model.autoencoder.cycles[-1].end)
    conditioner = under("cond_stage_model.", state)
    trained = {f"unet.{name}": value for name, value in _unet(state).items()}
    if TaskModel(model).conditioner is not None:
        trained |= {f"conditioner.{name}": value for name, value in conditioner.items()}
    elif model.encoder is not None:
        if model.task == "text-to-image":
            torch.save(unpacked_words(conditioner), work / "bert.pt")
        else:
            text = {f"text.{name}": value for name, value in conditioner.items()}
            torch.save({"ema": text}, work / "layouts.pt")
    _write(work / f"{model.name}.pt", trained, step)
    return step


def _unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return under("model.diffusion_model.", state)


def _autoencoder(config: AutoencoderConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of an `Autoencoder`, whose codes begin where they are."""
    model = Autoencoder(config.spec)
    halves = {
        f"{'encoder' if name.startswith(_ENCODING) else 'decoder'}.{name}": value
        for name, value in weights.items()
    }
    model.load_state_dict(model.state_dict() | halves)
    model.start()
    return model.state_dict()


def _write(path: Path, weights: dict[str, Tensor], step: int) -> None:
    torch.save({"model": weights, "ema": weights, "optimizer": None, "step": step}, path)
