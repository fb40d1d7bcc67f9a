"""Patches against torch's Unfold and Fold, with which CompVis cuts and blends them."""

import numpy as np
import pytest
import torch

from ldm_runtime.tiling.patches import over_patches

pytestmark = pytest.mark.reference

RNG = np.random.default_rng(1)


def border_distance(side):
    """Distance of every pixel of a square to its border, 0 there and 0.5 in the middle."""
    places = torch.stack(
        torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1
    )
    relative = places / (side - 1)
    return torch.minimum(relative, 1 - relative).amin(dim=-1)


def folded(network, latents, factor):
    """Run a network on all patches of 128 every 64 and fold them with their weights."""
    _, channels, height, width = latents.shape
    columns = torch.nn.functional.unfold(torch.from_numpy(latents), 128, stride=64)
    patches = columns[0].T.reshape(-1, channels, 128, 128)
    results = torch.cat([torch.from_numpy(network(patch[None].numpy())) for patch in patches])
    side = 128 * factor
    weights = border_distance(side).clip(0.01, 0.5).double()

    def fold(values):
        return torch.nn.functional.fold(
            values.reshape(len(values), -1).T[None],
            output_size=(height * factor, width * factor),
            kernel_size=side,
            stride=64 * factor,
        )

    total = fold(results.double() * weights)
    return (total / fold(weights.expand(len(results), 1, side, side))).numpy()


@pytest.mark.parametrize(("height", "width"), [(128, 192), (192, 256)])
@pytest.mark.parametrize("factor", [1, 4])
def test_patches_are_blended_as_fold_blends_them(height, width, factor):
    latents = RNG.standard_normal((1, 3, height, width)).astype(np.float32)
    rows, columns = np.ogrid[: 128 * factor, : 128 * factor]
    places = np.sin(rows / 9 + columns / 17).astype(np.float32)

    def network(part):
        large = np.kron(part, np.ones((factor, factor), dtype=np.float32))
        return large * (1 + places) + part.mean() * places

    found = over_patches(network, latents, factor)

    expected = folded(network, latents, factor)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
