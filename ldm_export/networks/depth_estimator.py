"""DPT-Hybrid, the depth estimator of MiDaS that Stable Diffusion 2 sees images with.

A residual network (BiT) turns an image into a grid of tokens, a vision transformer goes on with
them, and what two levels of the one and two layers of the other see is fused from coarse to fine.

Source: Ranftl et al. 2021 (arXiv:2103.13413); `ldm/modules/midas` of Stability-AI/stablediffusion
(cf1d67a), and its backbone `vit_base_resnet50_384` of timm 0.4. Parameter names are those under
`depth_model.model.` in its checkpoints, without `pretrained.` and without the names of the two
halves of the backbone inside each other.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_runtime.specs.networks import DepthEstimatorSpec

_GROUPS = 32
_NUM_LAYERS = 12
#: Layers whose outputs are fused, counted from 0.
_FUSED_LAYERS = (8, 11)
_EPSILON = 1e-8  # of weight standardisation


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose weights have mean 0 and variance 1 for each output channel.

    They are standardised when they are loaded, not in every call: in half precision the variance
    of small weights would vanish. Padding is that of TensorFlow: the result has 1/stride of the
    pixels, and what is odd is added on the right and at the bottom.

    Source: Qiao et al. 2019 (arXiv:1903.10520).
    """

    def __init__(self, channels: int, out_channels: int, size: int, stride: int = 1) -> None:
        missing = max(0, size - stride)  # of an image whose sides are multiples of the stride
        super().__init__(channels, out_channels, size, stride, missing // 2, bias=False)
        self.margin = missing % 2

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        *others: Any,  # noqa: ANN401  (of torch)
    ) -> None:
        name = f"{prefix}weight"
        if name in state_dict:
            weight = state_dict[name].double()
            variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
            standardised = (weight - mean) / torch.sqrt(variance + _EPSILON)
            state_dict[name] = standardised.to(state_dict[name].dtype)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, channels, h, w) to (B, out_channels, h / stride, w / stride)."""
        if self.margin:
            hidden = F.pad(hidden, (0, self.margin, 0, self.margin))
        return super().forward(hidden)


class Bottleneck(nn.Module):
    """Three convolutions, their input added, all of it rectified."""

    def __init__(self, channels: int, inner: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = StandardisedConv2d(channels, inner, 1)
        self.norm1 = nn.GroupNorm(_GROUPS, inner)
        self.conv2 = StandardisedConv2d(inner, inner, 3, stride)
        self.norm2 = nn.GroupNorm(_GROUPS, inner)
        self.conv3 = StandardisedConv2d(inner, out_channels, 1)
        self.norm3 = nn.GroupNorm(_GROUPS, out_channels)
        self.downsample: nn.ModuleDict | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, channels, h, w) to (B, out_channels, h / stride, w / stride)."""
        residual = torch.relu(self.norm1(self.conv1(hidden)))
        residual = torch.relu(self.norm2(self.conv2(residual)))
        residual = self.norm3(self.conv3(residual))
        if self.downsample is not None:
            hidden = self.downsample["norm"](self.downsample["conv"](hidden))
        return torch.relu(residual + hidden)


class Level(nn.Module):
    """Residual blocks, the first of which may halve the resolution."""

    def __init__(
        self, channels: int, inner: int, out_channels: int, count: int, stride: int
    ) -> None:
        super().__init__()
        first = Bottleneck(channels, inner, out_channels, stride)
        first.downsample = _normed(StandardisedConv2d(channels, out_channels, 1, stride))
        others = (Bottleneck(out_channels, inner, out_channels, 1) for _ in range(count - 1))
        self.blocks = nn.Sequential(first, *others)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, channels, h, w) to (B, out_channels, h / stride, w / stride)."""
        out: Tensor = self.blocks(hidden)
        return out


class Backbone(nn.Module):
    """The residual network: an image to the feature maps of its levels."""

    def __init__(self, spec: DepthEstimatorSpec) -> None:
        super().__init__()
        self.stem = _normed(StandardisedConv2d(spec.image_channels, spec.stem_channels, 7, 2))
        widths = (spec.stem_channels, *spec.level_channels)
        self.levels = nn.ModuleList(
            Level(widths[level], inner, widths[level + 1], count, stride=1 if level == 0 else 2)
            for level, (inner, count) in enumerate(
                zip(spec.bottleneck_channels, spec.level_blocks, strict=True)
            )
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) to (B, C, h, w) of every level: H / 4, H / 8 and H / 16 high."""
        hidden = torch.relu(self.stem["norm"](self.stem["conv"](image)))
        # Rectified values are never below 0, so that zeros beyond the edge are never the largest.
        hidden = F.max_pool2d(F.pad(hidden, (0, 1, 0, 1)), 3, 2)
        maps = []
        for level in self.levels:
            hidden = level(hidden)
            maps.append(hidden)
        return maps


class SelfAttention(nn.Module):
    """Multi-head self-attention; query, key and value are rows of one matrix."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N, width) to the same shape."""
        heads = torch.unflatten(self.qkv(tokens), 2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each pre-normalised and residual."""

    def __init__(self, spec: DepthEstimatorSpec) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, eps=1e-6)
        self.attn = SelfAttention(spec.width, spec.num_heads)
        self.norm2 = nn.LayerNorm(spec.width, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(spec.width, spec.feed_forward_dim),
                "fc2": nn.Linear(spec.feed_forward_dim, spec.width),
            }
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N, width) to the same shape."""
        tokens = tokens + self.attn(self.norm1(tokens))
        out: Tensor = tokens + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(tokens))))
        return out


class VisionTransformer(nn.Module):
    """The transformer over the grid of tokens, and one more that stands for the whole image."""

    def __init__(self, spec: DepthEstimatorSpec) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, spec.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + spec.grid**2, spec.width))
        project = nn.Conv2d(spec.level_channels[-1], spec.width, 1)
        self.patch_embed = nn.ModuleDict({"proj": project})
        self.blocks = nn.ModuleList(Layer(spec) for _ in range(_NUM_LAYERS))

    def forward(self, hidden: Tensor) -> list[Tensor]:
        """Map (B, C, grid, grid) to the tokens (B, 1 + grid², width) after the fused layers."""
        grid = self.patch_embed["proj"](hidden).flatten(2).transpose(1, 2)
        whole = self.cls_token.expand(hidden.shape[0], -1, -1)
        tokens = torch.cat([whole, grid], dim=1) + self.pos_embed
        outputs = []
        for number, block in enumerate(self.blocks):
            tokens = block(tokens)
            if number in _FUSED_LAYERS:
                outputs.append(tokens)
        return outputs


class Readout(nn.Module):
    """The tokens of a layer as a feature map, each told of the one for the whole image."""

    def __init__(self, spec: DepthEstimatorSpec) -> None:
        super().__init__()
        self.grid = spec.grid
        self.project = nn.Sequential(nn.Linear(2 * spec.width, spec.width), nn.GELU())

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, 1 + grid², width) to (B, width, grid, grid)."""
        whole, grid = tokens[:, :1], tokens[:, 1:]
        told: Tensor = self.project(torch.cat([grid, whole.expand_as(grid)], dim=2))
        return torch.unflatten(told.transpose(1, 2), 2, (self.grid, self.grid))


class ResidualUnit(nn.Module):
    """Two rectified convolutions, their input added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, channels, h, w) to the same shape."""
        residual: Tensor = self.conv2(torch.relu(self.conv1(torch.relu(hidden))))
        return residual + hidden


class Fusion(nn.Module):
    """A feature map, with a finer one added, at twice the size.

    The coarsest has nothing to add to; its `resConfUnit1` is in the checkpoint and unused.
    """

    def __init__(self, channels: int, *, adds: bool) -> None:
        super().__init__()
        if adds:
            self.resConfUnit1 = ResidualUnit(channels)
        self.resConfUnit2 = ResidualUnit(channels)
        self.out_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, coarse: Tensor, finer: Tensor | None = None) -> Tensor:
        """Map (B, channels, h, w) to (B, channels, 2h, 2w)."""
        if finer is not None:
            coarse = coarse + self.resConfUnit1(finer)
        out: Tensor = self.out_conv(_doubled(self.resConfUnit2(coarse)))
        return out


class Head(nn.Module):
    """Feature maps of all four sizes to one number per pixel."""

    def __init__(self, spec: DepthEstimatorSpec) -> None:
        super().__init__()
        fused, width = spec.fusion_channels, spec.width
        fine, finer, _ = spec.level_channels
        for number, channels in enumerate((fine, finer, width, width), start=1):
            entry = nn.Conv2d(channels, fused, 3, padding=1, bias=False)
            self.add_module(f"layer{number}_rn", entry)
            self.add_module(f"refinenet{number}", Fusion(fused, adds=number < 4))
        self.output_conv = nn.Sequential(
            nn.Conv2d(fused, fused // 2, 3, padding=1),
            nn.UpsamplingBilinear2d(scale_factor=2),  # with aligned corners
            nn.Conv2d(fused // 2, spec.head_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(spec.head_channels, 1, 1),
            nn.ReLU(),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Map (B, C, h, w) from fine to coarse to (B, H, W), twice as high as the finest."""
        *finer, coarsest = (
            self.get_submodule(f"layer{number}_rn")(each)
            for number, each in enumerate(maps, start=1)
        )
        path = self.get_submodule("refinenet4")(coarsest)
        for number, each in reversed(list(enumerate(finer, start=1))):
            path = self.get_submodule(f"refinenet{number}")(path, each)
        depth: Tensor = self.output_conv(path)
        return depth.squeeze(1)


class DepthEstimator(nn.Module):
    """Image to inverse depth, in no unit: nearer is more."""

    def __init__(self, spec: DepthEstimatorSpec) -> None:
        super().__init__()
        self.backbone = Backbone(spec)
        self.model = VisionTransformer(spec)
        # Numbered as in the checkpoint, which counts reshaping between them.
        reshaped = (nn.Identity(), nn.Identity())
        self.act_postprocess3 = nn.Sequential(
            Readout(spec), *reshaped, nn.Conv2d(spec.width, spec.width, 1)
        )
        self.act_postprocess4 = nn.Sequential(
            Readout(spec),
            *reshaped,
            nn.Conv2d(spec.width, spec.width, 1),
            nn.Conv2d(spec.width, spec.width, 3, stride=2, padding=1),
        )
        self.scratch = Head(spec)

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, 3, side, side) from -1 to 1 to inverse depth (B, side, side)."""
        fine, finer, hidden = self.backbone(image)
        earlier, later = self.model(hidden)
        coarse, coarsest = self.act_postprocess3(earlier), self.act_postprocess4(later)
        depth: Tensor = self.scratch([fine, finer, coarse, coarsest])
        return depth


def _normed(convolution: StandardisedConv2d) -> nn.ModuleDict:
    norm = nn.GroupNorm(_GROUPS, convolution.out_channels)
    return nn.ModuleDict({"conv": convolution, "norm": norm})


def _doubled(hidden: Tensor) -> Tensor:
    """Return a feature map at twice the size, its corners kept."""
    return F.interpolate(hidden, scale_factor=2, mode="bilinear", align_corners=True)
