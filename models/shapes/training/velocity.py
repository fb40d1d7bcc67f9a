"""The loss that every UNet here learns by, and the few DDIM steps by which training is watched.

What is learned is v, the velocity (Salimans and Ho 2022, arXiv:2202.00512, appendix D). At the last
timestep a prediction of the noise has to repeat its input to within one percent before it says
anything about x0; one of v says it at once.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from models.shapes.catalog.noise import NUM_TRAIN_TIMESTEPS, Noise

#: A timestep's loss, in terms of x0, is weighted by its signal-to-noise ratio within these bounds.
#: The upper one is that of Hang et al. 2023 (arXiv:2303.09556). The lower one gives high noise,
#: where it is decided what goes where, a voice: its share in the loss is tiny otherwise. It is
#: higher while layout is learned, and half of the timesteps are then from the noisier half; later
#: shapes matter more, and high noise would drown them in what cannot be predicted.
LAYOUT_FLOOR, WEIGHT_FLOOR, WEIGHT_CEILING = 0.5, 0.15, 5.0

#: Maps noisy latents (B, C, h, w) and timesteps (B,) float32 to v.
Predict = Callable[[Tensor, Tensor], Tensor]


@cache
def alphas_of(noise: Noise) -> Tensor:
    """Return `alphas_cumprod` (T,) float32."""
    return alphas_cumprod(noise).float()


def alphas_cumprod(noise: Noise) -> Tensor:
    """Return a schedule, (T,) float64."""
    roots_of_betas = torch.linspace(
        noise.start**0.5, noise.end**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float64
    )
    alphas = torch.cumprod(1 - roots_of_betas.square(), dim=0)
    if not noise.zero_terminal_snr:
        return alphas
    roots = alphas.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()


def velocity_loss(predict: Predict, clean: Tensor, noise: Noise, *, layout: bool) -> Tensor:
    """Return the loss of v on latents with noise of random strength.

    Args:
        predict: The network, with everything that conditions it.
        clean: Latents (B, C, h, w) of unit variance.
        noise: The noise that is added.
        layout: Whether it is still being learned what goes where: half of the timesteps are then
            from the noisier half, and high noise weighs more.
    """
    timesteps = random_timesteps(len(clean), layout=layout)
    alphas = alphas_of(noise)[timesteps]
    alpha = alphas[:, None, None, None]
    noise_sample = torch.randn_like(clean) + noise.offset * torch.randn(*clean.shape[:2], 1, 1)
    prediction = predict(
        alpha.sqrt() * clean + (1 - alpha).sqrt() * noise_sample, timesteps.float()
    )
    velocity = alpha.sqrt() * noise_sample - (1 - alpha).sqrt() * clean
    errors = F.mse_loss(prediction.float(), velocity, reduction="none").mean((1, 2, 3))
    floor = LAYOUT_FLOOR if layout else WEIGHT_FLOOR
    return (errors * weights_of(alphas, floor)).mean()


def random_timesteps(count: int, *, layout: bool) -> Tensor:
    """Sample timesteps, while layout is learned every other one from the noisier half."""
    timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (count,))
    if layout:
        noisier = NUM_TRAIN_TIMESTEPS // 2
        timesteps[::2] = timesteps[::2] % noisier + noisier
    return timesteps


def weights_of(alphas: Tensor, floor: float) -> Tensor:
    """Return weights of errors of v: those of x0, by the signal-to-noise ratio within bounds."""
    ratio = alphas / (1 - alphas)
    return ratio.clamp(floor, WEIGHT_CEILING) / (1 + ratio)


@torch.no_grad()
def ddim(predict: Predict, start: Tensor, noise: Noise, num_steps: int) -> Tensor:
    """Return latents that `predict` makes of noise in a few deterministic steps.

    Source: Song et al. 2020 (arXiv:2010.02502), equation 12 without noise, in terms of v.

    Args:
        predict: The network, with everything that conditions it.
        start: Standard normal (B, C, h, w).
        noise: The noise that `predict` learned to remove.
        num_steps: How many.
    """
    alphas = alphas_of(noise)
    visited = torch.linspace(NUM_TRAIN_TIMESTEPS - 1, 0, num_steps + 1).round().long()[:-1]
    latents, x0 = start, start
    for step, timestep in enumerate(visited.tolist()):
        alpha = alphas[timestep]
        velocity = predict(latents, torch.full((len(latents),), float(timestep))).float()
        x0 = alpha.sqrt() * latents - (1 - alpha).sqrt() * velocity
        epsilon = alpha.sqrt() * velocity + (1 - alpha).sqrt() * latents
        if step + 1 < num_steps:
            following = alphas[visited[step + 1]]
            latents = following.sqrt() * x0 + (1 - following).sqrt() * epsilon
    return x0
