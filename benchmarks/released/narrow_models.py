"""The released models with narrow layers: the same structure, exported in a minute or two."""

from collections.abc import Iterable
from dataclasses import replace

from ldm_runtime.specs.networks import (
    AutoencoderSpec,
    ClassEmbedderSpec,
    ImageEncoderSpec,
    Networks,
    NetworkSpec,
    TextEncoderSpec,
    UNetSpec,
)
from released.records import ReleasedModel

_CHANNELS, _WIDTH, _LAYERS = 32, 64, 2


def narrowed(model: ReleasedModel) -> ReleasedModel:
    """Return the same model with as few channels as its normalisations allow."""
    networks = {name: _narrowed(record) for name, record in model.networks.items()}
    encoders = [each for each in networks.values() if isinstance(each, TextEncoderSpec)]
    unet = networks.get("unet")
    if isinstance(unet, UNetSpec) and encoders:
        removed = _pooled_dim(model.networks.values()) - _pooled_dim(encoders)
        networks["unet"] = replace(
            unet,
            context_dim=sum(each.width for each in encoders),
            vector_dim=None if unet.vector_dim is None else unet.vector_dim - removed,
        )
    if model.task == "retrieval":  # the released factor belongs to the released channels
        autoencoder = Networks(**networks).of(AutoencoderSpec)
        networks["autoencoder"] = replace(autoencoder, latent_scale_factor=1.0)
    return replace(model, name=f"{model.name} (narrow)", networks=Networks(**networks))


def _narrowed(record: NetworkSpec) -> NetworkSpec:
    match record:
        case UNetSpec():
            return _unet(record)
        case AutoencoderSpec():
            return replace(record, channels=_CHANNELS, num_res_blocks=1)
        case TextEncoderSpec():
            return _encoder(record)
        case ImageEncoderSpec():
            return _image_encoder(record)
        case ClassEmbedderSpec():
            return replace(record, width=_WIDTH)
    return record


def _unet(spec: UNetSpec) -> UNetSpec:
    """Return a narrow UNet; blocks of different depth stay as many as they are."""
    return replace(
        spec,
        model_channels=max(_CHANNELS, spec.num_head_channels or 0),
        num_res_blocks=1 if spec.output_depth is None else spec.num_res_blocks,
        context_dim=None if spec.context_dim is None else _WIDTH,
    )


def _pooled_dim(networks: Iterable[NetworkSpec]) -> int:
    """Return the width of the pooled output, which one text encoder at most has."""
    return sum(each.pooled_dim or 0 for each in networks if isinstance(each, TextEncoderSpec))


def _encoder(spec: TextEncoderSpec) -> TextEncoderSpec:
    """Return a narrow text encoder; that of OpenCLIP is wider than what attends to it alone."""
    heads = 2 if spec.kind == "openclip" else 1
    return replace(
        spec,
        width=heads * _WIDTH,
        num_layers=_LAYERS,
        context_layers=_LAYERS - (spec.num_layers - spec.context_layers),
        num_heads=spec.num_heads if spec.kind == "bert" else heads,
        feed_forward_dim=4 * heads * _WIDTH,
        pooled_dim=None if spec.pooled_dim is None else heads * _WIDTH,
    )


def _image_encoder(spec: ImageEncoderSpec) -> ImageEncoderSpec:
    """Return a narrow image encoder with heads and an embedding of the same size."""
    heads = 2
    width = heads * spec.width // spec.num_heads
    return replace(
        spec,
        width=width,
        num_layers=_LAYERS,
        num_heads=heads,
        feed_forward_dim=2 * width,
        image_size=4 * spec.patch_size,
    )
