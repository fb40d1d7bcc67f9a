"""The released models with narrow layers: the same structure, exported in a minute or two."""

from dataclasses import replace

from ldm_runtime.specs.networks import (
    AutoencoderSpec,
    ClassEmbedderSpec,
    Networks,
    NetworkSpec,
    TextEncoderSpec,
    UNetSpec,
)
from released.released_models import ReleasedModel

_CHANNELS, _WIDTH, _LAYERS = 32, 64, 2


def narrowed(model: ReleasedModel) -> ReleasedModel:
    """Return the same model with as few channels as its normalisations allow."""
    networks = {name: _narrowed(record) for name, record in model.networks.items()}
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
        case ClassEmbedderSpec():
            return replace(record, width=_WIDTH)
    return record


def _unet(spec: UNetSpec) -> UNetSpec:
    return replace(
        spec,
        model_channels=_CHANNELS,
        num_res_blocks=1,
        context_dim=None if spec.context_dim is None else _WIDTH,
    )


def _encoder(spec: TextEncoderSpec) -> TextEncoderSpec:
    return replace(
        spec,
        width=_WIDTH,
        num_layers=_LAYERS,
        context_layers=_LAYERS,
        feed_forward_dim=4 * _WIDTH,
    )
