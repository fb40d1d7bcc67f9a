"""The CLIP text transformer that Stable Diffusion 1 and SDXL are conditioned on.

Architecture: Radford et al. 2021 (arXiv:2103.00020), section 2.4: causal, pre-normalised. The
output is every token after as many layers as the model says, or fewer, with or without the final
LayerNorm. A token may have a learned embedding (Gal et al. 2022, arXiv:2208.01618) in place of its
row of the table.
Parameter names are those of `transformers.CLIPTextModel`, which checkpoints hold under
`cond_stage_model.transformer.`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_runtime.specs.networks import TextEncoderSpec


class QuickGelu(nn.Module):
    """OpenAI's fast approximation of the GELU."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map an array to the same shape."""
        return hidden * torch.sigmoid(1.702 * hidden)


def end_of_text(hidden: Tensor, tokens: Tensor, end_token: int) -> Tensor:
    """Return the hidden state (B, width) of the first end token of each row of (B, T, width)."""
    ends = (tokens == end_token).int().argmax(1)
    return hidden.gather(1, ends[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]


def embed_tokens(table: nn.Embedding, tokens: Tensor, learned: Tensor | None) -> Tensor:
    """Return token embeddings (B, T, width): rows of the table, or those that come with a prompt.

    Args:
        table: One row per token of the vocabulary.
        tokens: Token ids (B, T) int64; the first beyond the table has a learned embedding.
        learned: Learned embeddings (B, T, width), of which only those of such tokens matter; None
            for tokens of the vocabulary alone.
    """
    if learned is None:
        found: Tensor = table(tokens)
        return found
    is_learned = tokens == table.num_embeddings
    known: Tensor = table(torch.where(is_learned, 0, tokens))
    return torch.where(is_learned[..., None], learned, known)


def skip_to(hidden: Tensor, earlier: Tensor, skipped: int, clip_skip: Tensor | None) -> Tensor:
    """Return `hidden` (B, T, width) for every sample that skips no more layers, else `earlier`.

    Args:
        hidden: After a layer.
        earlier: The result of this function after the layer before.
        skipped: How many of the layers that context passes follow.
        clip_skip: How many of them each sample skips, (B,) int64; None is none.
    """
    if clip_skip is None:
        return hidden
    return torch.where((clip_skip <= skipped)[:, None, None], hidden, earlier)


class Embeddings(nn.Module):
    """Token embedding plus learned position embedding."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(spec.vocab_size, spec.width)
        self.position_embedding = nn.Embedding(spec.max_tokens, spec.width)

    def forward(self, tokens: Tensor, learned: Tensor | None) -> Tensor:
        """Map token ids (B, T) to (B, T, width); see `embed_tokens`."""
        positions = self.position_embedding.weight[: tokens.shape[1]]
        return embed_tokens(self.token_embedding, tokens, learned) + positions


class SelfAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape; token i attends to tokens 0 to i."""
        query, key, value = (
            layer(hidden).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.activation = QuickGelu() if spec.activation == "quick_gelu" else nn.GELU()
        self.fc1 = nn.Linear(spec.width, spec.feed_forward_dim)
        self.fc2 = nn.Linear(spec.feed_forward_dim, spec.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape."""
        out: Tensor = self.fc2(self.activation(self.fc1(hidden)))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each pre-normalised and residual."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(spec.width)
        self.self_attn = SelfAttention(spec.width, spec.num_heads)
        self.layer_norm2 = nn.LayerNorm(spec.width)
        self.mlp = FeedForward(spec)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        out: Tensor = hidden + self.mlp(self.layer_norm2(hidden))
        return out


class Layers(nn.Module):
    """The stack, one level deeper because the checkpoint's names are."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.context_layers = spec.context_layers
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.num_layers))

    def forward(self, hidden: Tensor, clip_skip: Tensor | None) -> Tensor:
        """Map (B, T, width) to the same shape, through the layers that context needs."""
        context = hidden
        for index, layer in enumerate(self.layers[: self.context_layers], start=1):
            hidden = layer(hidden)
            context = skip_to(hidden, context, self.context_layers - index, clip_skip)
        return context


class TextModel(nn.Module):
    """Embeddings, layers and the final LayerNorm."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.final_norm = spec.final_norm
        self.embeddings = Embeddings(spec)
        self.encoder = Layers(spec)
        self.final_layer_norm = nn.LayerNorm(spec.width)

    def forward(self, tokens: Tensor, learned: Tensor | None, clip_skip: Tensor | None) -> Tensor:
        """Map token ids (B, T) to (B, T, width)."""
        out: Tensor = self.encoder(self.embeddings(tokens, learned), clip_skip)
        return self.final_layer_norm(out) if self.final_norm else out


class ClipTextEncoder(nn.Module):
    """Token ids to the UNet's context."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.text_model = TextModel(spec)

    def forward(
        self,
        tokens: Tensor,
        learned_embeddings: Tensor | None = None,
        clip_skip: Tensor | None = None,
    ) -> Tensor:
        """Map token ids to context (B, T, width).

        Args:
            tokens: Token ids (B, T) int64, see `embed_tokens`.
            learned_embeddings: (B, T, width), likewise.
            clip_skip: Layers at the end that each sample skips, (B,) int64; None is none.
        """
        context: Tensor = self.text_model(tokens, learned_embeddings, clip_skip)
        return context
