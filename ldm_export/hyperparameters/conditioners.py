"""The hyperparameters of small conditioners: class embedding and segmentation encoder."""

from ldm_export.errors import WeightsError
from ldm_export.hyperparameters.shapes import Shapes, shape_of

_MAPPER = "channel_mapper.weight"


def read_class_embedding(shapes: Shapes) -> tuple[int, int]:
    """Return (rows, width) of a class embedding.

    Raises:
        WeightsError: It is missing or not a matrix.
    """
    rows, width = shape_of(shapes, "embedding.weight", 2)
    return rows, width


def read_channel_mapper(shapes: Shapes) -> tuple[int, int]:
    """Return (classes, channels) of a segmentation encoder's 1x1 convolution.

    Raises:
        WeightsError: It is missing, covers more than one pixel, or has a bias.
    """
    out_channels, num_classes, *size = shape_of(shapes, _MAPPER, 4)
    if size != [1, 1]:
        raise WeightsError(
            f"{_MAPPER} covers {size[0]}x{size[1]} pixels; a 1x1 convolution was expected"
        )
    if extra := [name for name in shapes if name != _MAPPER]:
        raise WeightsError(
            f"the segmentation encoder has {', '.join(extra)} in addition to {_MAPPER}, which this "
            "version does not export"
        )
    return num_classes, out_channels
