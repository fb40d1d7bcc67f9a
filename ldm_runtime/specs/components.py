"""The components of a bundle: one table, `COMPONENTS`, with a row for each of its graphs.

ONNX input and output names, dynamic axes, sample inputs, engine profiles, batch sizes, estimates
and manifest entries are all derived from `COMPONENTS`. An axis is a name: either it is dynamic, or
the row says which hyperparameter of its network is its length. `model.components_of` says which
components a model has.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from ldm_runtime.specs.networks import (
    AutoencoderSpec,
    ClassEmbedderSpec,
    DepthEstimatorSpec,
    ImageEncoderSpec,
    NetworkSpec,
    SegmentationEncoderSpec,
    TextEncoderSpec,
    UNetSpec,
)

DType = Literal["float32", "int64"]

#: Axes whose length may differ from call to call. `height` and `width` are in latent pixels;
#: `image_height` and `image_width` are those times the autoencoder's factor f; `context_tokens` is
#: the length of the context that a prompt of any length becomes: chunks of `tokens` each,
#: concatenated.
DYNAMIC_AXES = frozenset(
    {"batch", "height", "width", "image_height", "image_width", "context_tokens"}
)


@dataclass(frozen=True, kw_only=True)
class TensorSignature:
    """Name, axes and element type of one input or output of a network."""

    name: str
    axes: tuple[str, ...]
    dtype: DType


@dataclass(frozen=True, kw_only=True)
class Component:
    """One graph of a bundle.

    Attributes:
        name: Its folder in the bundle.
        network: Name in `ModelSpec.networks` of the network that it is, or is a part of.
        record: Class of that network's hyperparameters.
        role: Its purpose: a "conditioner" turns the condition of a request into inputs of the UNet
            in addition to latents; the "denoiser" is the UNet; "decoder" and "encoder" are the two
            halves of the autoencoder.
        inputs: An input with an axis that the model does not have is left out.
        outputs: Likewise.
        lengths: Attribute of `record` that is the length of each fixed axis; None there means that
            the model does not have that axis.
        counts: Attribute of `record` that says how many values each integer input may take; None
            there means that the model does not have that input. A text encoder's token `vocab_size`
            stands for a learned embedding.
        needs: Attribute of `record` that is None for a model without this component; empty for a
            component of every model with the network.
        samples_per_image: Batch size that one image asks of it with guidance; of the UNet one more
            where an image guides as well, see `tasks.samples_per_image`.
        trace_seconds: Estimated seconds to trace and compare it on two cores, whatever its size.
    """

    name: str
    network: str
    record: type[NetworkSpec]
    role: Literal["conditioner", "denoiser", "decoder", "encoder"]
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]
    lengths: Mapping[str, str]
    counts: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""
    samples_per_image: int
    trace_seconds: float


_LATENTS = ("batch", "latent_channels", "height", "width")
_IMAGE = ("batch", "image_channels", "image_height", "image_width")


def _tensor(name: str, axes: tuple[str, ...], dtype: DType = "float32") -> TensorSignature:
    return TensorSignature(name=name, axes=axes, dtype=dtype)


_TEXT_ENCODERS = tuple(
    Component(
        name=name,
        network=name,
        record=TextEncoderSpec,
        role="conditioner",
        inputs=(
            _tensor("tokens", ("batch", "tokens"), "int64"),
            _tensor("learned_embeddings", ("batch", "tokens", "learned_dim")),
            _tensor("clip_skip", ("batch",), "int64"),
        ),
        outputs=(
            _tensor("context", ("batch", "tokens", "context_dim")),
            _tensor("pooled", ("batch", "pooled_dim")),
        ),
        lengths={
            "tokens": "max_tokens",
            "learned_dim": "learned_dim",
            "context_dim": "width",
            "pooled_dim": "pooled_dim",
        },
        counts={"tokens": "vocab_size", "clip_skip": "num_clip_skips"},
        samples_per_image=2,
        trace_seconds=5.0,
    )
    for name in ("text_encoder", "text_encoder_2")
)
_DECODERS = tuple(
    Component(
        name=name,
        network=network,
        record=AutoencoderSpec,
        role="decoder",
        inputs=(_tensor("latents", _LATENTS),),
        outputs=(_tensor("image", _IMAGE),),
        lengths={"latent_channels": "embed_dim", "image_channels": "image_channels"},
        samples_per_image=1,
        trace_seconds=seconds,
    )
    for name, network, seconds in (
        ("vae_decoder", "autoencoder", 5.0),
        ("tiny_decoder", "tiny_autoencoder", 2.0),
    )
)
_DEEP_FEATURES = _tensor("deep_features", ("batch", "deep_channels", "height", "width"))
_UNET_INPUTS = (
    _tensor("latents", ("batch", "unet_channels", "height", "width")),
    _tensor("timesteps", ("batch",)),
    _tensor("context", ("batch", "context_tokens", "context_dim")),
    _tensor("vector", ("batch", "vector_dim")),
    _tensor("class_labels", ("batch",), "int64"),
    _tensor("guidance", ("batch", "guidance_dim")),
)
_UNET_LENGTHS = {
    "unet_channels": "in_channels",
    "latent_channels": "out_channels",
    "deep_channels": "deep_channels",
    "context_dim": "context_dim",
    "vector_dim": "vector_dim",
    "guidance_dim": "guidance_dim",
}
#: The UNet and, for feature reuse, its outermost blocks alone, which take what is between them from
#: an earlier call of the whole. Two graphs, not one with a branch: every engine then knows at build
#: time what it computes. Only bundles that were exported for reuse have the second, and the output
#: of the first that feeds it. It is a component like any other, in its own folder and with its own
#: weights file, a copy of a few percent of the UNet's: ONNX names files in the folder of the graph
#: alone, and a backend opens, checks and builds a component from one graph and one such file.
_UNETS = (
    Component(
        name="unet",
        network="unet",
        record=UNetSpec,
        role="denoiser",
        inputs=_UNET_INPUTS,
        outputs=(_tensor("prediction", _LATENTS), _DEEP_FEATURES),
        lengths=_UNET_LENGTHS,
        counts={"class_labels": "num_classes"},
        samples_per_image=2,
        trace_seconds=18.0,
    ),
    Component(
        name="unet_shallow",
        network="unet",
        record=UNetSpec,
        role="denoiser",
        inputs=(*_UNET_INPUTS, _DEEP_FEATURES),
        outputs=(_tensor("prediction", _LATENTS),),
        lengths={**_UNET_LENGTHS, "context_dim": "shallow_context_dim"},
        counts={"class_labels": "num_classes"},
        needs="shallow_blocks",
        samples_per_image=2,
        trace_seconds=4.0,
    ),
)
_ROWS = (
    *_TEXT_ENCODERS,
    Component(
        name="image_encoder",
        network="image_encoder",
        record=ImageEncoderSpec,
        role="conditioner",
        inputs=(_tensor("pixels", ("batch", "pixel_channels", "pixel_height", "pixel_width")),),
        outputs=(_tensor("embedding", ("batch", "embed_dim")),),
        lengths={
            "pixel_channels": "in_channels",
            "pixel_height": "image_size",
            "pixel_width": "image_size",
            "embed_dim": "embed_dim",
        },
        samples_per_image=1,
        trace_seconds=6.0,
    ),
    Component(
        name="class_embedder",
        network="class_embedder",
        record=ClassEmbedderSpec,
        role="conditioner",
        inputs=(_tensor("class_labels", ("batch",), "int64"),),
        outputs=(_tensor("context", ("batch", "class_tokens", "context_dim")),),
        lengths={"class_tokens": "tokens_per_class", "context_dim": "width"},
        counts={"class_labels": "num_classes"},
        samples_per_image=2,
        trace_seconds=1.0,
    ),
    Component(
        name="segmentation_encoder",
        network="segmentation_encoder",
        record=SegmentationEncoderSpec,
        role="conditioner",
        inputs=(_tensor("segmentation", ("batch", "image_height", "image_width"), "int64"),),
        outputs=(_tensor("concat", ("batch", "concat_channels", "height", "width")),),
        lengths={"concat_channels": "out_channels"},
        counts={"segmentation": "num_classes"},
        samples_per_image=1,
        trace_seconds=1.0,
    ),
    Component(
        name="depth_estimator",
        network="depth_estimator",
        record=DepthEstimatorSpec,
        role="conditioner",
        inputs=(_tensor("image", ("batch", "image_channels", "side", "side")),),
        outputs=(_tensor("depth", ("batch", "side", "side")),),
        lengths={"image_channels": "image_channels", "side": "side"},
        samples_per_image=1,
        trace_seconds=15.0,
    ),
    *_UNETS,
    *_DECODERS,
    Component(
        name="vae_encoder",
        network="autoencoder",
        record=AutoencoderSpec,
        role="encoder",
        inputs=(_tensor("image", _IMAGE),),
        outputs=(_tensor("moments", ("batch", "moment_channels", "height", "width")),),
        lengths={"image_channels": "image_channels", "moment_channels": "moment_channels"},
        samples_per_image=1,
        trace_seconds=4.0,
    ),
)

#: Every component by name, in the order in which a request uses them.
COMPONENTS: Mapping[str, Component] = MappingProxyType({row.name: row for row in _ROWS})

#: The class of every network's hyperparameters, by its name in `ModelSpec.networks`.
NETWORK_RECORDS: Mapping[str, type[NetworkSpec]] = MappingProxyType(
    {row.network: row.record for row in _ROWS}
)
