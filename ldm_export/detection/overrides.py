"""The precedence of what no shape tells: flag, configuration, the file itself, family defaults.

Between a measurement and the family come hints: what metadata says, for instance.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from ldm_export.checkpoint.file_fields import FileFields
from ldm_export.detection.compvis_config import ConfigFields
from ldm_export.detection.features import Tensors
from ldm_export.detection.file_fields import MetadataFields
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
        zero_terminal_snr: Whether the last training timestep was nothing but noise.
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
    zero_terminal_snr: bool | None = None
    latent_scale_factor: float | None = None
    height: int | None = None
    width: int | None = None
    preset: str | None = None
    label_names: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    reuse: int | Literal["default"] | None = None


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The sources of a feature, and the tensors.

    Attributes:
        tensors: The checkpoint's.
        flags: What the user states.
        config: What a configuration of CompVis states.
        file: What the checkpoint's files state.
        family: What is usual.
        metadata: What the file's metadata says of it, a hint.
        measured: What the UNet was measured to predict.
    """

    tensors: Tensors
    flags: Overrides
    config: ConfigFields
    file: FileFields
    family: FamilyDefaults
    metadata: MetadataFields = field(default_factory=MetadataFields)
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


def by_hint(stated: tuple[T, Assumption], source: str) -> tuple[T, Assumption]:
    """Return what `first_stated` did for which a hint stood in the family's place, named so."""
    value, note = stated
    return value, replace(note, source=source) if note.source == "family" else note


def assumed(field: str, value: object, source: str) -> Assumption:
    """Return the record of a feature that the weights could not tell."""
    return Assumption(field=field, value=str(value), source=source)
