"""The noise on the embedding of an image in training: its schedule, and statistics.

Source: `CLIPEmbeddingNoiseAugmentation` in ldm/modules/encoders/modules.py of
Stability-AI/stablediffusion (cf1d67a). Checkpoints hold its schedule, but not its statistics.
"""

import math

from ldm_export.checkpoint.file_fields import cosine_betas
from ldm_export.detection.features import Tensors
from ldm_export.detection.few_numbers import read_numbers
from ldm_export.detection.noise_schedule import (
    ComputedSchedule,
    ListedBetas,
    computed_schedule,
    read_schedule,
)
from ldm_export.detection.overrides import Sources, assumed
from ldm_export.errors import WeightsError
from ldm_export.families.records import NOISE_AUGMENTOR_PREFIX
from ldm_runtime.specs.model import Assumption, NoiseAugmentation

_MEAN, _STD = "data_mean", "data_std"
_NUM_LEVELS = 1000


def read_noise_augmentation(
    sources: Sources, embed_dim: int
) -> tuple[NoiseAugmentation, list[Assumption]]:
    """Return the noise augmentation of a model, and its assumptions.

    Args:
        sources: Tensors, what the files say, and the family.
        embed_dim: Length of the embedding of an image.

    Raises:
        WeightsError: The schedule is not one, or the statistics are needed and missing, of
            embeddings of another length, or stored in 8 bits.
    """
    prefix = NOISE_AUGMENTOR_PREFIX
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in sources.tensors.items()
        if name.startswith(prefix)
    }
    schedule = read_schedule(own, _stated_schedule(sources))
    notes = []
    if schedule.formula is not None:
        formula = schedule.formula
        notes.append(assumed("noise_augmentation.alphas_cumprod", formula, formula.source))
    mean, std = _statistics(own, embed_dim, needed=sources.family.normalises_embeddings)
    augmentation = NoiseAugmentation(alphas_cumprod=schedule.alphas_cumprod, mean=mean, std=std)
    return augmentation, notes


def _stated_schedule(sources: Sources) -> ComputedSchedule:
    if sources.file.augmentation_schedule is not None:
        return computed_schedule(sources.file.augmentation_schedule)
    return ListedBetas(betas=cosine_betas(_NUM_LEVELS), source="family")


def _statistics(
    own: Tensors, embed_dim: int, *, needed: bool
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of embeddings: 0 and 1 for a model without."""
    missing = [name for name in (_MEAN, _STD) if name not in own]
    if missing and not needed and len(missing) == 2:
        return (0.0,) * embed_dim, (1.0,) * embed_dim
    if missing:
        raise WeightsError(
            "the checkpoint does not hold the mean and the standard deviation of embeddings of "
            "images, by which this model normalises them; they are in the folder image_normalizer "
            "of its diffusers version: give that with --image-normalizer"
        )
    remedy = "give the image normalizer in 16 bits or more with --image-normalizer"
    mean, std = (read_numbers(own, name, remedy=remedy) for name in (_MEAN, _STD))
    if not len(mean) == len(std) == embed_dim:
        raise WeightsError(
            f"the image normalizer has a mean of {len(mean)} numbers and a standard deviation of "
            f"{len(std)}, but embeddings of images have {embed_dim}; they do not belong to one "
            "model"
        )
    if not (all(map(math.isfinite, mean)) and all(0 < each < math.inf for each in std)):
        raise WeightsError(
            "the image normalizer has a mean that is not finite, or a standard deviation that is "
            "not positive; get its file again"
        )
    return mean, std
