"""The work of one call of a network, derived from the hyperparameters of the network.

Counted as `torch.utils.flop_counter` does: two operations a multiply-add of convolutions, linear
layers and attention; biases, normalisations and activations count nothing.
"""

from dataclasses import dataclass
from functools import reduce

from ldm_runtime.specs.model import ModelSpec, components_of
from ldm_runtime.specs.networks import (
    AutoencoderSpec,
    ImageEncoderSpec,
    TextEncoderSpec,
    UNetSpec,
)

_BERT_HEAD_CHANNELS = 64  # whatever the width


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one call: operations, and parameters to read.

    Attributes:
        flops: Floating-point operations.
        parameters: Weights, each read at least once a call.
    """

    flops: int = 0
    parameters: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(flops=self.flops + other.flops, parameters=self.parameters + other.parameters)

    def rows(self, count: int) -> "Work":
        """Return the work of a batch, if this is that of one row."""
        return Work(flops=count * self.flops, parameters=self.parameters)


def network_work(
    spec: ModelSpec, height: int, width: int, images: int, rows: int
) -> dict[str, Work]:
    """Return the work of one call of each network a request runs, lookups in tables left out.

    Args:
        spec: The model.
        height: Of the latents.
        width: Of the latents.
        images: Images in a call of the decoder.
        rows: Rows in a call of the UNet: a multiple of the images with guidance.
    """
    work, tokens = {}, 1
    for name, component in components_of(spec).items():
        encoder = spec.networks[component.network]
        if isinstance(encoder, TextEncoderSpec):
            prompts = min(rows // images, component.samples_per_image)
            work[name] = text_encoder_work(encoder).rows(prompts)
            tokens = encoder.max_tokens
        if isinstance(encoder, ImageEncoderSpec):
            work[name] = image_encoder_work(encoder)
    if spec.unet is not None:
        work["unet"] = unet_work(spec.unet, height, width, tokens).rows(rows)
    work["vae_decoder"] = decoder_work(spec.autoencoder, height, width).rows(images)
    return work


def unet_work(spec: UNetSpec, height: int, width: int, tokens: int) -> Work:
    """Return the work of the UNet on one row of latents of a height and width."""
    channels, pixels = spec.model_channels, height * width
    work = _unet_embeddings(spec) + _conv(spec.in_channels, channels, pixels)
    skips = [channels]
    for level, mult in enumerate(spec.channel_mult):
        for depth in spec.input_depths(level):
            work += _unet_res_block(spec, channels, mult * spec.model_channels, pixels)
            channels = mult * spec.model_channels
            work += _mixing(spec, channels, depth, pixels, tokens)
            skips.append(channels)
        if level + 1 < len(spec.channel_mult):
            pixels //= 4
            work += _resizing(spec, channels, pixels)
            skips.append(channels)
    work += _unet_middle(spec, channels, pixels, tokens)
    for level, mult in reversed(list(enumerate(spec.channel_mult))):
        for depth in spec.output_depths(level):
            wide = channels + skips.pop()
            channels = mult * spec.model_channels
            work += _unet_res_block(spec, wide, channels, pixels)
            work += _mixing(spec, channels, depth, pixels, tokens)
        if level:
            pixels *= 4
            work += _resizing(spec, channels, pixels)
    return work + _norm(channels) + _conv(channels, spec.out_channels, pixels)


def decoder_work(spec: AutoencoderSpec, height: int, width: int) -> Work:
    """Return the work of the autoencoder's decoder on latents of a height and width."""
    channels, pixels = spec.channels * spec.channel_mult[-1], height * width
    work = _codebook(spec) + _conv(spec.embed_dim, spec.z_channels, pixels, kernel=1)
    work += _conv(spec.z_channels, channels, pixels)
    work += _res_block(channels, channels, pixels) + _res_block(channels, channels, pixels)
    if spec.middle_attention:
        work += _pixel_attention(channels, pixels)
    for level, mult in reversed(list(enumerate(spec.channel_mult))):
        for _ in range(spec.num_res_blocks + 1):
            work += _res_block(channels, mult * spec.channels, pixels)
            channels = mult * spec.channels
            if level in spec.attention_levels:
                work += _pixel_attention(channels, pixels)
        if level:
            pixels *= 4
            work += _conv(channels, channels, pixels)
    return work + _norm(channels) + _conv(channels, spec.image_channels, pixels)


def text_encoder_work(spec: TextEncoderSpec) -> Work:
    """Return the work of a text encoder on one prompt or layout, without layers that nothing needs.

    The pooled output passes all of them.
    """
    width, tokens = spec.width, spec.max_tokens
    is_bert = spec.kind == "bert"
    inner = spec.num_heads * _BERT_HEAD_CHANNELS if is_bert else width
    layer = _encoder_layer(spec, tokens, inner, bias=not is_bert)
    embeddings = Work(parameters=(spec.vocab_size + tokens) * width)
    work = _sum(embeddings, *[layer] * _layers_run(spec))
    if spec.final_norm or spec.pooled_dim is not None:
        work += _norm(width)
    if spec.pooled_dim is not None:
        work += _linear(width, spec.pooled_dim, 1, bias=False)
    return work


def image_encoder_work(spec: ImageEncoderSpec) -> Work:
    """Return the work of CLIP's image encoder on one image."""
    width, tokens = spec.width, spec.num_tokens
    patch = spec.in_channels * spec.patch_size**2
    return _sum(
        _linear(patch, width, tokens - 1, bias=False),
        Work(parameters=(1 + tokens) * width),  # of the class embedding, and of positions
        _norm(width),
        *[_encoder_layer(spec, tokens, width, bias=True)] * spec.num_layers,
        _norm(width),
        _linear(width, spec.embed_dim, 1, bias=False),
    )


def _encoder_layer(
    spec: TextEncoderSpec | ImageEncoderSpec, tokens: int, inner: int, *, bias: bool
) -> Work:
    """Return the work of a transformer layer whose queries, keys and values are `inner` wide."""
    return _sum(
        _norm(spec.width),
        *[_linear(spec.width, inner, tokens, bias=bias)] * 3,
        _attention(tokens, tokens, inner),
        _linear(inner, spec.width, tokens),
        _norm(spec.width),
        _linear(spec.width, spec.feed_forward_dim, tokens),
        _linear(spec.feed_forward_dim, spec.width, tokens),
    )


def _layers_run(spec: TextEncoderSpec) -> int:
    return spec.context_layers if spec.pooled_dim is None else spec.num_layers


def _unet_embeddings(spec: UNetSpec) -> Work:
    """Return the work on one timestep, with the vector and the guidance scale if there are."""
    channels, embedding = spec.model_channels, 4 * spec.model_channels
    work = _linear(channels, embedding, 1) + _linear(embedding, embedding, 1)
    if spec.vector_dim is not None:
        work += _linear(spec.vector_dim, embedding, 1) + _linear(embedding, embedding, 1)
    if spec.guidance_dim is not None:
        work += _linear(spec.guidance_dim, channels, 1, bias=False)
    return work


def _unet_middle(spec: UNetSpec, channels: int, pixels: int, tokens: int) -> Work:
    if spec.middle_depth is None:
        return Work()
    residual = _unet_res_block(spec, channels, channels, pixels)
    if not spec.middle_depth:
        return residual
    return residual + _mixing(spec, channels, spec.middle_depth, pixels, tokens) + residual


def _unet_res_block(spec: UNetSpec, inputs: int, outputs: int, pixels: int) -> Work:
    shifts = 2 if spec.scale_shift_norm else 1
    embedded = _linear(4 * spec.model_channels, shifts * outputs, 1)
    return _res_block(inputs, outputs, pixels) + embedded


def _resizing(spec: UNetSpec, channels: int, pixels: int) -> Work:
    """Return the work of a change of resolution to `pixels` pixels."""
    if spec.resblock_updown:
        return _unet_res_block(spec, channels, channels, pixels)
    return _conv(channels, channels, pixels)


def _res_block(inputs: int, outputs: int, pixels: int) -> Work:
    work = _sum(
        _norm(inputs),
        _conv(inputs, outputs, pixels),
        _norm(outputs),
        _conv(outputs, outputs, pixels),
    )
    return work if inputs == outputs else work + _conv(inputs, outputs, pixels, kernel=1)


def _mixing(spec: UNetSpec, channels: int, depth: int, pixels: int, tokens: int) -> Work:
    """Return the work of the attention of a level."""
    if not depth:
        return Work()
    if spec.attention == "qkv":
        return _pixel_attention(channels, pixels)
    return _transformer(spec, channels, depth, pixels, tokens)


def _transformer(spec: UNetSpec, channels: int, depth: int, pixels: int, tokens: int) -> Work:
    assert spec.context_dim is not None, "transformer blocks attend to a context"
    own = _linear(channels, channels, pixels, bias=False)
    from_text = _linear(spec.context_dim, channels, tokens, bias=False)
    block = _sum(
        *[_norm(channels)] * 3,
        *[own] * 4,  # queries, keys and values of the pixels, and queries to the text
        *[from_text] * 2,
        _attention(pixels, pixels, channels),
        _attention(pixels, tokens, channels),
        *[_linear(channels, channels, pixels)] * 2,
        _linear(channels, 8 * channels, pixels),
        _linear(4 * channels, channels, pixels),
    )
    ends = [_linear(channels, channels, pixels)] * 2
    return _sum(_norm(channels), *ends, *[block] * depth)


def _pixel_attention(channels: int, pixels: int) -> Work:
    projections = [_conv(channels, channels, pixels, kernel=1)] * 4
    return _sum(_norm(channels), *projections, _attention(pixels, pixels, channels))


def _codebook(spec: AutoencoderSpec) -> Work:
    """Return the work of looking up vectors; comparing them is element by element."""
    return Work(parameters=(spec.codebook_size or 0) * spec.embed_dim)


def _conv(inputs: int, outputs: int, pixels: int, *, kernel: int = 3) -> Work:
    """Return the work of a convolution that gives `pixels` pixels."""
    weights = inputs * outputs * kernel**2
    return Work(flops=2 * weights * pixels, parameters=weights + outputs)


def _linear(inputs: int, outputs: int, rows: int, *, bias: bool = True) -> Work:
    weights = inputs * outputs
    return Work(flops=2 * weights * rows, parameters=weights + (outputs if bias else 0))


def _norm(channels: int) -> Work:
    return Work(parameters=2 * channels)


def _attention(queries: int, keys: int, channels: int) -> Work:
    return Work(flops=4 * queries * keys * channels)


def _sum(*parts: Work) -> Work:
    return reduce(Work.__add__, parts)
