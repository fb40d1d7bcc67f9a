"""The hyperparameters of a depth estimator, read from the names and shapes of its parameters."""

import math

from ldm_export.errors import WeightsError
from ldm_export.hyperparameters.shapes import Shapes, indices, shape_of
from ldm_runtime.specs.networks import DepthEstimatorSpec

_LEVELS = 3
_HEAD_CHANNELS = 64


def read_depth_estimator(shapes: Shapes) -> DepthEstimatorSpec:
    """Return the record of a DPT-Hybrid. Its heads have 64 channels, as in every ViT.

    Raises:
        WeightsError: A decisive tensor is missing, or the position embeddings are not of a square.
    """
    stem_channels, image_channels, *_ = shape_of(shapes, "backbone.stem.conv.weight", 4)
    firsts = [f"backbone.levels.{level}.blocks.0" for level in range(_LEVELS)]
    last = [shape_of(shapes, f"{first}.conv3.weight", 4) for first in firsts]
    feed_forward_dim, width = shape_of(shapes, "model.blocks.0.mlp.fc1.weight", 2)
    return DepthEstimatorSpec(
        image_channels=image_channels,
        stem_channels=stem_channels,
        level_channels=tuple(shape[0] for shape in last),
        bottleneck_channels=tuple(shape[1] for shape in last),
        level_blocks=tuple(
            len(indices(shapes, f"backbone.levels.{level}.blocks")) for level in range(_LEVELS)
        ),
        width=width,
        num_heads=max(1, width // _HEAD_CHANNELS),
        feed_forward_dim=feed_forward_dim,
        grid=_grid(shape_of(shapes, "model.pos_embed", 3)[1]),
        fusion_channels=shape_of(shapes, "scratch.layer1_rn.weight", 4)[0],
        head_channels=shape_of(shapes, "scratch.output_conv.2.weight", 4)[0],
    )


def _grid(positions: int) -> int:
    """Return the side of a square of tokens, one more of which stands for the whole image."""
    grid = math.isqrt(positions - 1)
    if grid**2 + 1 != positions:
        raise WeightsError(
            f"the depth estimator has {positions} position embeddings (model.pos_embed); one more "
            "than a square number was expected, such as 577 for 24x24"
        )
    return grid
