"""Names and shapes of checkpoints in the CompVis layout, for tests.

Written from the description of the layout and from nothing in `ldm_export`, so that the two can
disagree.
"""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, kw_only=True)
class FakeTensor:
    """A tensor of which nothing but shape and type exists, unless it has values."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    values: np.ndarray | None = None

    def numpy(self):
        assert self.values is not None, "the values of a weight were read"
        return self.values


def with_values(values, dtype="float32"):
    array = np.asarray(values)
    return FakeTensor(shape=array.shape, dtype=dtype, values=array)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Hyperparameters of a checkpoint; the defaults are those of Stable Diffusion 1."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention: str = "transformer"
    scale_shift: bool = False
    updown: bool = False
    depth: tuple[int, ...] = (1, 1, 1, 0)
    middle_depth: int = 1
    context_dim: int = 768
    linear_projection: bool = False
    vector_dim: int | None = None
    image_channels: int = 3
    vae_channels: int = 128
    vae_mult: tuple[int, ...] = (1, 2, 4, 4)
    vae_res_blocks: int = 2
    vae_attention: tuple[int, ...] = ()
    vae_middle: bool = True
    codebook: int | None = None
    z_channels: int = 4
    embed_dim: int = 4
    conditioner: str = "clip"
    text_width: int = 768
    text_layers: int = 12
    text_inner: int = 3072
    vocab_size: int = 49408
    max_tokens: int = 77
    bert_inner: int = 512
    classes: int = 1000
    map_classes: int = 182


SD1 = Layout()
TINY = Layout(
    model_channels=32,
    channel_mult=(1, 2, 3),
    num_res_blocks=1,
    depth=(0, 1, 2),
    middle_depth=2,
    context_dim=96,
    vae_channels=32,
    vae_mult=(1, 2, 2),
    vae_res_blocks=1,
    vae_attention=(2,),
    z_channels=6,
    embed_dim=4,
    text_width=96,
    text_layers=3,
    text_inner=200,
    vocab_size=600,
    max_tokens=24,
)


SD2 = replace(
    SD1,
    context_dim=1024,
    linear_projection=True,
    conditioner="openclip",
    text_width=1024,
    text_layers=24,
)


class _Shapes(dict):
    def conv(self, name, cin, cout, size=3):
        self[f"{name}.weight"] = (cout, cin, size, size)
        self[f"{name}.bias"] = (cout,)

    def linear(self, name, cin, cout, bias=True):
        self[f"{name}.weight"] = (cout, cin)
        if bias:
            self[f"{name}.bias"] = (cout,)

    def norm(self, name, channels):
        self[f"{name}.weight"] = (channels,)
        self[f"{name}.bias"] = (channels,)


def unet_shapes(layout):
    mc, shapes = layout.model_channels, _Shapes()
    shapes.linear("time_embed.0", mc, 4 * mc)
    shapes.linear("time_embed.2", 4 * mc, 4 * mc)
    if layout.vector_dim is not None:
        shapes.linear("label_emb.0.0", layout.vector_dim, 4 * mc)
        shapes.linear("label_emb.0.2", 4 * mc, 4 * mc)
    shapes.conv("input_blocks.0.0", layout.in_channels, mc)
    stack, channels, index = [mc], mc, 1
    for level, mult in enumerate(layout.channel_mult):
        for _ in range(layout.num_res_blocks):
            _unet_res_block(shapes, f"input_blocks.{index}.0", channels, mc * mult, layout)
            channels = mc * mult
            _attention(shapes, f"input_blocks.{index}.1", channels, layout.depth[level], layout)
            stack.append(channels)
            index += 1
        if level < len(layout.channel_mult) - 1:
            _resampling(shapes, f"input_blocks.{index}.0", "op", channels, layout)
            stack.append(channels)
            index += 1
    _unet_res_block(shapes, "middle_block.0", channels, channels, layout)
    _attention(shapes, "middle_block.1", channels, layout.middle_depth, layout)
    _unet_res_block(shapes, "middle_block.2", channels, channels, layout)
    index = 0
    for level, mult in reversed(list(enumerate(layout.channel_mult))):
        for block in range(layout.num_res_blocks + 1):
            name = f"output_blocks.{index}"
            _unet_res_block(shapes, f"{name}.0", channels + stack.pop(), mc * mult, layout)
            channels = mc * mult
            _attention(shapes, f"{name}.1", channels, layout.depth[level], layout)
            if level and block == layout.num_res_blocks:
                position = 2 if layout.depth[level] else 1
                _resampling(shapes, f"{name}.{position}", "conv", channels, layout)
            index += 1
    shapes.norm("out.0", channels)
    shapes.conv("out.2", mc, layout.out_channels)
    return shapes


def _unet_res_block(shapes, name, cin, cout, layout):
    rows = 2 * cout if layout.scale_shift else cout
    shapes.norm(f"{name}.in_layers.0", cin)
    shapes.conv(f"{name}.in_layers.2", cin, cout)
    shapes.linear(f"{name}.emb_layers.1", 4 * layout.model_channels, rows)
    shapes.norm(f"{name}.out_layers.0", cout)
    shapes.conv(f"{name}.out_layers.3", cout, cout)
    if cin != cout:
        shapes.conv(f"{name}.skip_connection", cin, cout, 1)


def _resampling(shapes, name, convolution, channels, layout):
    if layout.updown:
        _unet_res_block(shapes, name, channels, channels, layout)
    else:
        shapes.conv(f"{name}.{convolution}", channels, channels)


def _attention(shapes, name, channels, depth, layout):
    if not depth:
        return
    if layout.attention == "transformer":
        _transformer(shapes, name, channels, depth, layout)
        return
    shapes.norm(f"{name}.norm", channels)
    for part, rows in (("qkv", 3 * channels), ("proj_out", channels)):
        shapes[f"{name}.{part}.weight"] = (rows, channels, 1)
        shapes[f"{name}.{part}.bias"] = (rows,)


def _transformer(shapes, name, channels, depth, layout):
    shapes.norm(f"{name}.norm", channels)
    for part in ("proj_in", "proj_out"):
        if layout.linear_projection:
            shapes.linear(f"{name}.{part}", channels, channels)
        else:
            shapes.conv(f"{name}.{part}", channels, channels, 1)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        for attention, width in (("attn1", channels), ("attn2", layout.context_dim)):
            shapes.linear(f"{block}.{attention}.to_q", channels, channels, bias=False)
            shapes.linear(f"{block}.{attention}.to_k", width, channels, bias=False)
            shapes.linear(f"{block}.{attention}.to_v", width, channels, bias=False)
            shapes.linear(f"{block}.{attention}.to_out.0", channels, channels)
        shapes.linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
        shapes.linear(f"{block}.ff.net.2", 4 * channels, channels)
        for norm in ("norm1", "norm2", "norm3"):
            shapes.norm(f"{block}.{norm}", channels)


def autoencoder_shapes(layout):
    shapes, numbers = _Shapes(), 2 if layout.codebook is None else 1
    _encoder(shapes, layout, numbers)
    shapes.conv("quant_conv", numbers * layout.z_channels, numbers * layout.embed_dim, 1)
    if layout.codebook is not None:
        shapes["quantize.embedding.weight"] = (layout.codebook, layout.embed_dim)
    shapes.conv("post_quant_conv", layout.embed_dim, layout.z_channels, 1)
    _decoder(shapes, layout)
    return shapes


def _encoder(shapes, layout, numbers):
    ch, mults = layout.vae_channels, layout.vae_mult
    shapes.conv("encoder.conv_in", layout.image_channels, ch)
    channels = ch
    for level, mult in enumerate(mults):
        for block in range(layout.vae_res_blocks):
            _vae_res_block(shapes, f"encoder.down.{level}.block.{block}", channels, ch * mult)
            channels = ch * mult
            if level in layout.vae_attention:
                _vae_attention(shapes, f"encoder.down.{level}.attn.{block}", channels)
        if level < len(mults) - 1:
            shapes.conv(f"encoder.down.{level}.downsample.conv", channels, channels)
    _vae_ends(shapes, "encoder", channels, channels, layout)
    shapes.conv("encoder.conv_out", channels, numbers * layout.z_channels)


def _decoder(shapes, layout):
    ch, mults = layout.vae_channels, layout.vae_mult
    channels = ch * mults[-1]
    shapes.conv("decoder.conv_in", layout.z_channels, channels)
    for level, mult in reversed(list(enumerate(mults))):
        for block in range(layout.vae_res_blocks + 1):
            _vae_res_block(shapes, f"decoder.up.{level}.block.{block}", channels, ch * mult)
            channels = ch * mult
            if level in layout.vae_attention:
                _vae_attention(shapes, f"decoder.up.{level}.attn.{block}", channels)
        if level:
            shapes.conv(f"decoder.up.{level}.upsample.conv", channels, channels)
    _vae_ends(shapes, "decoder", ch * mults[-1], channels, layout)
    shapes.conv("decoder.conv_out", channels, layout.image_channels)


def _vae_ends(shapes, side, middle, last, layout):
    _vae_res_block(shapes, f"{side}.mid.block_1", middle, middle)
    if layout.vae_middle:
        _vae_attention(shapes, f"{side}.mid.attn_1", middle)
    _vae_res_block(shapes, f"{side}.mid.block_2", middle, middle)
    shapes.norm(f"{side}.norm_out", last)


def _vae_res_block(shapes, name, cin, cout):
    shapes.norm(f"{name}.norm1", cin)
    shapes.conv(f"{name}.conv1", cin, cout)
    shapes.norm(f"{name}.norm2", cout)
    shapes.conv(f"{name}.conv2", cout, cout)
    if cin != cout:
        shapes.conv(f"{name}.nin_shortcut", cin, cout, 1)


def _vae_attention(shapes, name, channels):
    shapes.norm(f"{name}.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        shapes.conv(f"{name}.{part}", channels, channels, 1)


def text_shapes(layout):
    width, shapes = layout.text_width, _Shapes()
    shapes["text_model.embeddings.token_embedding.weight"] = (layout.vocab_size, width)
    shapes["text_model.embeddings.position_embedding.weight"] = (layout.max_tokens, width)
    for index in range(layout.text_layers):
        layer = f"text_model.encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes.linear(f"{layer}.self_attn.{part}", width, width)
        shapes.norm(f"{layer}.layer_norm1", width)
        shapes.linear(f"{layer}.mlp.fc1", width, layout.text_inner)
        shapes.linear(f"{layer}.mlp.fc2", layout.text_inner, width)
        shapes.norm(f"{layer}.layer_norm2", width)
    shapes.norm("text_model.final_layer_norm", width)
    return shapes


def openclip_shapes(width, layers, *, vocab_size=49408, max_tokens=77):
    """Return the tensors of open_clip's text tower, those that no network needs included."""
    shapes = _Shapes()
    shapes["token_embedding.weight"] = (vocab_size, width)
    shapes["positional_embedding"] = (max_tokens, width)
    for index in range(layers):
        block = f"transformer.resblocks.{index}"
        shapes.norm(f"{block}.ln_1", width)
        shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
        shapes.linear(f"{block}.attn.out_proj", width, width)
        shapes.norm(f"{block}.ln_2", width)
        shapes.linear(f"{block}.mlp.c_fc", width, 4 * width)
        shapes.linear(f"{block}.mlp.c_proj", 4 * width, width)
    shapes.norm("ln_final", width)
    shapes["text_projection"] = (width, width)
    shapes["logit_scale"] = ()
    return shapes


def bert_shapes(layout):
    width, inner, shapes = layout.text_width, layout.bert_inner, _Shapes()
    shapes["transformer.token_emb.weight"] = (layout.vocab_size, width)
    shapes["transformer.pos_emb.emb.weight"] = (layout.max_tokens, width)
    for index in range(layout.text_layers):
        attention, feed_forward = (
            f"transformer.attn_layers.layers.{2 * index + half}" for half in (0, 1)
        )
        shapes.norm(f"{attention}.0", width)
        for part in ("to_q", "to_k", "to_v"):
            shapes.linear(f"{attention}.1.{part}", width, inner, bias=False)
        shapes.linear(f"{attention}.1.to_out", inner, width)
        shapes.norm(f"{feed_forward}.0", width)
        shapes.linear(f"{feed_forward}.1.net.0.0", width, layout.text_inner)
        shapes.linear(f"{feed_forward}.1.net.2", layout.text_inner, width)
    shapes.norm("transformer.norm", width)
    return shapes


def conditioner_shapes(layout):
    """Return the tensors under `cond_stage_model.`, those that no network needs included."""
    match layout.conditioner:
        case "clip":
            named = {f"transformer.{name}": shape for name, shape in text_shapes(layout).items()}
            return named | {"transformer.text_model.embeddings.position_ids": (1, 77)}
        case "openclip":
            openclip = openclip_shapes(layout.text_width, layout.text_layers)
            return {f"model.{name}": shape for name, shape in openclip.items()}
        case "bert":
            logits = _Shapes()
            logits.linear("transformer.to_logits", layout.text_width, layout.vocab_size)
            return bert_shapes(layout) | logits
        case "class":
            return {"embedding.weight": (layout.classes, layout.text_width)}
        case "segmentation_encoder":
            channels = layout.in_channels - layout.out_channels
            return {"channel_mapper.weight": (channels, layout.map_classes, 1, 1)}
        case "autoencoder":
            return autoencoder_shapes(layout)
        case _:
            return {}


def scaled_linear(start=0.00085, end=0.012, steps=1000):
    betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    return np.cumprod(1.0 - betas)


SDXL = replace(
    SD1,
    channel_mult=(1, 2, 4),
    depth=(0, 2, 10),
    middle_depth=10,
    context_dim=2048,
    linear_projection=True,
    vector_dim=2816,
    conditioner="none",
)
REFINER = replace(
    SDXL,
    model_channels=384,
    channel_mult=(1, 2, 4, 4),
    depth=(0, 4, 4, 0),
    middle_depth=4,
    context_dim=1280,
    vector_dim=2560,
)


def sdxl_checkpoint(layout=SDXL):
    """Return the tensors of SDXL's base model or of its refiner by name, as fakes."""
    big = {f"model.{name}": shape for name, shape in openclip_shapes(1280, 32).items()}
    texts = {"conditioner.embedders.0.": big}
    if layout.context_dim == 2048:
        small = {f"transformer.{name}": shape for name, shape in text_shapes(SD1).items()}
        texts = {"conditioner.embedders.0.": small, "conditioner.embedders.1.": big}
    return checkpoint(layout) | {
        prefix + name: FakeTensor(shape=shape)
        for prefix, shapes in texts.items()
        for name, shape in shapes.items()
    }


def checkpoint(layout=SD1, *, ema=False, schedule=True, dtype="float32"):
    """Return the tensors of a whole checkpoint by name, as fakes."""
    parts = {
        "model.diffusion_model.": unet_shapes(layout),
        "first_stage_model.": autoencoder_shapes(layout),
        "cond_stage_model.": conditioner_shapes(layout),
    }
    tensors = {
        prefix + name: FakeTensor(
            shape=shape, dtype="int64" if name.endswith("position_ids") else dtype
        )
        for prefix, shapes in parts.items()
        for name, shape in shapes.items()
    }
    if ema:
        tensors["model_ema.decay"] = with_values(0.9999)
        tensors["model_ema.num_updates"] = with_values(7, "int64")
        for name, shape in parts["model.diffusion_model."].items():
            tensors["model_ema.diffusion_model" + name.replace(".", "")] = FakeTensor(
                shape=shape, dtype=dtype
            )
    if schedule:
        alphas = scaled_linear().astype(np.float32)
        tensors["alphas_cumprod"] = with_values(alphas)
        tensors["sqrt_alphas_cumprod"] = FakeTensor(shape=alphas.shape)
        tensors["betas"] = FakeTensor(shape=alphas.shape)
    return tensors
