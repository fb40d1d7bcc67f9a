"""Rows of the family table: autoencoders alone, in their own files or cut from a model.

Source: the model zoo of autoencoders of CompVis/latent-diffusion (a506df5).
"""

from collections.abc import Mapping
from types import MappingProxyType

from ldm_export.families.records import AUTOENCODER, Expected, Family, autoencoder_assignments
from ldm_export.families.released_settings import STANDALONE_AUTOENCODER

_ALONE: Mapping[str, Expected] = {"model_channels": "none", "conditioner": "none", "extra": "none"}


def _released(name: str, **features: Expected) -> Family:
    return _autoencoder(f"ldm-{name}", autoencoder_channels=128, **features)


def _autoencoder(name: str, **features: Expected) -> Family:
    return Family(
        name=name,
        features=MappingProxyType({**_ALONE, **features}),
        family_defaults=STANDALONE_AUTOENCODER,
        assignments=autoencoder_assignments("") + AUTOENCODER,
        averaged=("vae_decoder", "vae_encoder"),
    )


AUTOENCODER_FAMILIES: tuple[Family, ...] = (
    _autoencoder("autoencoder-vq", autoencoder="vq"),
    _autoencoder("autoencoder-kl", autoencoder="kl"),
    *(
        _released(
            name,
            autoencoder="vq",
            factor=factor,
            latent_channels=channels,
            codebook_size=codes,
            middle_attention=attention,
        )
        for name, factor, channels, codes, attention in (
            ("vq-f4", 4, 3, 8192, "yes"),
            ("vq-f4-noattn", 4, 3, 8192, "no"),
            ("vq-f8", 8, 4, 16384, "yes"),
            ("vq-f8-n256", 8, 4, 256, "yes"),
            ("vq-f16", 16, 8, 16384, "yes"),
        )
    ),
    *(
        _released(name, autoencoder="kl", factor=factor, latent_channels=channels)
        for name, factor, channels in (
            ("kl-f4", 4, 3),
            ("kl-f8", 8, 4),
            ("kl-f16", 16, 16),
            ("kl-f32", 32, 64),
        )
    ),
)
