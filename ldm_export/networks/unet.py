"""The denoising UNet of latent diffusion, with text cross-attention.

Architecture: Rombach et al. 2022 (arXiv:2112.10752), section 3.3 and appendix E, on the UNet of
Dhariwal and Nichol 2021 (arXiv:2105.05233). Parameter names are those under
`model.diffusion_model.` in CompVis checkpoints. Two normalisation epsilons are part of the
trained models: 1e-5 in residual blocks and the output, 1e-6 at the entry of a transformer.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_runtime.manifest import UNetSpec

_GROUPS = 32
_TIMESTEP_PERIOD = 10_000.0


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
    """Two convolutions with the time embedding added in between, around a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(_GROUPS, in_channels, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_dim, out_channels))
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
        """Map (B, in_channels, h, w) and (B, embedding_dim) to (B, out_channels, h, w)."""
        inner = self.in_layers(hidden) + self.emb_layers(embedding)[:, :, None, None]
        out: Tensor = self.skip_connection(hidden) + self.out_layers(inner)
        return out


class Attention(nn.Module):
    """Multi-head attention from `hidden` to `context`, or to itself."""

    def __init__(self, channels: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Map (B, N, channels) and (B, T, context_dim) to (B, N, channels)."""
        heads = [
            projected.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.to_q(hidden), self.to_k(context), self.to_v(context))
        ]
        mixed = F.scaled_dot_product_attention(*heads)
        out: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return out


class GatedLinear(nn.Module):
    """GEGLU: a linear layer gated by the exact GELU of another (arXiv:2002.05202)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, N, channels) to (B, N, inner); the gate is the second half."""
        value, gate = self.proj(hidden).chunk(2, dim=-1)
        out: Tensor = value * F.gelu(gate)
        return out


class FeedForward(nn.Module):
    """Gated feed-forward layer with an inner width of four times its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GatedLinear(channels, 4 * channels),
            nn.Identity(),  # the checkpoint counts a dropout here
            nn.Linear(4 * channels, channels),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, N, channels) to the same shape."""
        out: Tensor = self.net(hidden)
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each pre-normalised and residual."""

    def __init__(self, channels: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_dim, num_heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Map (B, N, channels) and (B, T, context_dim) to (B, N, channels)."""
        normed = self.norm1(hidden)
        hidden = hidden + self.attn1(normed, normed)
        hidden = hidden + self.attn2(self.norm2(hidden), context)
        out: Tensor = hidden + self.ff(self.norm3(hidden))
        return out


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map."""

    def __init__(self, spec: UNetSpec, channels: int, depth: int) -> None:
        super().__init__()
        self.linear = spec.linear_projection
        self.norm = nn.GroupNorm(_GROUPS, channels, eps=1e-6)
        self.proj_in = _projection(channels, linear=self.linear)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, spec.context_dim, num_heads(spec, channels))
            for _ in range(depth)
        )
        self.proj_out = _projection(channels, linear=self.linear)

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Map (B, channels, h, w) and (B, T, context_dim) to (B, channels, h, w)."""
        size = hidden.shape[2:]
        inner = self.norm(hidden)
        inner = self.proj_in(_tokens(inner)) if self.linear else _tokens(self.proj_in(inner))
        for block in self.transformer_blocks:
            inner = block(inner, context)
        inner = self.proj_out(inner) if self.linear else inner
        inner = inner.transpose(1, 2).unflatten(2, size)
        out: Tensor = hidden + (inner if self.linear else self.proj_out(inner))
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
        out: Tensor = self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        return out


class Stage(nn.Sequential):
    """Layers of one numbered block; each gets what it needs besides the hidden state."""

    def forward(self, hidden: Tensor, embedding: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        """Run every layer in order."""
        for layer in self:
            if isinstance(layer, ResBlock):
                hidden = layer(hidden, embedding)
            elif isinstance(layer, SpatialTransformer):
                hidden = layer(hidden, context)
            else:
                hidden = layer(hidden)
        return hidden


class UNet(nn.Module):
    """Predicts the noise (or v, or x0) in latents, given a timestep and a text context."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding_dim = 4 * spec.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(spec.model_channels, self.embedding_dim),
            nn.SiLU(),
            nn.Linear(self.embedding_dim, self.embedding_dim),
        )
        self.input_blocks, widths = self._encoder()
        channels = widths[-1]
        self.middle_block = Stage(
            self._res(channels, channels),
            SpatialTransformer(spec, channels, spec.middle_depth),
            self._res(channels, channels),
        )
        self.output_blocks = self._decoder(widths)
        self.out = nn.Sequential(
            nn.GroupNorm(_GROUPS, spec.model_channels, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(spec.model_channels, spec.out_channels, 3, padding=1),
        )

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Predict from noisy latents.

        Args:
            latents: (B, in_channels, h, w), h and w multiples of 2 ** (levels - 1).
            timesteps: (B,) float32, 0 to the length of the training schedule, may be fractional.
            context: (B, T, context_dim).

        Returns:
            Prediction (B, out_channels, h, w).
        """
        features = timestep_embedding(timesteps, self.spec.model_channels)
        embedding = self.time_embed(features.to(latents.dtype))
        hidden, skips = latents, []
        for stage in self.input_blocks:
            hidden = stage(hidden, embedding, context)
            skips.append(hidden)
        hidden = self.middle_block(hidden, embedding, context)
        for stage in self.output_blocks:
            hidden = stage(torch.cat([hidden, skips.pop()], dim=1), embedding, context)
        prediction: Tensor = self.out(hidden)
        return prediction

    def _res(self, in_channels: int, out_channels: int) -> ResBlock:
        return ResBlock(in_channels, out_channels, self.embedding_dim)

    def _encoder(self) -> tuple[nn.ModuleList, list[int]]:
        spec, channels = self.spec, self.spec.model_channels
        blocks = nn.ModuleList([Stage(nn.Conv2d(spec.in_channels, channels, 3, padding=1))])
        widths = [channels]
        for level, mult in enumerate(spec.channel_mult):
            for _ in range(spec.num_res_blocks):
                layers: list[nn.Module] = [self._res(channels, mult * spec.model_channels)]
                channels = mult * spec.model_channels
                layers += self._attention(level, channels)
                blocks.append(Stage(*layers))
                widths.append(channels)
            if level + 1 < len(spec.channel_mult):
                blocks.append(Stage(Downsample(channels)))
                widths.append(channels)
        return blocks, widths

    def _decoder(self, widths: list[int]) -> nn.ModuleList:
        spec, channels = self.spec, widths[-1]
        skips, blocks = list(widths), nn.ModuleList()
        for level, mult in reversed(list(enumerate(spec.channel_mult))):
            for index in range(spec.num_res_blocks + 1):
                width = mult * spec.model_channels
                layers: list[nn.Module] = [self._res(channels + skips.pop(), width)]
                channels = width
                layers += self._attention(level, channels)
                if level > 0 and index == spec.num_res_blocks:
                    layers.append(Upsample(channels))
                blocks.append(Stage(*layers))
        return blocks

    def _attention(self, level: int, channels: int) -> list[nn.Module]:
        depth = self.spec.transformer_depth[level]
        return [SpatialTransformer(self.spec, channels, depth)] if depth else []


def num_heads(spec: UNetSpec, channels: int) -> int:
    """Return how many heads attention over `channels` has."""
    if spec.num_heads is not None:
        return spec.num_heads
    assert spec.num_head_channels is not None  # a spec fixes one of the two
    return channels // spec.num_head_channels


def _projection(channels: int, *, linear: bool) -> nn.Module:
    return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)


def _tokens(hidden: Tensor) -> Tensor:
    return hidden.flatten(2).transpose(1, 2)
