"""Detection of a checkpoint's model: from tensor names, shapes and buffers to one `ModelSpec`.

The rows are in `families.table`, the package `hyperparameters` reads what shapes tell, `spec` and
`overrides` take what they cannot tell from the first source that has it, and `consistency` checks
that it all fits together.
"""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ldm_export.checkpoint.file_fields import FileFields
from ldm_export.detection.averages_only import lost_names
from ldm_export.detection.compvis_config import Config, config_fields, takes_embeddings
from ldm_export.detection.config_check import check_architecture
from ldm_export.detection.consistency import check_consistent
from ldm_export.detection.features import Tensors
from ldm_export.detection.file_fields import file_fields, metadata_fields
from ldm_export.detection.ignored_tensors import (
    Ignored,
    ignored_by,
    ignored_notes,
    without_ignored,
)
from ldm_export.detection.match import match_family
from ldm_export.detection.overrides import Overrides, Sources, first_stated
from ldm_export.detection.own_sections import SamplingFields
from ldm_export.detection.prediction_type import HINTS
from ldm_export.detection.shallow_unet import shallow_weights
from ldm_export.detection.spec import read_spec
from ldm_export.detection.weight_assignment import assigned_weights
from ldm_export.errors import ExportError, WeightsError
from ldm_export.families.records import (
    TINY_DECODER,
    Assignment,
    Family,
    FamilyDefaults,
    WeightsChoice,
)
from ldm_runtime.errors import RequestError
from ldm_runtime.requests.request import FIELDS
from ldm_runtime.requests.resolution import check_defaults
from ldm_runtime.specs.model import ModelSpec, PredictionType

__all__ = ["Detection", "Overrides", "assigned_weights", "detect"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """The model in a checkpoint, and where its weights go.

    Attributes:
        spec: The model.
        weights: Per component, checkpoint tensor name by network parameter name.
        unused: Reason why a tensor is in no component, by its name.
        ignored: The tensors that the user leaves out.
        siblings: What else models of these shapes predict, if nothing but the family, or a hint
            that a measurement outweighs, says what this one does.
        is_hinted: Whether a hint says what this one predicts, which any measurement outweighs.
        has_doubtful_averages: Whether the averages that are used may be of another model: nothing
            but a family whose models are merged asks for them, and the last weights are there.
        fp32_components: Components that get no graph in half precision, whose range released
            weights of the family are known to leave.
    """

    spec: ModelSpec
    weights: Mapping[str, Mapping[str, str]]
    unused: Mapping[str, str]
    ignored: Ignored
    siblings: frozenset[PredictionType] = frozenset()
    is_hinted: bool = False
    has_doubtful_averages: bool = False
    fp32_components: frozenset[str] = frozenset()


def detect(
    tensors: Tensors,
    *,
    config: Config | None = None,
    overrides: Overrides | None = None,
    metadata: Mapping[str, str] = MappingProxyType({}),
    stated: FileFields | None = None,
    measured: PredictionType | None = None,
) -> Detection:
    """Recognise a checkpoint.

    Args:
        tensors: Its tensors by name. Values are read of schedule buffers, the scale factor and the
            marks of EDM only.
        config: A parsed CompVis configuration, see `detection.compvis_config.read_config`.
        overrides: Features that the user states.
        metadata: The file's own.
        stated: What the configuration files next to its weights say.
        measured: What its UNet was measured to predict, for families with models of both kinds.

    Raises:
        UnknownModelError: It does not belong to a family that is exported.
        WeightsError: Tensors are missing or unassigned, or contradict each other or `config`.
        ExportError: A flag or an entry of `config` is impossible.
    """
    flags = overrides or Overrides()
    _check_flags(flags)
    lost = lost_names(tensors)
    known = {**tensors, **{weight: tensors[average] for weight, average in lost.items()}}
    family, family_defaults = match_family(
        known,
        takes_embeddings=takes_embeddings(config),
        edm_prediction=None if stated is None or stated.edm is None else stated.prediction_type,
    )
    family = replace(family, assignments=(*family.assignments, *_present(known, family)))
    _check_needed(flags, family_defaults)
    hints = metadata_fields(metadata)
    sources = Sources(
        tensors=known,
        flags=flags,
        config=config_fields(config),
        file=file_fields(tensors, hints, stated),
        family=family_defaults,
        metadata=hints,
        measured=measured,
    )
    wanted, source = _wanted_weights(sources, has_only_averages=bool(lost))
    ignored = ignored_by(flags.ignore, tensors)
    assignment = assigned_weights(known, family, wanted, source, ignored)
    kept = without_ignored(known, ignored, assignment.unused)
    spec = read_spec(replace(sources, tensors=kept), family.name, assignment)
    notes = ignored_notes(ignored, assignment.unused)
    spec = replace(spec, assumptions=(*spec.assumptions, *notes))
    check_architecture(config, spec)
    check_consistent(spec)
    _check_sampling(sources, spec)
    logger.info("recognised %s; using its %s weights", spec.family, spec.weights)
    unused = {name: reason for name, reason in assignment.unused.items() if name not in lost}
    return Detection(
        spec=spec,
        weights={**assignment.weights, **shallow_weights(assignment.weights, spec)},
        unused=unused,
        ignored=ignored,
        siblings=_siblings(family_defaults, spec),
        is_hinted=_is_stated_by(HINTS, spec),
        has_doubtful_averages=family_defaults.is_merged
        and (assignment.chosen, assignment.source) == ("ema", "family")
        and not lost,
        fp32_components=frozenset()
        if sources.file.vae_fits_fp16
        else frozenset(family_defaults.fp32_halves),
    )


def _present(tensors: Tensors, family: Family) -> list[Assignment]:
    """Return the assignments of the components that a checkpoint need not have, but has."""
    optional = (*family.optional, TINY_DECODER)
    present = {
        each.component
        for each in optional
        if any(name.startswith(each.checkpoint_prefix) for name in tensors)
    }
    return [each for each in optional if each.component in present]


def _siblings(family: FamilyDefaults, spec: ModelSpec) -> frozenset[PredictionType]:
    """Return what else models of a family predict, unless one is known to predict what it does."""
    is_open = _is_stated_by(("family", *HINTS), spec)
    known = {family.prediction_type, *family.siblings}
    return frozenset(known - {spec.prediction_type}) if is_open else frozenset()


def _is_stated_by(sources: Collection[str], spec: ModelSpec) -> bool:
    """Return whether one of some sources says what a UNet predicts."""
    return any(
        each.field == "prediction_type" and each.source in sources for each in spec.assumptions
    )


def _wanted_weights(sources: Sources, *, has_only_averages: bool) -> tuple[WeightsChoice, str]:
    """Return the set of weights to use, and who says so."""
    flag = sources.flags.weights
    if has_only_averages and flag == "model":
        raise WeightsError(
            "--weights model asks for the last weights of the UNet, but the checkpoint holds only "
            "their moving averages; leave it out"
        )
    wanted, note = first_stated(
        "weights",
        flag,
        sources.config.weights,
        sources.family.weights,
        file=sources.file.weights,
    )
    if has_only_averages and wanted == "model":
        return "ema", "file"
    return wanted, note.source


def _check_flags(flags: Overrides) -> None:
    if flags.num_heads is not None and flags.num_head_channels is not None:
        raise ExportError(
            f"--num-heads {flags.num_heads} and --num-head-channels {flags.num_head_channels} "
            "exclude each other; give one"
        )
    for name in ("num_heads", "num_head_channels", "latent_scale_factor", "height", "width"):
        value = getattr(flags, name)
        if value is not None and not 0 < value < math.inf:
            flag = name.replace("_", "-")
            raise ExportError(f"--{flag} is {value}; a positive number was expected")
    if flags.preset is not None:
        try:
            FIELDS["preset"].check("preset", flags.preset)
        except RequestError as error:
            raise ExportError(f"--{error}") from error


def _check_sampling(sources: Sources, spec: ModelSpec) -> None:
    preset = sources.flags.preset
    if preset is None and sources.config.sampling == SamplingFields():
        return
    stated = "config: sampling." if preset is None else f"--preset {preset}: "
    try:
        check_defaults(spec)
    except RequestError as error:
        raise ExportError(f"{stated}{error}") from error


def _check_needed(flags: Overrides, family_defaults: FamilyDefaults) -> None:
    """Check that flags are about features that this checkpoint has."""
    unneeded = []
    if family_defaults.task == "autoencoder":
        unneeded += ["num_heads", "num_head_channels", "prediction_type", "zero_terminal_snr"]
        unneeded += ["preset", "reuse"]
    if family_defaults.task != "class-to-image":
        unneeded += ["null_class"]
    if family_defaults.task not in ("class-to-image", "layout-to-image", "semantic-synthesis"):
        unneeded += ["label_names"]
    for name in unneeded:
        value = getattr(flags, name)
        if value is not None:
            flag = name.replace("_", "-")
            shown = f" {value}" if isinstance(value, int | str) and value is not True else ""
            raise ExportError(
                f"--{flag}{shown} does not go with this checkpoint, which is for "
                f"{family_defaults.task}; leave it out"
            )
