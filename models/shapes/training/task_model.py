"""Training of a model, and the images by which it is watched."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_export.networks.conditioners import ClassEmbedder, SpatialRescaler
from ldm_export.networks.unet import UNet
from models.shapes.catalog.models import TrainedModel
from models.shapes.data.labels import class_colors
from models.shapes.evaluation.scores import score_all, scores
from models.shapes.evaluation.scoring import InputImage
from models.shapes.training.autoencoder import NUM_CHECKED, under
from models.shapes.training.conditions import Conditions, guided, open_conditions, predict_with
from models.shapes.training.corpus import Corpus, load_corpus
from models.shapes.training.diffusion import BATCH, CAPTION_DROPOUT
from models.shapes.training.layouts import label_contexts
from models.shapes.training.muon import MuonAndAdamW, muon
from models.shapes.training.trainer import WORK, Trainer
from models.shapes.training.velocity import ddim, velocity_loss
from models.shapes.training.vq import Autoencoder, load_vq

#: Images that a check in passing generates, and in how many steps.
NUM_GLANCED, GLANCED_STEPS = 24, 16
_LOSSES = 4  # noises of each held-out row whose losses are averaged
_GENERATED_TOGETHER = 32


class TaskModel(nn.Module):
    """The UNet of a model, and the conditioner that is trained with it, if there is one."""

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.unet = UNet(model.unet)
        self.conditioner: nn.Module | None = None
        if model.embedder is not None:
            self.conditioner = ClassEmbedder(model.embedder)
        if model.segmentation_encoder is not None:
            self.conditioner = SpatialRescaler(model.segmentation_encoder)

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
        return muon(self, ("unet.input_blocks.0.", "unet.out.", "conditioner."))


def train_task(model: TrainedModel) -> None:
    """Train a model's UNet to predict v. Not compiled: see `diffusion.train_diffusion`."""
    corpus = load_corpus(model)
    conditions = open_conditions(model, corpus)
    torch.manual_seed(0)
    network = TaskModel(model)
    network.initialise()
    if model.begins_with is not None:
        state = torch.load(WORK / f"{model.begins_with}.pt", weights_only=True)
        network.begin_with(under("unet.", state["ema"]))
    optimizer = network.optimizer() if model.optimizer == "muon" else None
    trainer = Trainer(model.name, network, *model.cycles, optimizer=optimizer)
    trained = len(corpus.latents) - NUM_CHECKED
    checked = open_check(model, corpus, conditions)

    def loss_at(step: int) -> Tensor:
        rows = torch.randint(trained, (BATCH,))
        layout = any(step in steps for steps in model.layout_steps)
        return task_loss(model, network, corpus.latents, conditions, rows, layout=layout)

    with sdpa_kernel(SDPBackend.MATH):  # three times as fast backward for so few tokens
        trainer.run(loss_at, lambda: checked(trainer.ema))


def task_loss(
    model: TrainedModel,
    network: TaskModel,
    latents: Tensor,
    conditions: Conditions,
    rows: Tensor,
    *,
    layout: bool,
) -> Tensor:
    """Return the loss on some rows of the corpus."""
    dropped = torch.zeros(len(rows), dtype=torch.bool)
    if model.drops:
        dropped = torch.rand(len(rows)) < CAPTION_DROPOUT
    condition = conditions(network.conditioner, rows, dropped)
    predict = predict_with(network.unet, condition)
    return velocity_loss(predict, latents[rows], model.noise, layout=layout)


def open_check(
    model: TrainedModel, corpus: Corpus, conditions: Conditions
) -> Callable[[dict[str, Tensor]], dict[str, float]]:
    """Return a check of weights on rows that were not trained on: loss, and a few images."""
    autoencoder = load_vq(model.autoencoder)
    held_out = torch.arange(len(corpus.latents) - NUM_CHECKED, len(corpus.latents))

    @torch.no_grad()
    def check(weights: dict[str, Tensor]) -> dict[str, float]:
        torch.manual_seed(0)
        network = open_task_model(model, weights)
        losses = [
            task_loss(model, network, corpus.latents, conditions, part, layout=False)
            for part in _LOSSES * torch.split(held_out, BATCH)
        ]
        rows = held_out[-NUM_GLANCED:]
        generated = generate(model, network, (corpus, conditions, autoencoder), rows, GLANCED_STEPS)
        asked = [corpus.prompts[row] for row in rows.tolist()]
        found = scores(score_all(model.task, asked, generated))
        return {"held_out_loss": torch.stack(losses).mean().item()} | found

    return check


def check_task(model: TrainedModel, count: int, num_steps: int) -> dict[str, float]:
    """Return the scores of images generated with the saved weights.

    Args:
        model: The model.
        count: Images, at most as many as are never trained on.
        num_steps: DDIM steps of each.
    """
    corpus = load_corpus(model)
    conditions = open_conditions(model, corpus)
    state = torch.load(WORK / f"{model.name}.pt", weights_only=True)
    network = open_task_model(model, state["ema"])
    rows = torch.arange(len(corpus.latents) - min(count, NUM_CHECKED), len(corpus.latents))
    passes = corpus, conditions, load_vq(model.autoencoder)
    torch.manual_seed(0)
    generated = generate(model, network, passes, rows, num_steps)
    return scores(score_all(model.task, [corpus.prompts[row] for row in rows], generated))


def open_task_model(model: TrainedModel, weights: dict[str, Tensor]) -> TaskModel:
    """Return a model with the given weights, not for training."""
    network = TaskModel(model)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def generate(
    model: TrainedModel,
    network: TaskModel,
    passes: tuple[Corpus, Conditions, Autoencoder],
    rows: Tensor,
    num_steps: int,
) -> list[InputImage]:
    """Return an image for each of some rows of a corpus, of noise from torch's generator."""
    corpus, conditions, autoencoder = passes
    images: list[InputImage] = []
    for part in torch.split(rows, _GENERATED_TOGETHER):
        noise = torch.randn(len(part), *corpus.latents.shape[1:])
        both = [
            conditions(network.conditioner, part, torch.full((len(part),), dropped))
            for dropped in (False, True)
        ]
        predict = predict_with(network.unet, both[0])
        if model.guidance_scale != 1:
            predict = guided(network.unet, both, model.guidance_scale)
        decoded = autoencoder.decoder(ddim(predict, noise, model.noise, num_steps) / corpus.scale)
        levels = (127.5 * (decoded.clamp(-1, 1) + 1)).round().to(torch.uint8)
        images += list(levels.movedim(1, 3).numpy())
    asked = [corpus.prompts[row] for row in rows.tolist()]
    return [
        image if each.mask is None else np.where(each.mask[..., None], image, each.truth)
        for each, image in zip(asked, images, strict=True)
    ]


def trained_parts(model: TrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Return the averaged weights of a model's UNet and of its conditioner, and the step."""
    state = torch.load(WORK / f"{model.name}.pt", weights_only=True)
    return under("unet.", state["ema"]), under("conditioner.", state["ema"]), state["step"]
