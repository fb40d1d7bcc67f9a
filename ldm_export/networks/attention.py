"""Attention inside the UNet: transformers over pixels and a context, or over pixels alone.

Two kinds, whose normalisations differ by a factor of ten in epsilon: `SpatialTransformer` of
Rombach et al. 2022 (arXiv:2112.10752), section 3.3, with 1e-6, and `AttentionBlock` of Dhariwal and
Nichol 2021 (arXiv:2105.05233) with 1e-5. Heads of any size go through the same attention, the one
of 960 channels of the class-conditional ImageNet model included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_runtime.specs.networks import UNetSpec

_GROUPS = 32


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
    """Self-attention, cross-attention and feed-forward, each pre-normalised and residual.

    Without self-attention, there is cross-attention in its place.
    """

    def __init__(
        self, channels: int, context_dim: int, num_heads: int, *, to_itself: bool = True
    ) -> None:
        super().__init__()
        self.to_itself = to_itself
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels if to_itself else context_dim, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_dim, num_heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Map (B, N, channels) and (B, T, context_dim) to (B, N, channels)."""
        normed = self.norm1(hidden)
        hidden = hidden + self.attn1(normed, normed if self.to_itself else context)
        hidden = hidden + self.attn2(self.norm2(hidden), context)
        out: Tensor = hidden + self.ff(self.norm3(hidden))
        return out


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map."""

    def __init__(
        self, spec: UNetSpec, channels: int, depth: int, *, to_itself: bool = True
    ) -> None:
        super().__init__()
        assert spec.context_dim is not None  # families without a context have "qkv" attention
        self.linear = spec.linear_projection
        self.norm = nn.GroupNorm(_GROUPS, channels, eps=1e-6)
        self.proj_in = _projection(channels, linear=self.linear)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                channels, spec.context_dim, spec.heads_over(channels), to_itself=to_itself
            )
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


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map.

    The channels of `qkv` are ordered by head, then query, key and value, then channel: the order
    that the code of the paper calls legacy, which every released model has.
    """

    def __init__(self, spec: UNetSpec, channels: int) -> None:
        super().__init__()
        self.num_heads = spec.heads_over(channels)
        self.norm = nn.GroupNorm(_GROUPS, channels, eps=1e-5)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, channels, h, w) to the same shape."""
        fused = _pointwise(self.qkv, self.norm(hidden)).flatten(2)
        query, key, value = torch.unflatten(fused, 1, (self.num_heads, 3, -1)).mT.unbind(2)
        mixed = F.scaled_dot_product_attention(query, key, value).mT.flatten(1, 2)
        mixed = torch.unflatten(mixed, 2, hidden.shape[2:])
        return hidden + _pointwise(self.proj_out, mixed)


def _projection(channels: int, *, linear: bool) -> nn.Module:
    return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)


def _pointwise(layer: nn.Conv1d, hidden: Tensor) -> Tensor:
    """Apply a 1-D convolution of size 1 to a feature map, for which engines have 2-D kernels."""
    return torch.conv2d(hidden, layer.weight[..., None], layer.bias)


def _tokens(hidden: Tensor) -> Tensor:
    return hidden.flatten(2).transpose(1, 2)
