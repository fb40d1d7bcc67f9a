"""The UNet of the shapes model: what it learns and how."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cycles import Cycle
from first_stage import NUM_CHECKED, load_data, load_latents
from ldm_export.networks.unet import UNet
from ldm_runtime.manifest import UNetSpec
from text import load_text_encoder, load_tokens
from trainer import Trainer

#: The lowest level has 4x4 pixels: seen from there, left and right of a scene are neighbours.
UNET = UNetSpec(
    in_channels=4,
    out_channels=4,
    model_channels=64,
    channel_mult=(1, 1, 2),
    num_res_blocks=1,
    attention="transformer",
    transformer_depth=(0, 1, 1),
    middle_depth=1,
    num_heads=8,
    num_head_channels=None,
    context_dim=64,
    linear_projection=False,
    scale_shift_norm=False,
    resblock_updown=False,
)
LINEAR_START, LINEAR_END, NUM_TRAIN_TIMESTEPS = 0.00085, 0.012, 1000

#: At 10,500 steps places were right and outlines still improving fast; the restart is for those.
CYCLES = (Cycle(end=12_000), Cycle(start=10_500, end=18_500, learning_rate=7e-4))
BATCH = 32
CAPTION_DROPOUT = 0.1
#: A timestep's loss, in terms of x0, is weighted by its signal-to-noise ratio within these bounds.
#: The upper one is that of Hang et al. 2023 (arXiv:2303.09556). The lower one gives high noise,
#: where it is decided what goes where, a voice: its share in the loss is tiny otherwise. It is
#: higher at first, while layout is learned, and half of the timesteps are then from the noisier
#: half; later shapes matter more, and high noise would drown them in what nobody can predict.
LAYOUT_STEPS = 4_000
LAYOUT_FLOOR, WEIGHT_FLOOR, WEIGHT_CEILING = 0.5, 0.15, 5.0
#: Spread of an offset that all of a channel's noise has in common ("offset noise"). Without it the
#: mean of noisy latents gives the background away, and the caption is not read.
OFFSET = 0.15


def training_alphas_cumprod(start: float = LINEAR_START, end: float = LINEAR_END) -> Tensor:
    """Return a noise schedule, Stable Diffusion's if not told: linear in the root of beta, float64.

    Args:
        start: First beta.
        end: Last beta.
    """
    roots = torch.linspace(start**0.5, end**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
    return torch.cumprod(1 - roots.square(), dim=0)


@dataclass(frozen=True, kw_only=True)
class VelocityLoss:
    """The loss of the UNet: of v, the velocity, weighted.

    Source: Salimans and Ho 2022 (arXiv:2202.00512), appendix D. At the last timestep a prediction
    of the noise has to repeat its input to within one percent before it says anything about x0;
    one of v says it at once.

    Attributes:
        unet: Predicts v.
        latents: Of every picture, (N, 4, 16, 16).
        contexts: Of every caption, (N + 1, 77, 64); the last row is that of the empty caption.
        alphas: The noise schedule's `alphas_cumprod`, float32.
    """

    unet: Callable[..., Tensor]
    latents: Tensor
    contexts: Tensor
    alphas: Tensor

    def __call__(self, rows: Tensor, *, layout: bool) -> Tensor:
        """Return the loss on some rows of the data, in the first part of training or later."""
        timesteps = _random_timesteps(len(rows), layout=layout)
        alpha = self.alphas[timesteps][:, None, None, None]
        clean, noise = self.latents[rows], torch.randn(len(rows), *self.latents.shape[1:])
        noise = noise + OFFSET * torch.randn(len(rows), clean.shape[1], 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            context = self.contexts[self._captions(rows)]
            prediction = self.unet(noisy, timesteps.float(), context).float()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        errors = F.mse_loss(prediction, velocity, reduction="none").mean((1, 2, 3))
        floor = LAYOUT_FLOOR if layout else WEIGHT_FLOOR
        return (errors * self._weights(timesteps, floor)).mean()

    def _captions(self, rows: Tensor) -> Tensor:
        dropped = torch.rand(len(rows)) < CAPTION_DROPOUT
        return torch.where(dropped, len(self.contexts) - 1, rows)

    def _weights(self, timesteps: Tensor, floor: float) -> Tensor:
        ratio = self.alphas[timesteps] / (1 - self.alphas[timesteps])
        return ratio.clamp(floor, WEIGHT_CEILING) / (1 + ratio)


def _random_timesteps(count: int, *, layout: bool) -> Tensor:
    """Draw timesteps, while layout is learned every other one from the noisier half."""
    timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (count,))
    if layout:
        noisier = NUM_TRAIN_TIMESTEPS // 2
        timesteps[::2] = timesteps[::2] % noisier + noisier
    return timesteps


def train_diffusion() -> None:
    """Train the UNet to predict v.

    Not compiled: compiled by torch 2.13, under autocast on a CPU, the lower levels got no gradient
    (their last layers were exactly zero after 1,000 steps), and no caption changed a picture.
    """
    _, captions = load_data()
    latents, _ = load_latents()
    torch.manual_seed(0)
    unet = UNet(UNET)
    _initialise(unet)
    loss = VelocityLoss(
        unet=unet,
        latents=latents,
        contexts=_encode(captions),
        alphas=training_alphas_cumprod().float(),
    )
    trained = len(latents) - NUM_CHECKED

    @torch.no_grad()
    def check() -> dict[str, float]:
        torch.manual_seed(0)
        rows = torch.split(torch.arange(trained, len(latents)), BATCH)
        losses = [loss(part, layout=False) for part in 4 * rows]
        return {"held_out_loss": torch.stack(losses).mean().item()}

    with sdpa_kernel(SDPBackend.MATH):  # three times as fast backward for so few tokens
        Trainer("diffusion", unet, *CYCLES).run(
            lambda step: loss(torch.randint(trained, (BATCH,)), layout=step < LAYOUT_STEPS), check
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
