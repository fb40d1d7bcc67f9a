"""What a model is: the hyperparameters of its networks, and which networks it has."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ldm_runtime.specs.components import COMPONENTS, Component

PredictionType = Literal["epsilon", "v_prediction", "sample"]


Task = Literal[
    "unconditional",
    "class-to-image",
    "text-to-image",
    "layout-to-image",
    "semantic-synthesis",
    "super-resolution",
    "inpainting",
    "retrieval",
    "first-stage",
]


@dataclass(frozen=True, kw_only=True)
class UNetSpec:
    """Hyperparameters of a CompVis `UNetModel`.

    Attributes:
        in_channels: Channels of the input: latents, then what conditions them pixel by pixel.
        out_channels: Channels of the prediction.
        model_channels: Channels of the first level; level i has this times `channel_mult[i]`.
        channel_mult: One multiplier a level, from full latent resolution down.
        num_res_blocks: Residual blocks a level (one more on the way up).
        attention: "transformer" blocks with cross-attention (SpatialTransformer), or "qkv" blocks
            of self-attention alone (AttentionBlock).
        transformer_depth: Blocks in each attention of a level, 0 for none; one a level. A "qkv"
            attention is one block.
        middle_depth: Blocks in the middle attention.
        num_heads: Attention heads everywhere, or None if the head size is fixed instead.
        num_head_channels: Channels a head, or None if the number of heads is fixed instead.
        context_dim: Width of what cross-attention attends to, or None without cross-attention.
        linear_projection: Whether a transformer is entered and left by linear layers (SD 2) and
            not by 1x1 convolutions (LDM, SD 1).
        scale_shift_norm: Whether the time embedding scales and shifts, and is not added.
        resblock_updown: Whether residual blocks change the resolution, and not convolutions.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention: Literal["transformer", "qkv"]
    transformer_depth: tuple[int, ...]
    middle_depth: int
    num_heads: int | None
    num_head_channels: int | None
    context_dim: int | None
    linear_projection: bool
    scale_shift_norm: bool
    resblock_updown: bool

    @property
    def concat_channels(self) -> int:
        """Channels of what is laid behind the latents and conditions them pixel by pixel."""
        return self.in_channels - self.out_channels

    def heads_over(self, channels: int) -> int:
        """Return how many heads attention over `channels` has."""
        if self.num_heads is not None:
            return self.num_heads
        assert self.num_head_channels is not None, "a spec fixes one of the two"
        return channels // self.num_head_channels


@dataclass(frozen=True, kw_only=True)
class AutoencoderSpec:
    """Hyperparameters of a first stage.

    Attributes:
        kind: "kl": a diagonal Gaussian posterior; "vq": latents are replaced by the nearest vectors
            of a codebook before they are decoded.
        image_channels: Channels of the picture.
        channels: Channels of the first level; level i has this times `channel_mult[i]`.
        channel_mult: One multiplier a level, from full resolution down.
        num_res_blocks: Residual blocks a level in the encoder (one more in the decoder).
        attention_levels: Levels that carry attention besides the middle.
        middle_attention: Whether the middle carries attention.
        z_channels: Channels inside, before the 1x1 quantisation convolutions.
        embed_dim: Channels of the latents.
        codebook_size: Vectors in the codebook, or None without one.
        latent_scale_factor: Multiplies the autoencoder's latents into the UNet's.
    """

    kind: Literal["kl", "vq"]
    image_channels: int
    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    middle_attention: bool
    z_channels: int
    embed_dim: int
    codebook_size: int | None
    latent_scale_factor: float

    @property
    def factor(self) -> int:
        """Pixels a latent pixel covers in each direction: f in the paper."""
        return int(2 ** (len(self.channel_mult) - 1))


@dataclass(frozen=True, kw_only=True)
class TextEncoderSpec:
    """Hyperparameters of a transformer over tokens, those of a prompt or of a layout.

    Attributes:
        kind: "clip": causal; "bert": every token sees every other, heads of 64 channels whatever
            the width. Both are pre-normalised, with the output after the final LayerNorm.
        width: Channels of a token, which is the UNet's `context_dim`.
        num_layers: Transformer layers.
        num_heads: Attention heads.
        feed_forward_dim: Inner width of the feed-forward layers.
        vocab_size: Rows of the token embedding.
        max_tokens: Length every prompt is padded or cut to, start and end tokens included; of a
            layout three tokens an object and two of the crop.
        activation: Feed-forward activation.
        pad_token_id: What short prompts are filled with.
    """

    kind: Literal["clip", "bert"]
    width: int
    num_layers: int
    num_heads: int
    feed_forward_dim: int
    vocab_size: int
    max_tokens: int
    activation: Literal["quick_gelu", "gelu"]
    pad_token_id: int


@dataclass(frozen=True, kw_only=True)
class ClassEmbedderSpec:
    """A learned vector for every class.

    Attributes:
        num_classes: Rows of the embedding, the null class included.
        width: Channels of a row, which is the UNet's `context_dim`.
        null_class: The class that stands for none, which guidance needs; None without one.
    """

    num_classes: int
    width: int
    null_class: int | None


@dataclass(frozen=True, kw_only=True)
class RescalerSpec:
    """A semantic map, brought to the size of the latents (SpatialRescaler).

    Attributes:
        num_classes: Classes of a pixel.
        out_channels: Channels of the result, which is the UNet's `concat_channels`.
        num_halvings: How often height and width are halved.
    """

    num_classes: int
    out_channels: int
    num_halvings: int


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What a request that leaves a field open gets. Sizes in pixels; eta is of `sampler`."""

    height: int
    width: int
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    eta: float


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """One fact that the weights cannot tell, and where it was taken from.

    Attributes:
        field: Dotted name of a field of `ModelSpec`.
        value: Its value, as text.
        source: "family", "config" or "flag".
    """

    field: str
    value: str
    source: str


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a checkpoint is: everything downstream is derived from this record.

    Attributes:
        family: Row of the family table that recognised it.
        task: What the model does with a request.
        weights: Which of a checkpoint's two sets of UNet weights was used.
        unet: The denoising network, or None of a first stage alone.
        autoencoder: The first stage.
        text_encoder: What encodes prompts or layouts, if the task has them.
        class_embedder: What encodes class labels, if the task has them.
        rescaler: What encodes semantic maps, if the task has them.
        alphas_cumprod: Training noise schedule, one value a training timestep; empty without a
            UNet.
        prediction_type: What the UNet was trained to output.
        assumptions: What the weights could not tell.
    """

    family: str
    task: Task
    weights: Literal["ema", "model"]
    unet: UNetSpec | None
    autoencoder: AutoencoderSpec
    text_encoder: TextEncoderSpec | None
    class_embedder: ClassEmbedderSpec | None
    rescaler: RescalerSpec | None
    alphas_cumprod: tuple[float, ...]
    prediction_type: PredictionType
    defaults: SamplingDefaults
    assumptions: tuple[Assumption, ...]


def components_of(spec: ModelSpec) -> Mapping[str, Component]:
    """Return the networks of a model by name, in the order of drawing.

    A UNet without cross-attention takes no context.
    """
    present = {
        "text_encoder": spec.text_encoder is not None,
        "class_embedder": spec.class_embedder is not None,
        "rescaler": spec.rescaler is not None,
        "unet": spec.unet is not None,
        "vae_decoder": True,
        "vae_encoder": True,
    }
    components = {name: COMPONENTS[name] for name, is_there in present.items() if is_there}
    if spec.unet is not None and spec.unet.context_dim is None:
        unet = components["unet"]
        inputs = tuple(tensor for tensor in unet.inputs if tensor.name != "context")
        components["unet"] = replace(unet, inputs=inputs)
    return components


def axis_sizes(spec: ModelSpec) -> Mapping[str, int]:
    """Return the length of every axis of a model's `components_of` that is fixed."""
    autoencoder = spec.autoencoder
    halves = 2 if autoencoder.kind == "kl" else 1
    sizes = {
        "latent_channels": autoencoder.embed_dim,
        "moment_channels": halves * autoencoder.embed_dim,
        "image_channels": autoencoder.image_channels,
        "class_tokens": 1,
    }
    if spec.unet is not None:
        sizes["unet_channels"] = spec.unet.in_channels
        sizes["concat_channels"] = spec.unet.concat_channels
        if spec.unet.context_dim is not None:
            sizes["context_dim"] = spec.unet.context_dim
    if spec.text_encoder is not None:
        sizes["tokens"] = spec.text_encoder.max_tokens
    return sizes


def latent_step(spec: ModelSpec) -> int:
    """Return what sides of latents are multiples of.

    They must survive the UNet's halvings, or its skip connections no longer fit.
    """
    return 1 if spec.unet is None else int(2 ** (len(spec.unet.channel_mult) - 1))


def size_step(spec: ModelSpec) -> int:
    """Return what height and width are multiples of, in pixels, but for enlarged pictures."""
    return spec.autoencoder.factor * latent_step(spec)
