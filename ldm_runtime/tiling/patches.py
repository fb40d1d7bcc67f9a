"""Networks over overlapping patches of large images, blended as LDM's super-resolution does.

A network that enlarges sees no further than a patch of the size it was trained with, and its memory
does not grow with the image. Patches fade out towards their borders and are divided by the sum of
their weights, so that where one alone lies it is left as it is.

Source: `split_input_params` in CompVis/latent-diffusion, commit a506df5, `ldm/models/diffusion/
ddpm.py`: patches of 128 every 64, weights clipped to 0.01 and 0.5. There a rim that no patch
reaches is 0/0; here the last patch is moved to the border.
"""

from collections.abc import Callable
from itertools import product

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
#: Maps (B, C, h, w) to (B, D, f h, f w).
Transform = Callable[[Float32Array], Float32Array]

#: Side and distance of patches in latent pixels.
PATCH, STRIDE = 128, 64
_LOWEST_WEIGHT, _HIGHEST_WEIGHT = 0.01, 0.5


def over_patches(transform: Transform, latents: Float32Array, factor: int = 1) -> Float32Array:
    """Return the output of a network over latents (B, C, h, w), patch by patch if they are large.

    Args:
        transform: The network; it is fed at most `PATCH` latent pixels per side, the whole batch
            at once.
        latents: Latents to transform.
        factor: Pixels of the result that a latent pixel covers in each direction.
    """
    height, width = latents.shape[2:]
    if max(height, width) <= PATCH:
        return transform(latents)
    sides = min(height, PATCH), min(width, PATCH)
    weights = border_weights(sides[0] * factor, sides[1] * factor)
    # float64 for the two sums: what one patch alone covers comes back within a rounding.
    total = np.zeros((height * factor, width * factor))
    blended: npt.NDArray[np.float64] | None = None
    for top, left in product(patch_starts(height), patch_starts(width)):
        part = latents[:, :, top : top + sides[0], left : left + sides[1]]
        result = transform(np.ascontiguousarray(part))
        if blended is None:
            blended = np.zeros((*result.shape[:2], *total.shape))
        rows, columns = (
            slice(start * factor, (start + side) * factor)
            for start, side in zip((top, left), sides, strict=True)
        )
        blended[:, :, rows, columns] += result * weights
        total[rows, columns] += weights
    assert blended is not None, "there is always a patch"
    return (blended / total).astype(np.float32)


def patch_starts(length: int) -> list[int]:
    """Return where patches start along an axis: every `STRIDE`, the last one at the border."""
    last = max(length - PATCH, 0)
    return [*range(0, last, STRIDE), last]


def border_weights(height: int, width: int) -> npt.NDArray[np.float64]:
    """Return the weight of every pixel of a patch, (height, width): its distance to the border.

    The distance along an axis goes from 0 at the border to 0.5 in the middle; the smaller of the
    two counts, and is clipped.
    """
    rows, columns = _distances(height), _distances(width)
    nearest = np.minimum(rows[:, None], columns)
    return np.clip(nearest, _LOWEST_WEIGHT, _HIGHEST_WEIGHT)


def _distances(length: int) -> npt.NDArray[np.float64]:
    places = np.arange(length) / max(length - 1, 1)
    return np.minimum(places, 1 - places)
