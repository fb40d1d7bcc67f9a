"""The scale of latents that a UNet was trained with, and that of an autoencoder from elsewhere."""

import logging
import math
from collections.abc import Sequence

from ldm_export.checkpoint.file_fields import LatentScale
from ldm_export.detection.overrides import Sources
from ldm_runtime.specs.networks import AutoencoderSpec

_LOGGER = logging.getLogger(__name__)

_SAME = 1e-3  # relative error: files round


def warn_of_other_scale(sources: Sources, autoencoder: AutoencoderSpec) -> None:
    """Warn where an autoencoder in place of the model's own was saved with another scale.

    The UNet's counts: autoencoders that are exchanged for one another have the same latents, while
    their configurations state what the model needs that they were saved with, or a default.

    Args:
        sources: Flags, and what the autoencoder's files state.
        autoencoder: The autoencoder, with the scale that is used.
    """
    stated = sources.file.vae_scale
    if sources.flags.latent_scale_factor is not None or _is_same(stated, autoencoder):
        return
    used = LatentScale(
        factor=autoencoder.latent_scale_factor,
        mean=autoencoder.latents_mean,
        std=autoencoder.latents_std,
    )
    _LOGGER.warning(
        "the configuration of the autoencoder that takes the place of the model's own states %s, "
        "and the UNet was trained with %s, which is used; --latent-scale-factor states another",
        _shown(stated),
        _shown(used),
    )


def _is_same(stated: LatentScale, used: AutoencoderSpec) -> bool:
    """Return whether what is stated, if anything, is used."""
    factor = () if stated.factor is None else (stated.factor,)
    pairs = (
        (factor, (used.latent_scale_factor,)),
        (stated.mean or (), used.latents_mean),
        (stated.std or (), used.latents_std),
    )
    return all(not numbers or _are_close(numbers, others) for numbers, others in pairs)


def _are_close(numbers: Sequence[float], others: Sequence[float]) -> bool:
    return len(numbers) == len(others) and all(
        math.isclose(number, other, rel_tol=_SAME)
        for number, other in zip(numbers, others, strict=True)
    )


def _shown(scale: LatentScale) -> str:
    factor = "no scale factor" if scale.factor is None else f"the scale factor {scale.factor:g}"
    return f"{factor} and statistics of every channel" if scale.mean or scale.std else factor
