"""Hyperparameters of every kind of network that a latent-diffusion model is made of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

_CLIP_VOCAB_SIZE = 49408

#: Transformer depth per level: one number for all residual blocks of the level, or one per block.
Depths = tuple[int | tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class UNetSpec:
    """Hyperparameters of a CompVis `UNetModel`.

    Attributes:
        in_channels: Channels of the input: latents, then those concatenated to them.
        out_channels: Channels of the prediction.
        model_channels: Channels of the first level; level i has this times `channel_mult[i]`.
        channel_mult: One multiplier per level, from full latent resolution down.
        num_res_blocks: Residual blocks on the way down, one number for all levels or one per level.
            On the way up a level has one more: each takes a skip connection, of which a level has
            one from what enters it and one from each residual block.
        attention: "transformer" blocks with cross-attention (SpatialTransformer), or "qkv" blocks
            of self-attention alone (AttentionBlock).
        transformer_depth: Blocks in each attention of a level on the way down, 0 for none. A "qkv"
            attention is one block.
        output_depth: Likewise on the way up, also from the first level on; the blocks of a level in
            the order in which they run. None where both halves have the same.
        middle_depth: Blocks in the middle attention, which has a residual block on either side; 0
            for a middle of one residual block alone, None for a UNet without a middle.
        num_heads: Attention heads everywhere, or None if the head size is fixed instead.
        num_head_channels: Channels per head, or None if the number of heads is fixed instead.
        context_dim: Width of the context of cross-attention, or None without cross-attention.
        linear_projection: Whether a transformer is entered and left by linear layers (SD 2) and
            not by 1x1 convolutions (LDM, SD 1).
        cross_attention_only: Levels, from the first on, whose transformers attend to the context
            twice and never to their own pixels.
        vector_dim: Width of the vector that is embedded like the timestep and added to it, or None
            without one.
        num_classes: Classes of which one is embedded and added to the timestep, or None.
        guidance_dim: Number of features of the guidance scale that are added to those of the
            timestep, in a latent consistency model; None where guidance is two predictions.
        scale_shift_norm: Whether the time embedding scales and shifts, and is not added.
        resblock_updown: Whether residual blocks change the resolution, and not convolutions.
        shallow_blocks: Outermost blocks of either half, all of the first level, that are also a
            graph of their own, for feature reuse; None for a UNet without that graph.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int | tuple[int, ...]
    attention: Literal["transformer", "qkv"]
    transformer_depth: Depths
    output_depth: Depths | None
    middle_depth: int | None
    num_heads: int | None
    num_head_channels: int | None
    context_dim: int | None
    linear_projection: bool
    cross_attention_only: tuple[int, ...]
    vector_dim: int | None
    num_classes: int | None
    guidance_dim: int | None
    scale_shift_norm: bool
    resblock_updown: bool
    shallow_blocks: int | None

    @property
    def deep_channels(self) -> int | None:
        """Channels of the deep features that enter the outermost blocks on the way up."""
        if self.shallow_blocks is None:
            return None
        is_whole_level = self.shallow_blocks == self.most_shallow_blocks
        below = 1 if is_whole_level and len(self.channel_mult) > 1 else 0
        return self.channel_mult[below] * self.model_channels

    @property
    def most_shallow_blocks(self) -> int:
        """The largest `shallow_blocks` there can be: the blocks of the first level."""
        return len(self.output_depths(0))

    @property
    def shallow_context_dim(self) -> int | None:
        """Width of the context of the outermost blocks, or None if none of them attends to it."""
        number = self.shallow_blocks
        if number is None or self.attention == "qkv":
            return None
        # The first block of the way down is a convolution.
        depths = (*self.input_depths(0)[: number - 1], *self.output_depths(0)[-number:])
        return self.context_dim if any(depths) else None

    @property
    def concat_channels(self) -> int:
        """Channels concatenated to the latents, which condition them pixel by pixel."""
        return self.in_channels - self.out_channels

    def input_depths(self, level: int) -> tuple[int, ...]:
        """Return the attention depth after each residual block of a level on the way down."""
        number = self.num_res_blocks
        blocks = number if isinstance(number, int) else number[level]
        return _per_block(self.transformer_depth[level], blocks)

    def output_depths(self, level: int) -> tuple[int, ...]:
        """Return the attention depth after each residual block of a level on the way up."""
        depths = self.transformer_depth if self.output_depth is None else self.output_depth
        return _per_block(depths[level], len(self.input_depths(level)) + 1)

    def heads_over(self, channels: int) -> int:
        """Return how many heads attention over `channels` has."""
        if self.num_heads is not None:
            return self.num_heads
        assert self.num_head_channels is not None, "a spec fixes one of the two"
        return channels // self.num_head_channels


def _per_block(depth: int | tuple[int, ...], blocks: int) -> tuple[int, ...]:
    return (depth,) * blocks if isinstance(depth, int) else depth


@dataclass(frozen=True, kw_only=True)
class AutoencoderSpec:
    """Hyperparameters of an autoencoder.

    Attributes:
        kind: "kl": a diagonal Gaussian posterior; "vq": latents are replaced by the nearest vectors
            of a codebook before they are decoded; "tiny": TAESD, plain convolutions that decode
            latents in the UNet's scale.
        image_channels: Channels of the image.
        channels: Channels of the first level; level i has this times `channel_mult[i]`.
        channel_mult: One multiplier per level, from full resolution down.
        num_res_blocks: Residual blocks per level in the encoder (one more in the decoder).
        attention_levels: Levels that carry attention, in addition to the middle.
        middle_attention: Whether the middle carries attention.
        z_channels: Channels inside, before the 1x1 quantisation convolutions.
        embed_dim: Channels of the latents.
        codebook_size: Vectors in the codebook, or None without one.
        latent_scale_factor: Multiplies the autoencoder's latents into the UNet's.
        latents_mean: Subtracted from each channel of the autoencoder's latents before that; empty
            where latents are scaled alone.
        latents_std: Divides each channel of the difference; empty likewise.
    """

    kind: Literal["kl", "vq", "tiny"]
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
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @property
    def factor(self) -> int:
        """Pixels a latent pixel covers in each direction: f in the paper."""
        return int(2 ** (len(self.channel_mult) - 1))

    @property
    def moment_channels(self) -> int:
        """Channels of the encoder's output: mean and log-variance of a KL posterior, or latents."""
        return self.numbers_per_channel * self.embed_dim

    @property
    def numbers_per_channel(self) -> int:
        """Numbers that the encoder predicts for one latent: mean and log-variance, or itself."""
        return 2 if self.kind == "kl" else 1


@dataclass(frozen=True, kw_only=True)
class TextEncoderSpec:
    """Hyperparameters of a transformer over tokens, those of a prompt or of a layout.

    Attributes:
        kind: "clip" and "openclip": causal, of OpenAI and of OpenCLIP, whose parameters have other
            names; "bert": every token sees every other, heads of 64 channels whatever the width.
            All are pre-normalised.
        width: Channels of a token, which are the UNet's `context_dim` or, of two text encoders,
            a part of it.
        num_layers: Transformer layers.
        context_layers: Layers that a token has passed where it becomes context: all of them, or
            all but the last.
        final_norm: Whether context passes the final LayerNorm.
        pooled_dim: Channels of the pooled output: the end token after all layers and the final
            LayerNorm, projected; None without.
        num_heads: Attention heads.
        feed_forward_dim: Inner width of the feed-forward layers.
        vocab_size: Rows of the token embedding.
        max_tokens: Length every prompt is padded or cut to, start and end tokens included; of a
            layout three tokens per object and two for the crop.
        activation: Feed-forward activation.
        pad_token_id: Padding token of short prompts.
    """

    kind: Literal["clip", "openclip", "bert"]
    width: int
    num_layers: int
    context_layers: int
    final_norm: bool
    pooled_dim: int | None
    num_heads: int
    feed_forward_dim: int
    vocab_size: int
    max_tokens: int
    activation: Literal["quick_gelu", "gelu"]
    pad_token_id: int

    @property
    def end_token_id(self) -> int:
        """The token that ends a prompt of CLIP; those after it were added to the vocabulary."""
        return min(self.vocab_size, _CLIP_VOCAB_SIZE) - 1

    @property
    def learned_dim(self) -> int | None:
        """Channels of a learned embedding, which takes the place of a token's; None for BERT."""
        return None if self.kind == "bert" else self.width

    @property
    def num_clip_skips(self) -> int | None:
        """How many layers context can be taken after, at the end or earlier; None for BERT."""
        return None if self.kind == "bert" or self.context_layers < 2 else self.context_layers


@dataclass(frozen=True, kw_only=True)
class ClassEmbedderSpec:
    """Hyperparameters of a class embedder, which has a learned vector for every class.

    Attributes:
        num_classes: Rows of the embedding, the null class included.
        width: Channels of a row, which is the UNet's `context_dim`.
        null_class: The class that stands for none, which guidance needs; None without one.
    """

    num_classes: int
    width: int
    null_class: int | None

    @property
    def tokens_per_class(self) -> int:
        """Length of the context that a class becomes."""
        return 1


@dataclass(frozen=True, kw_only=True)
class SegmentationEncoderSpec:
    """Hyperparameters of a segmentation encoder, CompVis' `SpatialRescaler`.

    It brings a segmentation map to the size of the latents.

    Attributes:
        num_classes: Classes of a pixel.
        out_channels: Channels of the result, which is the UNet's `concat_channels`.
        num_downsampling_steps: How many times height and width are downsampled by 2.
    """

    num_classes: int
    out_channels: int
    num_downsampling_steps: int


@dataclass(frozen=True, kw_only=True)
class ImageEncoderSpec:
    """Hyperparameters of CLIP's image encoder, a vision transformer, and of how it sees images.

    Attributes:
        width: Channels of a token, one per patch and one for the whole image.
        num_layers: Transformer layers.
        num_heads: Attention heads.
        feed_forward_dim: Inner width of the feed-forward layers.
        activation: Feed-forward activation.
        patch_size: Pixels per side of a patch.
        image_size: Pixels per side of an image, which is resized by its shorter side and cropped.
        embed_dim: Length of the embedding of an image.
        pixel_mean: Mean of red, green and blue, from 0 to 1, which is subtracted, …
        pixel_std: … and standard deviation, which the difference is divided by.
    """

    width: int
    num_layers: int
    num_heads: int
    feed_forward_dim: int
    activation: Literal["quick_gelu", "gelu"]
    patch_size: int
    image_size: int
    embed_dim: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]

    @property
    def in_channels(self) -> int:
        """Channels of a pixel: red, green and blue."""
        return len(self.pixel_mean)

    @property
    def num_tokens(self) -> int:
        """Tokens that an image becomes."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class DepthEstimatorSpec:
    """Hyperparameters of a depth estimator, DPT-Hybrid of MiDaS.

    A residual network of three levels, from whose last one 12 transformer layers go on; what two
    levels and two of the layers see is fused from coarse to fine.

    Attributes:
        image_channels: Channels of the image.
        stem_channels: Channels after the first convolution.
        level_channels: Channels of each level of the residual network …
        bottleneck_channels: … and inside its residual blocks.
        level_blocks: Residual blocks of each level.
        width: Channels of a token.
        num_heads: Attention heads.
        feed_forward_dim: Inner width of the feed-forward layers.
        grid: Tokens per side of the image, for each of which there is a position embedding.
        fusion_channels: Channels of what is fused.
        head_channels: Channels before the last convolution.
    """

    image_channels: int
    stem_channels: int
    level_channels: tuple[int, ...]
    bottleneck_channels: tuple[int, ...]
    level_blocks: tuple[int, ...]
    width: int
    num_heads: int
    feed_forward_dim: int
    grid: int
    fusion_channels: int
    head_channels: int

    @property
    def side(self) -> int:
        """Height and width of the image in pixels, of which a token has 16 by 16."""
        return 16 * self.grid


NetworkSpec = (
    UNetSpec
    | AutoencoderSpec
    | TextEncoderSpec
    | ImageEncoderSpec
    | ClassEmbedderSpec
    | SegmentationEncoderSpec
    | DepthEstimatorSpec
)

_Record = TypeVar("_Record", bound=NetworkSpec)


class Networks(Mapping[str, NetworkSpec]):
    """The networks of one model by name; immutable, and compared by value.

    Names are those in `components.Component.network`, so that a model may have two of a kind.

    Args:
        networks: Hyperparameters by name; None is a network that the model does not have.
    """

    def __init__(self, **networks: NetworkSpec | None) -> None:
        present = {name: each for name, each in sorted(networks.items()) if each is not None}
        self._networks: Mapping[str, NetworkSpec] = present

    def __getitem__(self, name: str) -> NetworkSpec:
        return self._networks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._networks)

    def __len__(self) -> int:
        return len(self._networks)

    def find(self, record: type[_Record]) -> _Record | None:
        """Return the hyperparameters of the first network of a kind, or None without one."""
        return next((each for each in self.values() if isinstance(each, record)), None)

    def of(self, record: type[_Record]) -> _Record:
        """Return the hyperparameters of the first network of a kind.

        Raises:
            LookupError: There is none; `find` is for models that may have none.
        """
        found = self.find(record)
        if found is None:
            raise LookupError(f"no {record.__name__} among {', '.join(self) or 'no networks'}")
        return found

    def changed(self, **networks: NetworkSpec | None) -> "Networks":
        """Return these networks with some replaced; None takes one away."""
        return Networks(**{**self, **networks})

    def __hash__(self) -> int:
        return hash(tuple(self._networks.items()))

    def __repr__(self) -> str:
        return f"Networks({', '.join(f'{name}={each!r}' for name, each in self.items())})"
