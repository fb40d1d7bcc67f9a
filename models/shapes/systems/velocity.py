"""The loss that every system learns by, and the few DDIM steps by which training is watched.

What is learned is v (Salimans and Ho 2022, arXiv:2202.00512, appendix D), with the schedule, the
weights and the offset of the noise that `diffusion.py` settled on and explains.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import (
    LAYOUT_FLOOR,
    NUM_TRAIN_TIMESTEPS,
    OFFSET,
    WEIGHT_CEILING,
    WEIGHT_FLOOR,
    training_alphas_cumprod,
)

#: Maps noisy latents (B, C, h, w) and timesteps (B,) float32 to v.
Predict = Callable[[Tensor, Tensor], Tensor]

ALPHAS = training_alphas_cumprod().float()


def velocity_loss(predict: Predict, clean: Tensor, *, layout: bool) -> Tensor:
    """Return the loss of v on latents with noise of random strength.

    Args:
        predict: The network, with everything that conditions it.
        clean: Latents (B, C, h, w) of unit variance.
        layout: Whether it is still being learned what goes where: half of the timesteps are then
            from the noisier half, and high noise weighs more.
    """
    timesteps = random_timesteps(len(clean), layout=layout)
    alpha = ALPHAS[timesteps][:, None, None, None]
    noise = torch.randn_like(clean) + OFFSET * torch.randn(*clean.shape[:2], 1, 1)
    prediction = predict(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, timesteps.float())
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    errors = F.mse_loss(prediction.float(), velocity, reduction="none").mean((1, 2, 3))
    floor = LAYOUT_FLOOR if layout else WEIGHT_FLOOR
    return (errors * weights_of(timesteps, floor)).mean()


def random_timesteps(count: int, *, layout: bool) -> Tensor:
    """Draw timesteps, while layout is learned every other one from the noisier half."""
    timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (count,))
    if layout:
        noisier = NUM_TRAIN_TIMESTEPS // 2
        timesteps[::2] = timesteps[::2] % noisier + noisier
    return timesteps


def weights_of(timesteps: Tensor, floor: float) -> Tensor:
    """Return what an error of v counts: that of x0, by the signal-to-noise ratio within bounds."""
    ratio = ALPHAS[timesteps] / (1 - ALPHAS[timesteps])
    return ratio.clamp(floor, WEIGHT_CEILING) / (1 + ratio)


@torch.no_grad()
def ddim(predict: Predict, noise: Tensor, num_steps: int) -> Tensor:
    """Return latents that `predict` makes of noise (B, C, h, w) in a few deterministic steps.

    Source: Song et al. 2020 (arXiv:2010.02502), equation 12 without noise, in terms of v.
    """
    visited = torch.linspace(NUM_TRAIN_TIMESTEPS - 1, 0, num_steps + 1).round().long()[:-1]
    latents, x0 = noise, noise
    for step, timestep in enumerate(visited.tolist()):
        alpha = ALPHAS[timestep]
        velocity = predict(latents, torch.full((len(latents),), float(timestep))).float()
        x0 = alpha.sqrt() * latents - (1 - alpha).sqrt() * velocity
        epsilon = alpha.sqrt() * velocity + (1 - alpha).sqrt() * latents
        if step + 1 < num_steps:
            following = ALPHAS[visited[step + 1]]
            latents = following.sqrt() * x0 + (1 - following).sqrt() * epsilon
    return x0
