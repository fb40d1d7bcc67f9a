"""What the networks of a bundle are called, take and give: the one place shapes are written.

ONNX input and output names, dynamic axes, sample inputs, engine profiles and manifest entries
are all derived from `COMPONENTS`. Which of them a model has, and which inputs, is what
`model.components_of` says. An axis is a name; `axis_sizes` says how long the fixed ones are for
one model, and the dynamic ones are free at run time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

DType = Literal["float32", "int64"]

#: Axes whose length may differ from call to call. `height` and `width` are in latent pixels;
#: `image_height` and `image_width` are those times the autoencoder's factor f; `context_tokens` is
#: what a prompt of any length becomes, chunks of `tokens` each, one behind the other.
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
    """One network of a bundle."""

    name: str
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]


_LATENTS = ("batch", "latent_channels", "height", "width")
_IMAGE = ("batch", "image_channels", "image_height", "image_width")


def _tensor(name: str, axes: tuple[str, ...], dtype: DType = "float32") -> TensorSignature:
    return TensorSignature(name=name, axes=axes, dtype=dtype)


COMPONENTS: Mapping[str, Component] = MappingProxyType(
    {
        component.name: component
        for component in (
            Component(
                name="text_encoder",
                inputs=(_tensor("tokens", ("batch", "tokens"), "int64"),),
                outputs=(_tensor("context", ("batch", "tokens", "context_dim")),),
            ),
            Component(
                name="class_embedder",
                inputs=(_tensor("class_labels", ("batch",), "int64"),),
                outputs=(_tensor("context", ("batch", "class_tokens", "context_dim")),),
            ),
            Component(
                name="rescaler",
                inputs=(
                    _tensor("segmentation", ("batch", "image_height", "image_width"), "int64"),
                ),
                outputs=(_tensor("concat", ("batch", "concat_channels", "height", "width")),),
            ),
            Component(
                name="unet",
                inputs=(
                    _tensor("latents", ("batch", "unet_channels", "height", "width")),
                    _tensor("timesteps", ("batch",)),
                    _tensor("context", ("batch", "context_tokens", "context_dim")),
                ),
                outputs=(_tensor("prediction", _LATENTS),),
            ),
            Component(
                name="vae_decoder",
                inputs=(_tensor("latents", _LATENTS),),
                outputs=(_tensor("image", _IMAGE),),
            ),
            Component(
                name="vae_encoder",
                inputs=(_tensor("image", _IMAGE),),
                outputs=(_tensor("moments", ("batch", "moment_channels", "height", "width")),),
            ),
        )
    }
)
