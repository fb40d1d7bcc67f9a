"""Inpainting for any model and any sampler: a denoiser with part of x0 known."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ldm_runtime.tiling.tiles import Float32Array


@dataclass(frozen=True, kw_only=True)
class MaskedDenoiser:
    """A denoiser with part of x0 known: inpainting for any model and any sampler.

    Before each call the known latents are set to `init + sigma * noise`, their value at that level
    on the path from `noise` to `init`, so that the model generates the rest to match them. After it
    x0 is set to `init` there. To a sampler the known area is thus one whose x0 never changes: a
    deterministic sampler that starts there from `init + sigma * noise` stays on that line exactly,
    since it only interpolates between x0 and noise, and every sampler that ends at sigma 0 ends in
    `init`. Noise that a stochastic sampler adds there is not seen by the model.

    Source: Lugmayr et al. 2022 (arXiv:2201.09865), equation 8, with one noise for all levels;
    on latents as in Avrahami et al. 2022 (arXiv:2206.02779).

    Attributes:
        denoise: The denoiser of the model.
        init: Latents of the image, (B, C, h, w) or (1, C, h, w).
        noise: Standard normal noise that sampling starts from, (B, C, h, w).
        mask: 1 in the masked region, 0 where latents are known, (1, 1, h, w).
    """

    denoise: Callable[[Float32Array, float], Float32Array]
    init: Float32Array
    noise: Float32Array
    mask: Float32Array

    def __call__(self, latents: Float32Array, sigma: float) -> Float32Array:
        """Predict x0 from `latents` (B, C, h, w) at noise level `sigma`."""
        unknown = self.mask > 0
        seen = np.where(unknown, latents, self.init + sigma * self.noise)
        return np.where(unknown, self.denoise(seen, sigma), self.init)
