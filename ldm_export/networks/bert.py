"""The transformer over prompts or layouts that the models of the latent-diffusion paper learn.

Architecture: Rombach et al. 2022 (arXiv:2112.10752), appendix E.2.1: pre-normalised, without a
mask, so that every token attends to every other, padding too. Parameter names are those under
`cond_stage_model.` in CompVis checkpoints. Heads have 64 channels whatever the width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ldm_runtime.specs.networks import TextEncoderSpec

_HEAD_CHANNELS = 64


class SelfAttention(nn.Module):
    """Multi-head self-attention with its own inner width."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        inner = spec.num_heads * _HEAD_CHANNELS
        self.to_q = nn.Linear(spec.width, inner, bias=False)
        self.to_k = nn.Linear(spec.width, inner, bias=False)
        self.to_v = nn.Linear(spec.width, inner, bias=False)
        self.to_out = nn.Linear(inner, spec.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape."""
        query, key, value = (
            layer(hidden).unflatten(2, (-1, _HEAD_CHANNELS)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Two linear layers around the exact GELU."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(spec.width, spec.feed_forward_dim), nn.GELU()),
            nn.Identity(),  # the checkpoint counts a dropout here
            nn.Linear(spec.feed_forward_dim, spec.width),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape."""
        out: Tensor = self.net(hidden)
        return out


class Layers(nn.Module):
    """Attention and feed-forward in turn, each a numbered pair with its LayerNorm."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(spec.width), kind(spec)])
            for _ in range(spec.num_layers)
            for kind in (SelfAttention, FeedForward)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape."""
        for layer in self.layers:
            norm, block = layer.children()
            hidden = hidden + block(norm(hidden))
        return hidden


class PositionEmbedding(nn.Module):
    """A learned vector for every position."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.emb = nn.Embedding(spec.max_tokens, spec.width)

    def forward(self, length: int) -> Tensor:
        """Return the vectors (length, width) of the first positions."""
        return self.emb.weight[:length]


class Transformer(nn.Module):
    """Embeddings, layers and the final LayerNorm; the head over the vocabulary is left out."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(spec.vocab_size, spec.width)
        self.pos_emb = PositionEmbedding(spec)
        self.attn_layers = Layers(spec)
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, T) to (B, T, width)."""
        embedded = self.token_emb(tokens) + self.pos_emb(tokens.shape[1])
        out: Tensor = self.norm(self.attn_layers(embedded))
        return out


class BertTextEncoder(nn.Module):
    """Token ids to the UNet's context."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.transformer = Transformer(spec)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, T) int64 to context (B, T, width)."""
        context: Tensor = self.transformer(tokens)
        return context
