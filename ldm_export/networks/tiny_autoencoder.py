"""TAESD, the tiny autoencoder: plain convolutions that decode latents in a fraction of the time.

Source: taesd.py of madebyollin/taesd (5cccb12). Modules are named and numbered as in diffusers'
`AutoencoderTiny` (0.42.1); the original counts the decoder's from 1, its clamp being a layer, too.
"""

import torch
from torch import Tensor, nn

from ldm_runtime.specs.networks import AutoencoderSpec

#: Latents of larger magnitude are rounded off: one of 3 becomes 3 tanh(1) = 2.3.
_MAGNITUDE = 3.0


class TinyBlock(nn.Module):
    """Three convolutions, their input added, all of it rectified."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _convolution(channels, channels),
            nn.ReLU(),
            _convolution(channels, channels),
            nn.ReLU(),
            _convolution(channels, channels),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, channels, h, w) to the same shape."""
        return torch.relu(self.conv(hidden) + hidden)


class _Layers(nn.Module):
    """The layers of the decoder, after its clamp."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        channels = spec.channels
        layers: list[nn.Module] = [_convolution(spec.embed_dim, channels), nn.ReLU()]
        for _ in spec.channel_mult[1:]:
            layers += [TinyBlock(channels) for _ in range(spec.num_res_blocks)]
            layers += [nn.Upsample(scale_factor=2), _convolution(channels, channels, bias=False)]
        layers += [TinyBlock(channels), _convolution(channels, spec.image_channels)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        """Map (B, embed_dim, h, w) to images (B, 3, f h, f w) from 0 to 1."""
        image: Tensor = self.layers(latents)
        return image


class TinyDecoder(nn.Module):
    """The decoding half: latents to image."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        self.decoder = _Layers(spec)

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents (B, embed_dim, h, w) in the UNet's scale to images (B, 3, f h, f w)."""
        image: Tensor = self.decoder(_MAGNITUDE * torch.tanh(latents / _MAGNITUDE))
        return 2 * image - 1


def _convolution(channels: int, out_channels: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1, bias=bias)
