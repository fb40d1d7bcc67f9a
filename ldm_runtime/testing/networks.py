"""The networks of the tiny models, each twice: as operators of an ONNX graph and in NumPy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends.contract import Tensors
from ldm_runtime.noise import TorchCpuGenerator
from ldm_runtime.specs.components import COMPONENTS
from ldm_runtime.specs.model import ModelSpec, Task, components_of
from ldm_runtime.specs.networks import (
    AutoencoderSpec,
    ClassEmbedderSpec,
    DepthEstimatorSpec,
    ImageEncoderSpec,
    SegmentationEncoderSpec,
    TextEncoderSpec,
    UNetSpec,
)
from ldm_runtime.testing.engine import Function
from ldm_runtime.testing.onnx_bytes import Node
from ldm_runtime.testing.specs import tiny_spec

Float32Array = npt.NDArray[np.float32]
Weights = Mapping[str, Float32Array]


@dataclass(frozen=True, kw_only=True)
class TinyNetwork:
    """One network of a tiny model.

    Attributes:
        shapes: Of its weights, by name.
        nodes: Its operators.
        function: The same in NumPy, from inputs and weights to the one output.
        axes: Constant lists of axes that the operators take.
    """

    shapes: Mapping[str, tuple[int, ...]]
    nodes: tuple[Node, ...]
    function: Callable[[Tensors, Weights], npt.NDArray[Any]]
    axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def tiny_networks(task: Task = "text-to-image") -> Mapping[str, Function]:
    """Return the networks of a tiny bundle as NumPy functions, by component."""
    spec = tiny_spec(task)
    weights = tiny_weights(spec)

    def function(name: str) -> Function:
        network = tiny_network(name, spec)
        (output,) = components_of(spec)[name].outputs
        return lambda inputs: {output.name: network.function(inputs, weights[name])}

    return {name: function(name) for name in components_of(spec)}


def tiny_network(name: str, spec: ModelSpec) -> TinyNetwork:
    """Return one network of a tiny model."""
    row = COMPONENTS[name]
    return _NETWORKS[row.role if row.record is AutoencoderSpec else row.record](spec)


def tiny_weights(spec: ModelSpec) -> dict[str, dict[str, Float32Array]]:
    """Return the weights of every network of a tiny model, by component."""
    generator = TorchCpuGenerator(0)
    weights = {
        name: {
            each: generator.randn(shape) * 0.2
            for each, shape in tiny_network(name, spec).shapes.items()
        }
        for name in components_of(spec)
    }
    if "unet" in weights:
        weights["unet"]["time"] *= 0.001
    return weights


def _text_encoder(spec: ModelSpec) -> TinyNetwork:
    """Return the embedding of each token at its place, after one or two layers; BERT has one."""
    record = spec.network(TextEncoderSpec)
    is_clip = record.kind != "bert"

    def function(inputs: Tensors, weights: Weights) -> Float32Array:
        is_learned = inputs["tokens"] == record.vocab_size
        embedded = weights["embedding"][np.where(is_learned, 0, inputs["tokens"])]
        if is_clip:
            embedded = np.where(is_learned[..., None], inputs["learned_embeddings"], embedded)
        context: Float32Array = np.tanh(embedded + weights["positions"])
        if is_clip:
            skips = inputs["clip_skip"][:, None, None]
            context = np.where(skips <= 0, np.tanh(context), context)
        return context

    constants = {"learned_token": (record.vocab_size,), "zero": (0,), "last": (2,), "ends": (1, 2)}
    return TinyNetwork(
        shapes={
            "embedding": (record.vocab_size, record.width),
            "positions": (record.max_tokens, record.width),
        },
        nodes=_CLIP_NODES if is_clip else _BERT_NODES,
        function=function,
        axes=constants if is_clip else {},
    )


_BERT_NODES = (
    Node(op="Gather", inputs=("embedding", "tokens"), output="embedded"),
    Node(op="Add", inputs=("embedded", "positions"), output="placed"),
    Node(op="Tanh", inputs=("placed",), output="context"),
)
_CLIP_NODES = (
    Node(op="Equal", inputs=("tokens", "learned_token"), output="is_learned"),
    Node(op="Where", inputs=("is_learned", "zero", "tokens"), output="known"),
    Node(op="Gather", inputs=("embedding", "known"), output="looked_up"),
    Node(op="Unsqueeze", inputs=("is_learned", "last"), output="takes_learned"),
    Node(
        op="Where", inputs=("takes_learned", "learned_embeddings", "looked_up"), output="embedded"
    ),
    Node(op="Add", inputs=("embedded", "positions"), output="placed"),
    Node(op="Tanh", inputs=("placed",), output="first_layer"),
    Node(op="Tanh", inputs=("first_layer",), output="second_layer"),
    Node(op="LessOrEqual", inputs=("clip_skip", "zero"), output="skips_none"),
    Node(op="Unsqueeze", inputs=("skips_none", "ends"), output="takes_second"),
    Node(op="Where", inputs=("takes_second", "second_layer", "first_layer"), output="context"),
)


def _image_encoder(spec: ModelSpec) -> TinyNetwork:
    """Return a linear map of the mean colours."""
    record = spec.network(ImageEncoderSpec)
    return TinyNetwork(
        shapes={"colours": (record.in_channels, record.embed_dim)},
        nodes=(
            Node(
                op="ReduceMean",
                inputs=("pixels",),
                output="means",
                attributes={"axes": (2, 3), "keepdims": 0},
            ),
            Node(op="MatMul", inputs=("means", "colours"), output="embedding"),
        ),
        function=lambda inputs, w: inputs["pixels"].mean(axis=(2, 3)) @ w["colours"],
    )


def _class_embedder(spec: ModelSpec) -> TinyNetwork:
    record = spec.network(ClassEmbedderSpec)
    return TinyNetwork(
        shapes={"table": (record.num_classes, record.width)},
        nodes=(
            Node(op="Gather", inputs=("table", "class_labels"), output="rows"),
            Node(op="Unsqueeze", inputs=("rows", "second"), output="context"),
        ),
        function=lambda inputs, w: w["table"][inputs["class_labels"]][:, None],
        axes={"second": (1,)},
    )


def _segmentation_encoder(spec: ModelSpec) -> TinyNetwork:
    """Downsample once: there, bilinear resizing is the mean of two by two pixels."""
    record = spec.network(SegmentationEncoderSpec)

    def function(inputs: Tensors, weights: Weights) -> Float32Array:
        rows = weights["mapper"][inputs["segmentation"]].transpose(0, 3, 1, 2)
        batch, channels, height, width = rows.shape
        blocks = rows.reshape(batch, channels, height // 2, 2, width // 2, 2)
        downsampled: Float32Array = blocks.mean(axis=(3, 5))
        return downsampled

    pool = {"kernel_shape": (2, 2), "strides": (2, 2)}
    return TinyNetwork(
        shapes={"mapper": (record.num_classes, record.out_channels)},
        nodes=(
            Node(op="Gather", inputs=("mapper", "segmentation"), output="rows"),
            Node(
                op="Transpose", inputs=("rows",), output="maps", attributes={"perm": (0, 3, 1, 2)}
            ),
            Node(op="AveragePool", inputs=("maps",), output="concat", attributes=pool),
        ),
        function=function,
    )


def _depth_estimator(spec: ModelSpec) -> TinyNetwork:
    """Return the weighted mean of each pixel's colours."""
    record = spec.network(DepthEstimatorSpec)
    return TinyNetwork(
        shapes={"kernel": (1, record.image_channels, 1, 1)},
        nodes=(
            Node(op="Conv", inputs=("image", "kernel"), output="mixed"),
            Node(op="Squeeze", inputs=("mixed", "second"), output="depth"),
        ),
        function=lambda inputs, w: _convolve(inputs["image"], w["kernel"])[:, 0],
        axes={"second": (1,)},
    )


def _unet(spec: ModelSpec) -> TinyNetwork:
    record = spec.network(UNetSpec)
    context_dim, channels = record.context_dim, record.out_channels
    attends, classes, vector_dim = context_dim is not None, record.num_classes, record.vector_dim

    def function(inputs: Tensors, weights: Weights) -> Float32Array:
        hidden = _convolve(inputs["latents"], weights["kernel"])
        if attends:
            shift = inputs["context"].mean(axis=1) @ weights["mix"]
            hidden = hidden + shift[:, :, None, None]
        if vector_dim is not None:
            hidden = hidden + (inputs["vector"] @ weights["vectors"])[:, :, None, None]
        if classes is not None:
            hidden = hidden + weights["classes"][inputs["class_labels"]][:, :, None, None]
        time = inputs["timesteps"][:, None, None, None] * weights["time"]
        result: Float32Array = np.tanh(hidden) + time
        return result

    last = "shifted" if attends else "convolved"
    last = last if vector_dim is None else "directed"
    last = last if classes is None else "labelled"
    return TinyNetwork(
        shapes={
            **({} if classes is None else {"classes": (classes, channels)}),
            **({} if vector_dim is None else {"vectors": (vector_dim, channels)}),
            **({} if context_dim is None else {"mix": (context_dim, channels)}),
            "kernel": (channels, record.in_channels, 3, 3),
            "time": (1, channels, 1, 1),
        },
        nodes=(
            Node(op="Unsqueeze", inputs=("timesteps", "last_three"), output="broad_timesteps"),
            Node(op="Mul", inputs=("broad_timesteps", "time"), output="broad_time"),
            Node(
                op="Conv",
                inputs=("latents", "kernel"),
                output="convolved",
                attributes={"pads": (1, 1, 1, 1)},
            ),
            *(_CONTEXT_NODES if attends else ()),
            *(() if vector_dim is None else _VECTOR_NODES),
            *(() if classes is None else _CLASS_NODES),
            Node(op="Tanh", inputs=(last,), output="hidden"),
            Node(op="Add", inputs=("hidden", "broad_time"), output="prediction"),
        ),
        function=function,
        axes={"last_three": (1, 2, 3), **({"last_two": (2, 3)} if attends else {})},
    )


_CONTEXT_NODES = (
    Node(
        op="ReduceMean",
        inputs=("context",),
        output="pooled",
        attributes={"axes": (1,), "keepdims": 0},
    ),
    Node(op="MatMul", inputs=("pooled", "mix"), output="shift"),
    Node(op="Unsqueeze", inputs=("shift", "last_two"), output="broad_shift"),
    Node(op="Add", inputs=("convolved", "broad_shift"), output="shifted"),
)

#: Behind those of the context: a model with a vector or with classes has one, and not both.
_VECTOR_NODES = (
    Node(op="MatMul", inputs=("vector", "vectors"), output="direction"),
    Node(op="Unsqueeze", inputs=("direction", "last_two"), output="broad_direction"),
    Node(op="Add", inputs=("shifted", "broad_direction"), output="directed"),
)
_CLASS_NODES = (
    Node(op="Gather", inputs=("classes", "class_labels"), output="label"),
    Node(op="Unsqueeze", inputs=("label", "last_two"), output="broad_label"),
    Node(op="Add", inputs=("shifted", "broad_label"), output="labelled"),
)


def _vae_decoder(spec: ModelSpec) -> TinyNetwork:
    """Decode without quantising: a codebook would add nothing to the tests."""

    def function(inputs: Tensors, weights: Weights) -> Float32Array:
        mixed = _convolve(inputs["latents"], weights["kernel"])
        batch, _, height, width = mixed.shape
        blocks = mixed.reshape(batch, 2, 2, 3, height, width).transpose(0, 3, 4, 1, 5, 2)
        result: Float32Array = np.tanh(blocks.reshape(batch, 3, 2 * height, 2 * width))
        return result

    return TinyNetwork(
        shapes={"kernel": (12, spec.autoencoder.embed_dim, 1, 1)},
        nodes=(
            Node(op="Conv", inputs=("latents", "kernel"), output="mixed"),
            Node(
                op="DepthToSpace", inputs=("mixed",), output="spread", attributes={"blocksize": 2}
            ),
            Node(op="Tanh", inputs=("spread",), output="image"),
        ),
        function=function,
    )


def _vae_encoder(spec: ModelSpec) -> TinyNetwork:
    def function(inputs: Tensors, weights: Weights) -> Float32Array:
        batch, _, height, width = inputs["image"].shape
        blocks = inputs["image"].reshape(batch, 3, height // 2, 2, width // 2, 2)
        deep = blocks.transpose(0, 3, 5, 1, 2, 4).reshape(batch, 12, height // 2, width // 2)
        return _convolve(deep, weights["kernel"])

    return TinyNetwork(
        shapes={"kernel": (spec.autoencoder.moment_channels, 12, 1, 1)},
        nodes=(
            Node(op="SpaceToDepth", inputs=("image",), output="deep", attributes={"blocksize": 2}),
            Node(op="Conv", inputs=("deep", "kernel"), output="moments"),
        ),
        function=function,
    )


#: How the tiny network of each component is made: by the class of its hyperparameters, and for the
#: autoencoder, which has two halves, by its role.
_NETWORKS: Mapping[object, Callable[[ModelSpec], TinyNetwork]] = MappingProxyType(
    {
        TextEncoderSpec: _text_encoder,
        ImageEncoderSpec: _image_encoder,
        ClassEmbedderSpec: _class_embedder,
        SegmentationEncoderSpec: _segmentation_encoder,
        DepthEstimatorSpec: _depth_estimator,
        UNetSpec: _unet,
        "decoder": _vae_decoder,
        "encoder": _vae_encoder,
    }
)


def _convolve(images: Float32Array, kernel: Float32Array) -> Float32Array:
    """Cross-correlate (B, C, H, W) with (D, C, k, k), zero-padded to the same size."""
    size = kernel.shape[-1]
    edge = size // 2
    padded = np.pad(images, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
    result: Float32Array = np.einsum("bchwij,dcij->bdhw", windows, kernel)
    return result
