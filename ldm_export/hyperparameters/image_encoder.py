"""Hyperparameters of CLIP's image encoder read from shapes, in open_clip's names."""

import math
from dataclasses import dataclass

from ldm_export.errors import WeightsError
from ldm_export.hyperparameters.shapes import Shapes, indices, same, shape_of

_PATCHES, _POSITIONS, _PROJECTION = "conv1.weight", "positional_embedding", "proj"
_LAYERS = "transformer.resblocks"


@dataclass(frozen=True, kw_only=True)
class ImageEncoderShapes:
    """The hyperparameters of an image encoder that shapes tell; see `ImageEncoderSpec`."""

    width: int
    num_layers: int
    feed_forward_dim: int
    patch_size: int
    image_size: int
    embed_dim: int


def read_image_encoder(shapes: Shapes) -> ImageEncoderShapes:
    """Return what shapes tell.

    Raises:
        WeightsError: A decisive tensor is missing, or the shapes contradict each other.
    """
    width, channels, *patch = shape_of(shapes, _PATCHES, 4)
    positions, position_width = shape_of(shapes, _POSITIONS, 2)
    rows, embed_dim = shape_of(shapes, _PROJECTION, 2)
    side = math.isqrt(positions - 1)
    if channels != 3 or patch[0] != patch[1] or side < 1 or side**2 != positions - 1:
        raise WeightsError(
            f"the image encoder has patches of {patch[0]}x{patch[1]} pixels in {channels} channels "
            f"and {positions} positions; square patches in 3 channels, and one position more than "
            "there are patches in a square image, were expected"
        )
    widths = {
        f"rows of {_PATCHES}": width,
        f"the width of {_POSITIONS}": position_width,
        f"rows of {_PROJECTION}": rows,
    }
    inner = {}
    for layer in indices(shapes, _LAYERS):
        name = f"{_LAYERS}.{layer}.mlp.c_fc.weight"
        inner[f"rows of {name}"], widths[f"columns of {name}"] = shape_of(shapes, name, 2)
    if not inner:
        raise WeightsError(f"the image encoder has no layer ({_LAYERS}.0.*)")
    return ImageEncoderShapes(
        width=same(widths),
        num_layers=len(inner),
        feed_forward_dim=same(inner),
        patch_size=patch[0],
        image_size=patch[0] * side,
        embed_dim=embed_dim,
    )
