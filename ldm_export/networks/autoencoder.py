"""The autoencoder of latent diffusion, convolutional, with a codebook or without.

Architecture: Rombach et al. 2022 (arXiv:2112.10752), section 3.1 and appendix G, on the VQGAN of
Esser et al. 2021 (arXiv:2012.09841). Parameter names are those under `first_stage_model.` in
CompVis checkpoints. Every normalisation has 32 groups and epsilon 1e-6. In a VQ model the encoder
ends before the codebook and the decoder begins with it: diffusion works on continuous latents.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_export.networks.quantizer import Quantizer
from ldm_runtime.specs.networks import AutoencoderSpec

_GROUPS = 32


class ResnetBlock(nn.Module):
    """Two pre-normalised convolutions around a skip connection."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, h, w)."""
        inner = self.conv1(F.silu(self.norm1(hidden)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        skip = self.nin_shortcut(hidden) if hasattr(self, "nin_shortcut") else hidden
        out: Tensor = skip + inner
        return out


class AttnBlock(nn.Module):
    """Self-attention over pixels with one head of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        normed, size = self.norm(hidden), hidden.shape[2:]
        heads = [layer(normed).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v)]
        mixed = F.scaled_dot_product_attention(*heads)[:, 0].mT
        out: Tensor = hidden + self.proj_out(torch.unflatten(mixed, 2, size))
        return out


class Downsample(nn.Module):
    """Halves height and width; pads right and bottom only, as the trained models do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h/2, w/2)."""
        out: Tensor = self.conv(F.pad(hidden, (0, 1, 0, 1)))
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


class Middle(nn.Module):
    """The blocks at the lowest resolution."""

    def __init__(self, channels: int, *, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1: nn.Module = AttnBlock(channels) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        out: Tensor = self.block_2(self.attn_1(self.block_1(hidden)))
        return out


class Level(nn.Module):
    """The blocks of one resolution, with their attention and change of resolution if any."""

    def __init__(self, widths: list[int], *, attention: bool) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.block = nn.ModuleList(ResnetBlock(*pair) for pair in pairs)
        self.attn = nn.ModuleList(AttnBlock(width) for _, width in pairs if attention)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, widths[0], h, w) to (B, widths[-1], h or h/2 or 2h, likewise w)."""
        for index, block in enumerate(self.block):
            hidden = block(hidden)
            if len(self.attn):
                hidden = self.attn[index](hidden)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                hidden = getattr(self, name)(hidden)
        return hidden


class Encoder(nn.Module):
    """Image to features, before the 1x1 quantisation convolution."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        width = spec.channels
        self.conv_in = nn.Conv2d(spec.image_channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        for index, mult in enumerate(spec.channel_mult):
            widths = [width] + [mult * spec.channels] * spec.num_res_blocks
            level, width = Level(widths, attention=index in spec.attention_levels), widths[-1]
            if index + 1 < len(spec.channel_mult):
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width, attention=spec.middle_attention)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, spec.numbers_per_channel * spec.z_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, image_channels, H, W) in [-1, 1] to (B, z_channels or twice that, H/f, W/f)."""
        hidden = self.conv_in(image)
        for level in self.down:
            hidden = level(hidden)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(hidden))))
        return out


class Decoder(nn.Module):
    """Features to image, after the 1x1 quantisation convolution."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        width = spec.channels * spec.channel_mult[-1]
        self.conv_in = nn.Conv2d(spec.z_channels, width, 3, padding=1)
        self.mid = Middle(width, attention=spec.middle_attention)
        levels = []
        for index, mult in reversed(list(enumerate(spec.channel_mult))):
            widths = [width] + [mult * spec.channels] * (spec.num_res_blocks + 1)
            level, width = Level(widths, attention=index in spec.attention_levels), widths[-1]
            if index > 0:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # up.0 is the highest resolution
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, spec.image_channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, z_channels, h, w) to (B, image_channels, f h, f w)."""
        hidden = self.mid(self.conv_in(hidden))
        for level in reversed(self.up):
            hidden = level(hidden)
        out: Tensor = self.conv_out(F.silu(self.norm_out(hidden)))
        return out


class LatentEncoder(nn.Module):
    """The encoding half of the autoencoder: image to the moments of its latents."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        numbers = spec.numbers_per_channel
        self.encoder = Encoder(spec)
        self.quant_conv = nn.Conv2d(numbers * spec.z_channels, numbers * spec.embed_dim, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to moments (B, 2 embed_dim, H/f, W/f).

        The first half of the channels is the posterior's mean, the second its log-variance. A VQ
        model has only latents, (B, embed_dim, H/f, W/f), continuous.
        """
        moments: Tensor = self.quant_conv(self.encoder(image))
        return moments


class LatentDecoder(nn.Module):
    """The decoding half of the autoencoder: latents to image, through the codebook if any."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        self.quantize: nn.Module = nn.Identity()
        if spec.kind == "vq":
            assert spec.codebook_size is not None  # for that kind it is read from the codebook
            self.quantize = Quantizer(spec.codebook_size, spec.embed_dim)
        self.post_quant_conv = nn.Conv2d(spec.embed_dim, spec.z_channels, 1)
        self.decoder = Decoder(spec)

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents (B, embed_dim, h, w), not scaled, to images (B, 3, f h, f w)."""
        image: Tensor = self.decoder(self.post_quant_conv(self.quantize(latents)))
        return image


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)
