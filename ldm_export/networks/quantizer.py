"""The codebook of a VQ autoencoder, and the nearest of its vectors to every latent pixel.

Source: van den Oord et al. 2017 (arXiv:1711.00937), section 3.1. The nearest e to z has the largest
2 z.e - |e|^2, because |z|^2 is the same for all of them. Two design decisions:

* The table of pixels times codes would take 128 MiB for one image of 256x256 and 8192 codes. It
  is computed a piece of the codebook at a time, and only the index of the best is kept. Nothing
  else reads a piece of the table, so that no order of execution keeps two of them.
* Products are element by element and not a matrix product, which GPU engines compute in TF32 even
  where a graph says float32; ten bits do not tell neighbours in a codebook apart.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_PIECE = 512  # codes at least
_MOST_PIECES = 16


class Quantizer(nn.Module):
    """A codebook of `num_codes` vectors of `dim` channels.

    Attributes:
        piece: How many codes are compared with every pixel at a time.
    """

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)
        self.piece = max(_PIECE, -(-num_codes // _MOST_PIECES))

    def forward(self, latents: Tensor) -> Tensor:
        """Replace every pixel of latents (B, dim, h, w) by the nearest vector of the codebook."""
        codes: Tensor = self.embedding(self.nearest(latents))
        return codes.permute(0, 3, 1, 2)

    def nearest(self, latents: Tensor) -> Tensor:
        """Return the index of the vector nearest to every pixel of latents (B, dim, h, w).

        Returns:
            Rows of the codebook (B, h, w) int64, the first of several that are equally near.
        """
        doubled = (2 * latents.flatten(2)[..., None]).unbind(1)
        starts = range(0, self.embedding.num_embeddings, self.piece)
        pieces = [self.embedding.weight[start : start + self.piece] for start in starts]
        rows = [_scores(doubled, piece.unbind(1)).argmax(dim=2) for piece in pieces]
        best = torch.stack([row + start for row, start in zip(rows, starts, strict=True)], dim=2)
        winner = _scores(doubled, self.embedding(best).unbind(3)).argmax(dim=2, keepdim=True)
        return torch.unflatten(best.gather(2, winner)[..., 0], 1, latents.shape[2:])


def _scores(doubled: Sequence[Tensor], codes: Sequence[Tensor]) -> Tensor:
    """Return 2 z.e - |e|^2, (B, N, n), for every pixel and code, both one tensor per channel.

    Args:
        doubled: 2 z, each (B, N, 1).
        codes: e, each (n,) or, with its own codes per pixel, (B, N, n).
    """
    products, squares = doubled[0] * codes[0], codes[0] * codes[0]
    for pixel, code in zip(doubled[1:], codes[1:], strict=True):
        products, squares = products + pixel * code, squares + code * code
    return products - squares
