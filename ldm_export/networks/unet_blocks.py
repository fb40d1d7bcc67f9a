"""The blocks of the UNet other than attention: residual blocks, resampling, numbered blocks.

Source: Dhariwal and Nichol 2021 (arXiv:2105.05233), section 3 and appendix B, whose residual blocks
may change the resolution and take the time embedding as a scale and a shift.
"""

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_export.networks.attention import SpatialTransformer

_GROUPS = 32
_TIMESTEP_PERIOD = 10_000.0

#: A change of resolution, without weights.
Resampling = Literal["down", "up"]
_RESAMPLERS: MappingProxyType[Resampling | None, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        None: lambda hidden: hidden,
        "down": lambda hidden: F.avg_pool2d(hidden, 2),
        "up": lambda hidden: F.interpolate(hidden, scale_factor=2.0, mode="nearest"),
    }
)


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Return sinusoidal features (B, dim) of `timesteps` (B,) float32: cosines first, then sines.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, in the order of the DDPM code.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    # Multiply, then divide, as in training: the timestep multiplies any difference in rounding.
    frequencies = torch.exp(-math.log(_TIMESTEP_PERIOD) * steps / half)
    angles = timesteps[:, None] * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


class ResBlock(nn.Module):
    """Two convolutions with the time embedding in between, around a skip connection.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        embedding_dim: Width of the time embedding.
        scale_shift_norm: Whether the embedding scales and shifts what the second normalisation
            gives, and is not added before it.
        resampling: How the resolution changes, of the input and of the skip connection.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        *,
        scale_shift_norm: bool = False,
        resampling: Resampling | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift_norm = scale_shift_norm
        self.resample = _RESAMPLERS[resampling]
        self.in_layers = nn.Sequential(
            nn.GroupNorm(_GROUPS, in_channels, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        features = 2 * out_channels if scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_dim, features))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(_GROUPS, out_channels, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),  # the checkpoint counts a dropout here
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.skip_connection = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) and (B, embedding_dim) to (B, out_channels, h', w')."""
        norm, activation, convolution = self.in_layers
        inner = convolution(self.resample(activation(norm(hidden))))
        features = self.emb_layers(embedding)[:, :, None, None]
        norm, activation, _, convolution = self.out_layers
        if self.scale_shift_norm:
            scale, shift = features.chunk(2, dim=1)
            inner = norm(inner) * (1 + scale) + shift
        else:
            inner = norm(inner + features)
        skip = self.skip_connection(self.resample(hidden))
        out: Tensor = skip + convolution(activation(inner))
        return out


class Downsample(nn.Module):
    """Strided convolution that halves height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h/2, w/2)."""
        out: Tensor = self.op(hidden)
        return out


class Upsample(nn.Module):
    """Nearest-neighbour doubling followed by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, 2h, 2w)."""
        out: Tensor = self.conv(_RESAMPLERS["up"](hidden))
        return out


class UNetBlock(nn.Sequential):
    """Layers of one numbered block; each gets its inputs in addition to the hidden state."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, embedding: Tensor, context: Tensor | None
    ) -> Tensor:
        """Run every layer in order."""
        for layer in self:
            if isinstance(layer, ResBlock):
                hidden = layer(hidden, embedding)
            elif isinstance(layer, SpatialTransformer):
                hidden = layer(hidden, context)
            else:
                hidden = layer(hidden)
        return hidden
