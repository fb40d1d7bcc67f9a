"""The precedence of what no shape tells: flag, configuration, the file itself, family defaults."""

from dataclasses import dataclass
from typing import Literal, TypeVar

from ldm_export.checkpoint.file_fields import FileFields
from ldm_export.detection.compvis_config import ConfigFields
from ldm_export.detection.features import Tensors
from ldm_export.families.records import FamilyDefaults, WeightsChoice
from ldm_runtime.specs.model import Assumption, PredictionType

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """The features that the user states; None leaves one to the other sources.

    Attributes:
        weights: Set of trained weights to use.
        num_heads: Attention heads of the UNet.
        num_head_channels: Channels per head of the UNet, instead of `num_heads`.
        null_class: The null class.
        prediction_type: Prediction target of the UNet.
        latent_scale_factor: Multiplies the autoencoder's latents into the UNet's.
        height: Default height in pixels.
        width: Default width in pixels.
        preset: Name of the settings of a distilled model, in `ldm_runtime.requests.presets`.
        label_names: Names of labels 0, 1, … of a model of classes, layouts or segmentation maps.
        ignore: Shell patterns over the names of tensors that are left out.
        reuse: Outermost blocks of the UNet that become a graph of their own, for feature reuse;
            "default" is `shallow_unet.DEFAULT_BLOCKS`, and None is without that graph.
    """

    weights: WeightsChoice | None = None
    num_heads: int | None = None
    num_head_channels: int | None = None
    null_class: int | None = None
    prediction_type: PredictionType | None = None
    latent_scale_factor: float | None = None
    height: int | None = None
    width: int | None = None
    preset: str | None = None
    label_names: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    reuse: int | Literal["default"] | None = None


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The sources of a feature, and the tensors; `measured` is what the UNet predicts."""

    tensors: Tensors
    flags: Overrides
    config: ConfigFields
    file: FileFields
    family: FamilyDefaults
    measured: PredictionType | None = None


def first_stated(
    field: str,
    flag: T | None,
    config: T | None,
    family: T,
    *,
    file: T | None = None,
    measured: T | None = None,
) -> tuple[T, Assumption]:
    """Return the value of the first source that has one, and the record of it."""
    stated = {"flag": flag, "config": config, "file": file, "measured": measured}
    for source, value in stated.items():
        if value is not None:
            return value, assumed(field, value, source)
    return family, assumed(field, family, "family")


def assumed(field: str, value: object, source: str) -> Assumption:
    """Return the record of a feature that the weights could not tell."""
    return Assumption(field=field, value=str(value), source=source)
