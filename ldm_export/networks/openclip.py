"""OpenCLIP's text encoders, of Stable Diffusion 2 and SDXL, and CLIP's image encoders.

Architecture: that of `clip` (Radford et al. 2021, arXiv:2103.00020, section 2.4). Parameter names
are those of open_clip's two towers, which OpenAI's image encoders have, too: query, key and value
are one matrix, and the projection of the output is applied from the right.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_export.networks.clip import QuickGelu, embed_tokens, end_of_text, skip_to
from ldm_runtime.specs.networks import ImageEncoderSpec, TextEncoderSpec


class PackedAttention(nn.Module):
    """Multi-head self-attention; query, key and value are rows of one matrix."""

    def __init__(self, width: int, num_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape; if causal, token i attends to tokens 0 to i."""
        packed = F.linear(hidden, self.in_proj_weight, self.in_proj_bias)
        query, key, value = (
            torch.unflatten(part, 2, (self.num_heads, -1)).transpose(1, 2)
            for part in packed.chunk(3, 2)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention, causal in text, and feed-forward, each pre-normalised and residual."""

    def __init__(self, spec: TextEncoderSpec | ImageEncoderSpec) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(spec.width)
        causal = isinstance(spec, TextEncoderSpec)
        self.attn = PackedAttention(spec.width, spec.num_heads, causal=causal)
        self.ln_2 = nn.LayerNorm(spec.width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(spec.width, spec.feed_forward_dim),
                gelu=QuickGelu() if spec.activation == "quick_gelu" else nn.GELU(),
                c_proj=nn.Linear(spec.feed_forward_dim, spec.width),
            )
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, T, width) to the same shape."""
        hidden = hidden + self.attn(self.ln_1(hidden))
        out: Tensor = hidden + self.mlp(self.ln_2(hidden))
        return out


class Blocks(nn.Module):
    """The stack, one level deeper because the checkpoint's names are."""

    def __init__(self, spec: TextEncoderSpec | ImageEncoderSpec) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))


class OpenClipTextEncoder(nn.Module):
    """Token ids to the UNet's context, or to a part of it, and perhaps a pooled output."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.token_embedding = nn.Embedding(spec.vocab_size, spec.width)
        self.positional_embedding = nn.Parameter(torch.empty(spec.max_tokens, spec.width))
        self.transformer = Blocks(spec)
        self.ln_final = nn.LayerNorm(spec.width)
        if spec.pooled_dim is not None:
            self.text_projection = nn.Parameter(torch.empty(spec.width, spec.pooled_dim))

    def forward(
        self,
        tokens: Tensor,
        learned_embeddings: Tensor | None = None,
        clip_skip: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map token ids to context (B, T, width), and pooled (B, pooled_dim).

        Args:
            tokens: Token ids (B, T) int64, see `embed_tokens`.
            learned_embeddings: (B, T, width), likewise.
            clip_skip: Layers at the end that the context of each sample skips, (B,) int64; None is
                none. The pooled output has passed all.
        """
        embedded = embed_tokens(self.token_embedding, tokens, learned_embeddings)
        hidden = embedded + self.positional_embedding[: tokens.shape[1]]
        context: Tensor = hidden
        for index, block in enumerate(self.transformer.resblocks, start=1):
            remaining = self.spec.context_layers - index
            if remaining < 0 and self.spec.pooled_dim is None:
                break
            hidden = block(hidden)
            if remaining >= 0:
                context = skip_to(hidden, context, remaining, clip_skip)
        if self.spec.final_norm:
            context = self.ln_final(context)
        if self.spec.pooled_dim is None:
            return context
        pooled = (
            end_of_text(self.ln_final(hidden), tokens, self.spec.end_token_id)
            @ self.text_projection
        )
        return context, pooled


class ClipImageEncoder(nn.Module):
    """Pixels to the embedding of an image: CLIP's vision transformer."""

    def __init__(self, spec: ImageEncoderSpec) -> None:
        super().__init__()
        patch, width = spec.patch_size, spec.width
        self.conv1 = nn.Conv2d(spec.in_channels, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(spec.num_tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Blocks(spec)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, spec.embed_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        """Map normalised pixels (B, 3, image_size, image_size) to embeddings (B, embed_dim)."""
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(pixels.shape[0], 1, -1)
        hidden: Tensor = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        for block in self.transformer.resblocks:
            hidden = block(hidden)
        embedding: Tensor = self.ln_post(hidden[:, 0]) @ self.proj
        return embedding
