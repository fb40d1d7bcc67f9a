"""Goes back from a packed system to what its training goes on from.

The state of the optimizer and the last weights are not in a checkpoint: training goes on from the
averages, with a warm-up.
"""

from pathlib import Path

import torch
from torch import Tensor

from models.shapes.catalog.recipes import Recipe
from models.shapes.catalog.systems import System
from models.shapes.training.first_stage import under
from models.shapes.training.system import SystemModel
from models.shapes.training.trainer import HERE, WORK
from models.shapes.training.vq import Autoencoder

_ENCODING = ("encoder.", "quant_conv.")


def unpack(system: System, *, folder: Path = HERE, work: Path = WORK) -> int:
    """Write a packed system's trained parts, and return the step they are from.

    Its first stage is written only where there is none: others may share it.

    Args:
        system: Which.
        folder: Where its checkpoint lies.
        work: Where training looks for its states.
    """
    packed = torch.load(folder / f"{system.name}.ckpt", weights_only=True)
    step = int(packed["global_step"])
    state = {name: value.float() for name, value in packed["state_dict"].items()}
    work.mkdir(exist_ok=True)
    first_stage = work / f"{system.first_stage.stage}.pt"
    if not first_stage.exists():
        weights = _first_stage(system.first_stage, under("first_stage_model.", state))
        _write(first_stage, weights, system.first_stage.cycles[-1].end)
    conditioner = under("cond_stage_model.", state)
    trained = {f"unet.{name}": value for name, value in _unet(state).items()}
    if SystemModel(system).conditioner is not None:
        trained |= {f"conditioner.{name}": value for name, value in conditioner.items()}
    elif system.encoder is not None:
        stage = "bert" if system.task == "text-to-image" else "layouts"
        text = {f"text.{name}": value for name, value in conditioner.items()}
        torch.save({"ema": text}, work / f"{stage}.pt")
    _write(work / f"{system.name}.pt", trained, step)
    return step


def _unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return under("model.diffusion_model.", state)


def _first_stage(recipe: Recipe, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of an `Autoencoder`, whose codes begin where they are."""
    model = Autoencoder(recipe.spec)
    halves = {
        f"{'encoder' if name.startswith(_ENCODING) else 'decoder'}.{name}": value
        for name, value in weights.items()
    }
    model.load_state_dict(model.state_dict() | halves)
    model.start()
    return model.state_dict()


def _write(path: Path, weights: dict[str, Tensor], step: int) -> None:
    torch.save({"model": weights, "ema": weights, "optimizer": None, "step": step}, path)
