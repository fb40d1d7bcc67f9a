"""The assignment of a checkpoint's tensors to the parameters of components, or to none."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ldm_export.detection.features import Tensors
from ldm_export.detection.ignored_tensors import Ignored, ignored_reason
from ldm_export.detection.missing_parts import flag_of
from ldm_export.errors import WeightsError
from ldm_export.families.records import Family, WeightsChoice
from ldm_export.families.unused_tensors import IGNORED_TENSORS
from ldm_export.hyperparameters.shapes import Shapes, listed
from ldm_runtime.tensor_files.tensor_extent import FLOATS

logger = logging.getLogger(__name__)

#: Ends of the names of tensors by which weights of 8 bits are multiplied, and of the mark of files
#: with any, as ComfyUI writes them.
_SCALES = frozenset({"scale_weight", "weight_scale", "scaled_fp8"})
#: Beginning of the names of moving averages.
EMA_PREFIX = "model_ema."


@dataclass(frozen=True, kw_only=True)
class WeightAssignment:
    """The assignment of a checkpoint's tensors to components.

    Attributes:
        weights: Per component, checkpoint tensor name by network parameter name.
        chosen: The set of trained weights that is used …
        source: … and who chose it: "flag", "config", "family", or "file" where the checkpoint has
            no other, or averages that are not of its weights.
        unused: Reason why a tensor is in no component, by its name.
    """

    weights: Mapping[str, Mapping[str, str]]
    chosen: WeightsChoice
    source: str
    unused: Mapping[str, str]


def assigned_weights(
    tensors: Tensors,
    family: Family,
    wanted: WeightsChoice,
    source: str,
    ignored: Ignored = MappingProxyType({}),
) -> WeightAssignment:
    """Assign every tensor of a checkpoint to a component of `family` or to the ignored tensors.

    Moving averages are of all that the family averages: the UNet, or an autoencoder that comes
    alone. Where they are wanted but incomplete, the weights of the last step are used.

    Args:
        tensors: The checkpoint's.
        family: Its family.
        wanted: The set of trained weights to use.
        source: Who wants it: "flag", "config", "file" or "family".
        ignored: Tensors that the user leaves out. One that is named like a component's stays with
            it, and has no average.

    Raises:
        WeightsError: A tensor is neither assigned nor known to be ignored, a component has none,
            two tensors are assigned to one parameter, a weight is not a floating-point tensor, or
            a flag asks for averages that are incomplete.
    """
    weights = _assign(tensors, family)
    raw = [
        name
        for component in family.averaged
        for name in weights[component].values()
        if name not in ignored
    ]
    chosen = _choose(tensors, raw, wanted, asked=source == "flag")
    replaced: frozenset[str] = frozenset()
    if chosen == "ema":
        replaced = frozenset(raw)
        for component in family.averaged:
            names = weights[component].items()
            weights[component] = {
                parameter: ema_name(name) if name in replaced else name for parameter, name in names
            }
    assigned = frozenset(name for names in weights.values() for name in names.values())
    _check_types(tensors, assigned - ignored.keys())
    return WeightAssignment(
        weights=MappingProxyType(
            {component: MappingProxyType(names) for component, names in weights.items()}
        ),
        chosen=chosen,
        source=source if chosen == wanted else "file",
        unused=MappingProxyType(_unused_tensors(tensors, family, assigned, replaced, ignored)),
    )


def component_shapes(tensors: Tensors, names: Mapping[str, str]) -> Shapes:
    """Return the shape of every network parameter in `names` (parameter to checkpoint name)."""
    return {parameter: tuple(tensors[name].shape) for parameter, name in names.items()}


def ema_name(name: str) -> str:
    """Return the name of the moving average of tensor `name`.

    Source: LitEma of CompVis/latent-diffusion (ldm/modules/ema.py, a506df5), which wraps `model`
    and may not have dots in the names of its buffers.
    """
    return EMA_PREFIX + name.removeprefix("model.").replace(".", "")


def has_ema(tensors: Tensors) -> bool:
    """Return whether a checkpoint holds moving averages, complete or not."""
    bookkeeping = {f"{EMA_PREFIX}decay", f"{EMA_PREFIX}num_updates"}
    return any(name.startswith(EMA_PREFIX) and name not in bookkeeping for name in tensors)


def _assign(tensors: Tensors, family: Family) -> dict[str, dict[str, str]]:
    weights: dict[str, dict[str, str]] = {
        assignment.component: {} for assignment in family.assignments
    }
    for name in tensors:
        if _ignored_reason(name, family):
            continue
        for assignment in family.assignments:
            parameter = assignment.parameter_of(name)
            if parameter is not None:
                taken = weights[assignment.component].setdefault(parameter, name)
                _check_same_tensor(tensors, assignment.component, parameter, (taken, name))
                break
    for component, names in weights.items():
        if not names:
            wanted = ", ".join(
                f"{assignment.checkpoint_prefix}*"
                for assignment in family.assignments
                if assignment.component == component
            )
            flag = flag_of(component, family)
            raise WeightsError(
                f"the checkpoint has no weights for the {component} ({wanted}); "
                f"{f'give it by {flag}' if flag else 'give the whole checkpoint'}"
            )
    return weights


def _check_same_tensor(
    tensors: Tensors, component: str, parameter: str, names: tuple[str, str]
) -> None:
    """Check that two tensors under different spellings of one parameter are copies."""
    taken, name = names
    if taken == name:
        return
    first, second = tensors[taken], tensors[name]
    if first.shape != second.shape or not np.array_equal(first.numpy(), second.numpy()):
        raise WeightsError(
            f"{taken} and {name} are both the {component}'s {parameter}, and differ: one of them "
            "is left over from another model; load the checkpoint with torch or safetensors, "
            "delete the one that does not belong to it, and save it again"
        )


def _choose(
    tensors: Tensors, raw: Sequence[str], wanted: WeightsChoice, *, asked: bool
) -> WeightsChoice:
    if wanted == "model":
        return "model"
    averages = {name: ema_name(name) for name in raw}
    missing = [name for name in averages.values() if name not in tensors]
    if asked and missing:
        raise WeightsError(
            f"the checkpoint lacks {len(missing)} of {len(averages)} moving averages "
            f"({listed(missing)}); use --weights model"
        )
    if missing:
        if len(missing) < len(averages):
            logger.warning(
                "%d of %d moving averages are missing (%s): using the training weights",
                len(missing),
                len(averages),
                listed(missing),
            )
        return "model"
    for name, average in averages.items():
        if tensors[average].shape != tensors[name].shape:
            raise WeightsError(
                f"{average} has shape {tensors[average].shape}, but {name} has "
                f"{tensors[name].shape}; use --weights model if its average is broken"
            )
    return "ema"


def _check_types(tensors: Tensors, assigned: frozenset[str]) -> None:
    wrong = [name for name in assigned if tensors[name].dtype not in FLOATS]
    if wrong:
        types = ", ".join(sorted({tensors[name].dtype for name in wrong}))
        raise WeightsError(
            f"{len(wrong)} weights are stored as {types} ({listed(wrong)}); only "
            f"{', '.join(sorted(FLOATS))} can be read, so use an unquantised checkpoint"
        )
    scales = [name for name in tensors if name.rpartition(".")[2] in _SCALES]
    if scales and any(tensors[name].dtype.startswith("float8") for name in assigned):
        raise WeightsError(
            f"weights of 8 bits are to be multiplied by {len(scales)} others ({listed(scales)}), "
            "which cannot be done here; use a checkpoint without such scales, as of fp16"
        )


def _unused_tensors(
    tensors: Tensors,
    family: Family,
    assigned: frozenset[str],
    replaced: frozenset[str],
    ignored: Ignored,
) -> dict[str, str]:
    unused, unassigned = {}, []
    for name in tensors:
        if name in assigned:
            continue
        reason = (
            "training weights, their moving average is used"
            if name in replaced
            else _ignored_reason(name, family) or _copy_reason(tensors, family, name)
        ) or ignored_reason(ignored, name)
        if reason:
            unused[name] = reason
        else:
            unassigned.append(name)
    if unassigned:
        raise WeightsError(
            f"{len(unassigned)} tensors belong to no component and are not known to be ignored: "
            f"{listed(unassigned)}; an export without them could be wrong. If they do not matter, "
            "leave them out with --ignore 'PATTERN', a shell pattern over their names"
        )
    return unused


def _ignored_reason(name: str, family: Family) -> str:
    known = [*family.unused, *((each.pattern, each.reason) for each in IGNORED_TENSORS)]
    return next((reason for pattern, reason in known if re.fullmatch(pattern, name)), "")


def _copy_reason(tensors: Tensors, family: Family, name: str) -> str:
    """Return that a tensor that is not assigned is a copy of another, or "" if it is not."""
    if any(assignment.parameter_of(name) is not None for assignment in family.assignments):
        return "a copy under another name"  # assigning its parameter proved that
    for prefix, original in family.copies:
        other = original + name.removeprefix(prefix)
        if name.startswith(prefix) and other in tensors:
            return f"a copy of {original}*" if tensors[other].shape == tensors[name].shape else ""
    return ""
