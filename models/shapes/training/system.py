"""How a system is trained, and the pictures by which its training is watched."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_export.networks.conditioners import ClassEmbedder, SpatialRescaler
from ldm_export.networks.unet import UNet
from models.shapes.catalog.systems import System
from models.shapes.data.labels import class_colors
from models.shapes.evaluation.judging import InputImage
from models.shapes.evaluation.scores import judge_all, scores
from models.shapes.training.conditions import Conditions, guided, open_conditions, predict_with
from models.shapes.training.corpus import Corpus, load_corpus
from models.shapes.training.diffusion import BATCH, CAPTION_DROPOUT
from models.shapes.training.first_stage import NUM_CHECKED, under
from models.shapes.training.layouts import label_contexts
from models.shapes.training.muon import MuonAndAdamW
from models.shapes.training.trainer import WORK, Trainer
from models.shapes.training.velocity import ddim, velocity_loss
from models.shapes.training.vq import Autoencoder, load_first_stage

#: Pictures that a check in passing draws, and in how many steps.
NUM_GLANCED, GLANCED_STEPS = 24, 16
_LOSSES = 4  # noises of each held-out row whose losses are averaged
_DRAWN_TOGETHER = 32


class SystemModel(nn.Module):
    """The UNet of a system, and the conditioner that is trained with it, if there is one."""

    def __init__(self, system: System) -> None:
        super().__init__()
        self.unet = UNet(system.unet)
        self.conditioner: nn.Module | None = None
        if system.embedder is not None:
            self.conditioner = ClassEmbedder(system.embedder)
        if system.segmentation_encoder is not None:
            self.conditioner = SpatialRescaler(system.segmentation_encoder)

    def initialise(self) -> None:
        """Make every block of the UNet the identity, and every class of a pixel its colour."""
        silent = ("out_layers.3.weight", "proj_out.weight", "out.2.weight")
        for name, parameter in self.unet.named_parameters():
            if name.endswith(silent):
                nn.init.zeros_(parameter)
        if isinstance(self.conditioner, SpatialRescaler):
            with torch.no_grad():
                colors = torch.from_numpy(class_colors())
                self.conditioner.channel_mapper.weight.copy_(colors.T[:, :, None, None])

    def begin_with(self, unet: dict[str, Tensor]) -> None:
        """Go on from the UNet of layouts, whose labels classes then are."""
        self.unet.load_state_dict(unet)
        if isinstance(self.conditioner, ClassEmbedder):
            with torch.no_grad():
                self.conditioner.embedding.weight.copy_(label_contexts())

    def optimizer(self) -> MuonAndAdamW:
        """Return Muon for the matrices between the UNet's first layer and its last."""
        ends = ("unet.input_blocks.0.", "unet.out.", "conditioner.")
        parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            parts[parameter.ndim > 1 and not name.startswith(ends)].append(parameter)
        return MuonAndAdamW(matrices=parts[True], others=parts[False])


def train_system(system: System) -> None:
    """Train a system's UNet to predict v. Not compiled: see `diffusion.train_diffusion`."""
    corpus = load_corpus(system)
    conditions = open_conditions(system, corpus)
    torch.manual_seed(0)
    model = SystemModel(system)
    model.initialise()
    if system.begins_with is not None:
        state = torch.load(WORK / f"{system.begins_with}.pt", weights_only=True)
        model.begin_with(under("unet.", state["ema"]))
    optimizer = model.optimizer() if system.optimizer == "muon" else None
    trainer = Trainer(system.name, model, *system.cycles, optimizer=optimizer)
    trained = len(corpus.latents) - NUM_CHECKED
    checked = open_check(system, corpus, conditions)

    def loss_at(step: int) -> Tensor:
        rows = torch.randint(trained, (BATCH,))
        layout = any(step in steps for steps in system.layout_steps)
        return system_loss(system, model, corpus.latents, conditions, rows, layout=layout)

    with sdpa_kernel(SDPBackend.MATH):  # three times as fast backward for so few tokens
        trainer.run(loss_at, lambda: checked(trainer.ema))


def system_loss(
    system: System,
    model: SystemModel,
    latents: Tensor,
    conditions: Conditions,
    rows: Tensor,
    *,
    layout: bool,
) -> Tensor:
    """Return the loss on some rows of the corpus."""
    dropped = torch.zeros(len(rows), dtype=torch.bool)
    if system.drops:
        dropped = torch.rand(len(rows)) < CAPTION_DROPOUT
    condition = conditions(model.conditioner, rows, dropped)
    predict = predict_with(model.unet, condition)
    return velocity_loss(predict, latents[rows], system.noise, layout=layout)


def open_check(
    system: System, corpus: Corpus, conditions: Conditions
) -> Callable[[dict[str, Tensor]], dict[str, float]]:
    """Return what measures weights on rows that were not trained on: loss, and a few pictures."""
    first_stage = load_first_stage(system.first_stage)
    held_out = torch.arange(len(corpus.latents) - NUM_CHECKED, len(corpus.latents))

    @torch.no_grad()
    def check(weights: dict[str, Tensor]) -> dict[str, float]:
        torch.manual_seed(0)
        model = open_system(system, weights)
        losses = [
            system_loss(system, model, corpus.latents, conditions, part, layout=False)
            for part in _LOSSES * torch.split(held_out, BATCH)
        ]
        rows = held_out[-NUM_GLANCED:]
        drawn = draw(system, model, (corpus, conditions, first_stage), rows, GLANCED_STEPS)
        asked = [corpus.questions[row] for row in rows.tolist()]
        found = scores(judge_all(system.task, asked, drawn))
        return {"held_out_loss": torch.stack(losses).mean().item()} | found

    return check


def check_system(system: System, count: int, num_steps: int) -> dict[str, float]:
    """Return the scores of pictures drawn with the weights that are saved.

    Args:
        system: Which.
        count: Pictures, at most as many as are never trained on.
        num_steps: DDIM steps of each.
    """
    corpus = load_corpus(system)
    conditions = open_conditions(system, corpus)
    state = torch.load(WORK / f"{system.name}.pt", weights_only=True)
    model = open_system(system, state["ema"])
    rows = torch.arange(len(corpus.latents) - min(count, NUM_CHECKED), len(corpus.latents))
    passes = corpus, conditions, load_first_stage(system.first_stage)
    torch.manual_seed(0)
    drawn = draw(system, model, passes, rows, num_steps)
    return scores(judge_all(system.task, [corpus.questions[row] for row in rows], drawn))


def open_system(system: System, weights: dict[str, Tensor]) -> SystemModel:
    """Return a system with the given weights, not for training."""
    model = SystemModel(system)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def draw(
    system: System,
    model: SystemModel,
    passes: tuple[Corpus, Conditions, Autoencoder],
    rows: Tensor,
    num_steps: int,
) -> list[InputImage]:
    """Return a picture for each of some rows of a corpus, of noise from torch's generator."""
    corpus, conditions, first_stage = passes
    pictures: list[InputImage] = []
    for part in torch.split(rows, _DRAWN_TOGETHER):
        noise = torch.randn(len(part), *corpus.latents.shape[1:])
        both = [
            conditions(model.conditioner, part, torch.full((len(part),), dropped))
            for dropped in (False, True)
        ]
        predict = predict_with(model.unet, both[0])
        if system.guidance_scale != 1:
            predict = guided(model.unet, both, system.guidance_scale)
        decoded = first_stage.decoder(ddim(predict, noise, system.noise, num_steps) / corpus.scale)
        levels = (127.5 * (decoded.clamp(-1, 1) + 1)).round().to(torch.uint8)
        pictures += list(levels.movedim(1, 3).numpy())
    asked = [corpus.questions[row] for row in rows.tolist()]
    return [
        picture if each.hole is None else np.where(each.hole[..., None], picture, each.truth)
        for each, picture in zip(asked, pictures, strict=True)
    ]


def trained_parts(system: System) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Return the averaged weights of a system's UNet and of its conditioner, and the step."""
    state = torch.load(WORK / f"{system.name}.pt", weights_only=True)
    return under("unet.", state["ema"]), under("conditioner.", state["ema"]), state["step"]
