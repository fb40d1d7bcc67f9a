"""diffusers' `UNet2DModel` for a UNet whose attention is over pixels alone.

Its single-file loader knows no checkpoint of this kind, so that names are translated here, block by
block, and the fused queries, keys and values are taken apart in the order of the paper's code.
"""

import re

from diffusers import UNet2DModel

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_FIXED = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def load_unet_2d(spec, state):
    """Return the twin for a UNet's state dict, strictly loaded."""
    twin = UNet2DModel(
        in_channels=spec.in_channels,
        out_channels=spec.out_channels,
        block_out_channels=[mult * spec.model_channels for mult in spec.channel_mult],
        layers_per_block=spec.num_res_blocks,
        down_block_types=[_kind(spec, depth, "Down") for depth in spec.transformer_depth],
        up_block_types=[_kind(spec, depth, "Up") for depth in spec.transformer_depth[::-1]],
        downsample_type="resnet" if spec.resblock_updown else "conv",
        upsample_type="resnet" if spec.resblock_updown else "conv",
        resnet_time_scale_shift="scale_shift" if spec.scale_shift_norm else "default",
        attention_head_dim=spec.num_head_channels or spec.model_channels // spec.num_heads,
        norm_eps=1e-5,
        attn_norm_num_groups=32,
    )
    converted = {}
    for name, value in state.items():
        converted.update(_renamed(spec, name, value))
    twin.load_state_dict(converted, strict=True)
    _set_heads(spec, twin)
    return twin.eval().requires_grad_(False)


def _kind(spec, depth, direction):
    if depth:
        return f"Attn{direction}Block2D"
    return f"Resnet{direction}sampleBlock2D" if spec.resblock_updown else f"{direction}Block2D"


def _set_heads(spec, twin):
    """Give every attention the same number of heads, which its constructor has no word for."""
    for name, module in twin.named_modules():
        if re.search(r"attentions\.\d+$", name) and spec.num_heads is not None:
            module.heads = spec.num_heads
            module.scale = (module.to_q.out_features / spec.num_heads) ** -0.5


def _renamed(spec, name, value):
    layer, kind = name.rsplit(".", 1)
    if layer in _FIXED:
        return {f"{_FIXED[layer]}.{kind}": value}
    section, number, index, rest = re.match(
        r"(input_blocks|output_blocks|middle_block)\.(?:(\d+)\.(?=\d+\.))?(\d+)\.(.*)$", name
    ).groups()
    is_attention = rest.split(".")[0] in {"norm", "qkv", "proj_out"}
    block = _block(spec, section, number and int(number), int(index), rest, is_attention)
    if is_attention:
        return _attention(spec, block, rest, value)
    inner = rest.rsplit(".", 1)[0]
    if inner in {"op", "conv"}:
        return {f"{block}.conv.{kind}": value}
    return {f"{block}.{_RESNET[inner]}.{kind}": value}


def _block(spec, section, number, index, rest, is_attention):
    each = spec.num_res_blocks + 1
    if section == "middle_block":
        return "mid_block.attentions.0" if is_attention else f"mid_block.resnets.{index // 2}"
    if section == "input_blocks":
        level, place = divmod(number - 1, each)
        if place == spec.num_res_blocks:
            return f"down_blocks.{level}.downsamplers.0"
        blocks = f"down_blocks.{level}"
    else:
        level, place = divmod(number, each)
        blocks = f"up_blocks.{level}"
        if index > 0 and not is_attention:
            return f"{blocks}.upsamplers.0"
    return f"{blocks}.{'attentions' if is_attention else 'resnets'}.{place}"


def _attention(spec, block, rest, value):
    layer, kind = rest.rsplit(".", 1)
    if layer == "norm":
        return {f"{block}.group_norm.{kind}": value}
    value = value[..., 0] if kind == "weight" else value
    if layer == "proj_out":
        return {f"{block}.to_out.0.{kind}": value}
    channels = len(value) // 3
    heads = spec.num_heads or channels // spec.num_head_channels
    parts = value.reshape(heads, 3 * (channels // heads), *value.shape[1:]).split(
        channels // heads, dim=1
    )
    return {
        f"{block}.to_{letter}.{kind}": part.reshape(channels, *value.shape[1:])
        for letter, part in zip("qkv", parts, strict=True)
    }
