"""The UNets of models distilled from Stable Diffusion, as diffusers configures and builds them.

Sources: the `unet/config.json` of the released folders, as far as Nota-NetsPresso/BK-SDM (e13670c),
segmind/SSD-1B (e7fd132), ComfyUI and leejet/stable-diffusion.cpp (97d2990) repeat them.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

ATTENTION, RESIDUAL_BLOCK, NO_MIDDLE = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None
_SDXL = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """One UNet.

    Attributes:
        original: "sd1", "sd2" or "sdxl".
        depths: Transformer depth per level.
        outputs: Transformer depths on the way up, per level in running order, where they differ.
        middle: Class of the middle block.
        blocks: Residual blocks per level.
        millions: Its parameters at full size as published, or None.
    """

    original: str
    depths: tuple[int, ...]
    outputs: tuple[Any, ...] | None = None
    middle: str | None
    blocks: int = 1
    millions: float | None = None


DISTILLED = {
    "bk-sdm-base": Distilled(
        original="sd1", depths=(1, 1, 1, 0), middle=ATTENTION, millions=579.38
    ),
    "bk-sdm-small": Distilled(
        original="sd1", depths=(1, 1, 1, 0), middle=NO_MIDDLE, millions=482.35
    ),
    "bk-sdm-tiny": Distilled(original="sd1", depths=(1, 1, 1), middle=NO_MIDDLE, millions=323.38),
    "bk-sdm-v2-base": Distilled(original="sd2", depths=(1, 1, 1, 0), middle=ATTENTION),
    "bk-sdm-v2-small": Distilled(original="sd2", depths=(1, 1, 1, 0), middle=NO_MIDDLE),
    "bk-sdm-v2-tiny": Distilled(original="sd2", depths=(1, 1, 1), middle=NO_MIDDLE),
    "sdxs-512": Distilled(original="sd1", depths=(0, 1, 1), middle=NO_MIDDLE),
    "ssd-1b": Distilled(
        original="sdxl",
        depths=(0, 2, 4),
        outputs=((4, 4, 10), (2, 1, 1), 1),
        middle=RESIDUAL_BLOCK,
        blocks=2,
        millions=1331.33,
    ),
    "segmind-vega": Distilled(
        original="sdxl", depths=(0, 1, 2), middle=RESIDUAL_BLOCK, blocks=2, millions=745.23
    ),
    "koala-700m": Distilled(original="sdxl", depths=(0, 2, 5), middle=NO_MIDDLE),
    "koala-1b": Distilled(original="sdxl", depths=(0, 2, 6), middle=ATTENTION),
}


def full_size_unet(model: Distilled) -> UNet2DConditionModel:
    """Return a UNet of full size without weights, on torch's meta device."""
    widths = {3: (320, 640, 1280), 4: (320, 640, 1280, 1280)}[len(model.depths)]
    sizes = {
        "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
        "sd2": {"cross_attention_dim": 1024, "attention_head_dim": _heads(widths)},
        "sdxl": {
            "cross_attention_dim": 2048,
            "attention_head_dim": _heads(widths),
            "projection_class_embeddings_input_dim": 2816,
        },
    }
    with torch.device("meta"):
        return _unet(model, widths, **sizes[model.original])


def small_unet(model: Distilled, context_dim: int, vector_dim: int) -> UNet2DConditionModel:
    """Return a UNet with few channels for a context, and for SDXL a vector, of these widths."""
    if model.original == "sd1":
        widths = (32, 64, 96, 96)[: len(model.depths)]
        return _unet(model, widths, cross_attention_dim=context_dim, attention_head_dim=8)
    widths = (64, 128, 128, 128)[: len(model.depths)]
    sizes = {"cross_attention_dim": context_dim, "attention_head_dim": _heads(widths)}
    if model.original == "sdxl":
        sizes["projection_class_embeddings_input_dim"] = vector_dim
    return _unet(model, widths, **sizes)


def _heads(widths: tuple[int, ...]) -> tuple[int, ...]:
    """Return heads of 64 channels; diffusers' name for them is `attention_head_dim`."""
    return tuple(width // 64 for width in widths)


def _unet(model: Distilled, widths: tuple[int, ...], **sizes: Any) -> UNet2DConditionModel:
    kinds = ["CrossAttn" if depth else "" for depth in model.depths]
    extra = {"sd1": {}, "sd2": {"use_linear_projection": True}, "sdxl": _SDXL}[model.original]
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=widths,
        layers_per_block=model.blocks,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        mid_block_type=model.middle,
        transformer_layers_per_block=tuple(depth or 1 for depth in model.depths),
        reverse_transformer_layers_per_block=model.outputs,
        **extra,
        **sizes,
    )


def numbered_as_sdxl(name: str) -> str:
    """Return the name that a tensor of SSD-1B or Vega has in a single file of sgm.

    Both have as many residual blocks as SDXL, which is numbered: three blocks per level, the last
    of which changes the resolution.
    """
    if match := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", name):
        half, level, kind, index, rest = match.groups()
        place = 3 * int(level) + int(index) + (1 if half == "down" else 0)
        block = f"{'input' if half == 'down' else 'output'}_blocks.{place}"
        return f"{block}.0.{_res(rest)}" if kind == "resnets" else f"{block}.1.{rest}"
    if match := re.match(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.+)", name):
        return f"input_blocks.{3 * int(match[1]) + 3}.0.op.{match[2]}"
    if match := re.match(r"up_blocks\.(\d)\.upsamplers\.0\.conv\.(.+)", name):
        return f"output_blocks.{3 * int(match[1]) + 2}.2.conv.{match[2]}"
    if match := re.match(r"mid_block\.resnets\.0\.(.+)", name):
        return f"middle_block.0.{_res(match[1])}"
    ends = {
        "conv_in.": "input_blocks.0.0.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
    }
    prefix = next(each for each in ends if name.startswith(each))
    return ends[prefix] + name.removeprefix(prefix)


def _res(rest: str) -> str:
    layer, _, kind = rest.rpartition(".")
    layers = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return f"{layers[layer]}.{kind}"
