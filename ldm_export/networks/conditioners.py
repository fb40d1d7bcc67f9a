"""The class embedder and the segmentation encoder, which condition the UNet.

Source: Rombach et al. 2022 (arXiv:2112.10752), appendix E.2. Parameter names are those under
`cond_stage_model.` in CompVis checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_runtime.specs.networks import ClassEmbedderSpec, SegmentationEncoderSpec


class ClassEmbedder(nn.Module):
    """A learned vector for every class."""

    def __init__(self, spec: ClassEmbedderSpec) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.num_classes, spec.width)

    def forward(self, class_labels: Tensor) -> Tensor:
        """Map class labels (B,) int64 to context (B, 1, width)."""
        context: Tensor = self.embedding(class_labels[:, None])
        return context


class SpatialRescaler(nn.Module):
    """A segmentation encoder: a map reduced to latent size, with learned channels for its classes.

    The paper's code halves a map of one channel per class by bilinear interpolation and applies a
    1x1 convolution without bias. Both are linear and one acts on space, the other on channels, so
    that they commute, and the convolution of a one-hot pixel is a column of its matrix: looking it
    up first needs 3 channels where that needs 182. Bilinear downsampling by 2 is the mean of four
    pixels.
    """

    def __init__(self, spec: SegmentationEncoderSpec) -> None:
        super().__init__()
        self.shrink = 2**spec.num_downsampling_steps
        self.channel_mapper = nn.Conv2d(spec.num_classes, spec.out_channels, 1, bias=False)

    def forward(self, segmentation: Tensor) -> Tensor:
        """Map class ids (B, H, W) int64 to (B, out_channels, H / 2^n, W / 2^n), rounded down."""
        columns = torch.index_select(self.channel_mapper.weight, 1, segmentation.flatten())
        channels = columns.reshape(-1, *segmentation.shape).transpose(0, 1)
        return F.avg_pool2d(channels, self.shrink) if self.shrink > 1 else channels
