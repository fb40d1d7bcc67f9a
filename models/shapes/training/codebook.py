"""A codebook and latents: which code is nearest, where codes begin, and how they are followed."""

import torch
from torch import Tensor, nn

from ldm_runtime.specs.networks import AutoencoderSpec

_CHUNK = 4096  # latents whose distances to all codes are in memory together


class Codes(nn.Module):
    """State of the running k-means of a codebook: uses of each code, and sums of its latents."""

    count: Tensor
    total: Tensor

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        assert spec.codebook_size is not None, "a VQ autoencoder has a codebook"
        self.register_buffer("count", torch.ones(spec.codebook_size))
        self.register_buffer("total", torch.zeros(spec.codebook_size, spec.embed_dim))


def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest code for each latent (M, D), in float32."""
    codes = codebook.float()
    offset = codes.square().sum(1)
    parts = torch.split(latents.float(), _CHUNK)
    return torch.cat([(offset - 2 * part @ codes.T).argmin(1) for part in parts])


def codes_for(latents: Tensor, codebook: Tensor, chosen: Tensor) -> Tensor:
    """Return the codes that latents (B, D, h, w) chose, pixel by pixel (B h w,), in their shape."""
    batch, channels, height, width = latents.shape
    codes = codebook.detach()[chosen].reshape(batch, height, width, channels)
    return codes.movedim(3, 1)


def spread(latents: Tensor, count: int) -> Tensor:
    """Choose `count` of the latents (M, D) by their distance from those already chosen.

    Source: Arthur and Vassilvitskii 2007, "k-means++: the advantages of careful seeding", section
    2.2; many are chosen at once, because the exact order matters little for that many.
    """
    chosen = latents[torch.randint(len(latents), (1,))]
    while len(chosen) < count:
        near = chosen[nearest(latents, chosen)]
        errors = (latents - near).square().sum(1) + 1e-12
        wanted = min(len(chosen), count - len(chosen))
        chosen = torch.cat([chosen, latents[torch.multinomial(errors, wanted)]])
    return chosen
