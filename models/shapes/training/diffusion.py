"""The UNet of the shapes model: its hyperparameters, loss and training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_export.networks.unet import UNet
from models.shapes.catalog.learning_rate import Cycle
from models.shapes.catalog.noise import TOLD, Noise
from models.shapes.catalog.shapes_unet import UNET
from models.shapes.data import scenes
from models.shapes.training.autoencoder import NUM_CHECKED, load_latents
from models.shapes.training.clip_text import load_text_encoder, load_tokens
from models.shapes.training.corpus import load_scenes, wording_of
from models.shapes.training.muon import muon
from models.shapes.training.precision import autocast
from models.shapes.training.trainer import Trainer
from models.shapes.training.velocity import velocity_loss

#: At 10,500 steps places were right and outlines still improving fast; the restart is for those.
#: Half of the captions are short from 18,500 on, where AdamW gave way to Muon, too.
CYCLES = (
    Cycle(end=12_000),
    Cycle(start=10_500, end=18_500, learning_rate=7e-4),
    Cycle(start=18_500, end=22_000, learning_rate=2e-3),
    Cycle(start=22_000, end=29_000, learning_rate=2e-3),
)
BATCH = 32
CAPTION_DROPOUT = 0.1
#: Steps in which high noise weighs more: the first ones, and those of the last restart that are to
#: take away what one thing too many puts into an image.
LAYOUT_STEPS = (range(4_000), range(22_000, 26_000))


@dataclass(frozen=True, kw_only=True)
class CaptionLoss:
    """The loss of the UNet on images and their captions, of which some are dropped.

    Attributes:
        unet: Predicts v.
        latents: Of every image, (N, 4, 16, 16).
        contexts: Of every caption, (N + 1, 77, 64); the last row is that of the empty caption.
        concat: Channels that go with every image's latents into the UNet, (N, C, 16, 16), or None.
        noise: The noise that is added.
    """

    unet: Callable[..., Tensor]
    latents: Tensor
    contexts: Tensor
    concat: Tensor | None = None
    noise: Noise = TOLD

    def __call__(self, rows: Tensor, *, layout: bool) -> Tensor:
        """Return the loss on some rows of the data, in the first part of training or later."""

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            given = [noisy] if self.concat is None else [noisy, self.concat[rows]]
            with autocast():
                context = self.contexts[self._captions(rows)].float()
                prediction: Tensor = self.unet(torch.cat(given, dim=1), timesteps, context)
            return prediction

        return velocity_loss(predict, self.latents[rows], self.noise, layout=layout)

    def _captions(self, rows: Tensor) -> Tensor:
        dropped = torch.rand(len(rows)) < CAPTION_DROPOUT
        return torch.where(dropped, len(self.contexts) - 1, rows)


def train_diffusion() -> None:
    """Train the UNet to predict v."""
    latents, _ = load_latents()
    torch.manual_seed(0)
    unet = UNet(UNET)
    _initialise(unet)
    loss = CaptionLoss(unet=unet, latents=latents, contexts=load_contexts())
    train_captioned("diffusion", unet, loss, CYCLES, LAYOUT_STEPS)


def load_contexts() -> Tensor:
    """Return the context of every caption of the data and of the empty one, (N + 1, 77, 64)."""
    sampled = load_scenes()
    return _encode([scenes.caption(scene, wording_of(row)) for row, scene in enumerate(sampled)])


def train_captioned(
    name: str,
    unet: UNet,
    loss: CaptionLoss,
    cycles: Sequence[Cycle],
    layout_steps: Sequence[range],
) -> None:
    """Train a UNet on images and their captions.

    Not compiled: compiled by torch 2.13, under autocast on a CPU, the lower levels got no gradient
    (their last layers were exactly zero after 1,000 steps), and no caption changed an image.

    Args:
        name: Of the training run.
        unet: As it begins.
        loss: Its loss; the last `NUM_CHECKED` rows are never trained on.
        cycles: Steps and learning rates.
        layout_steps: Ranges of steps in which high noise weighs more.
    """
    trained = len(loss.latents) - NUM_CHECKED

    @torch.no_grad()
    def check() -> dict[str, float]:
        torch.manual_seed(0)
        rows = torch.split(torch.arange(trained, len(loss.latents)), BATCH)
        losses = [loss(part, layout=False) for part in 4 * rows]
        return {"held_out_loss": torch.stack(losses).mean().item()}

    with sdpa_kernel(SDPBackend.MATH):  # three times as fast backward for so few tokens
        optimizer = muon(unet, ("input_blocks.0.", "out."))
        Trainer(name, unet, *cycles, optimizer=optimizer).run(
            lambda step: loss(
                torch.randint(trained, (BATCH,)),
                layout=any(step in steps for steps in layout_steps),
            ),
            check,
        )


@torch.no_grad()
def _encode(captions: Sequence[str]) -> Tensor:
    """Return the context of every caption and of the empty one, (N + 1, 77, 64) bfloat16."""
    encoder = load_text_encoder()
    parts = torch.split(load_tokens(captions), 256)
    return torch.cat([encoder(part).bfloat16() for part in parts])


def _initialise(unet: UNet) -> None:
    """Make every block the identity."""
    for name, parameter in unet.named_parameters():
        if name.endswith(("out_layers.3.weight", "proj_out.weight", "out.2.weight")):
            nn.init.zeros_(parameter)
