"""Moving averages compared with the weights they should be averages of.

Fine-tuning tools leave the averages of the base model in the file, and merging tools write
differences or zeros over them, so that averages need not belong to the weights next to them.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ldm_export.detection.features import Tensors
from ldm_export.detection.weight_assignment import EMA_PREFIX, ema_name

_LOGGER = logging.getLogger(__name__)

#: Relative distance from which averages are not of these weights. An average with decay 0.9999
#: follows 10,000 steps late: a weight that Adam with learning rate 1e-4 moves at random is then
#: 1e-4 * sqrt(5000) = 0.007 away, a quarter of the 0.03 that weights of a UNet measure, and less
#: once training has slowed down (less than a tenth in the shapes model, after Muon). Zeros are 1
#: away, differences of two models about 1, another model's weights 1.4. The averages that a light
#: fine-tuning leaves of its base are as near as its own would be; no distance tells these two
#: apart.
FAR = 0.5


@dataclass(frozen=True, kw_only=True)
class AverageComparison:
    """Averages next to the weights that they should be averages of.

    Attributes:
        is_constant: Whether every tensor of the averages has one value.
        distance: Euclidean norm of all differences over that of the weights; None without weights.
    """

    is_constant: bool
    distance: float | None

    @property
    def is_far(self) -> bool:
        """Whether the averages are of other weights; without weights that is not known."""
        return self.distance is not None and not self.distance <= FAR  # NaN is far


def compare_averages(tensors: Tensors, averages: Iterable[str]) -> AverageComparison:
    """Compare averages with the weights in the same checkpoint; reads the values of both.

    Args:
        tensors: The checkpoint's.
        averages: Names of the averages.
    """
    originals = {ema_name(name): name for name in tensors}
    is_constant, has_all, distance, size = True, True, 0.0, 0.0
    for name in averages:
        average = _values(tensors, name)
        is_constant &= bool(np.ptp(average) == 0)
        if name in originals:
            weights = _values(tensors, originals[name])
            distance += _squared(average - weights)
            size += _squared(weights)
        else:
            has_all = False
    share = (distance / size) ** 0.5 if has_all and size > 0 else None
    return AverageComparison(is_constant=is_constant, distance=share)


def warn_of_averages(tensors: Tensors, used: Mapping[str, Mapping[str, str]]) -> None:
    """Log how far averages in use are from the last weights, with a warning where that is too far.

    Args:
        tensors: The checkpoint's.
        used: Per component, checkpoint tensor name by network parameter name.
    """
    found = _compared(tensors, used)
    if found is None:
        return
    if found.is_constant:
        _LOGGER.warning("%s; use --weights model", _constant(found))
    elif found.distance is None:  # nothing to compare with
        return
    elif found.is_far:
        _LOGGER.warning(
            "%s, so they are probably of another model; try --weights model and compare",
            _far(found),
        )
    else:
        _LOGGER.info(
            "the moving averages differ from the last weights by %s", _percent(found.distance)
        )


def are_averages_of(tensors: Tensors, used: Mapping[str, Mapping[str, str]]) -> bool:
    """Return whether averages that are complete, next to complete weights, are of these weights.

    For models that are merged with others, by tools that leave the averages of one of them in the
    file: averages that differ at all are a warning, since those of the original are near, too.

    Args:
        tensors: The checkpoint's.
        used: Per component, checkpoint tensor name by network parameter name.
    """
    found = _compared(tensors, used)
    if found is None or found.distance == 0:
        return True
    if found.is_constant or found.is_far:
        _LOGGER.warning(
            "%s; the last weights are used, --weights ema takes the averages",
            _constant(found) if found.is_constant else _far(found),
        )
        return False
    _LOGGER.warning(
        "the moving averages differ from the last weights by %s, which training does, and so does "
        "merging, after which they are those of the original model; they are used, --weights model "
        "takes the last weights, the right ones of a merged model",
        _percent(found.distance),
    )
    return True


def _compared(tensors: Tensors, used: Mapping[str, Mapping[str, str]]) -> AverageComparison | None:
    """Compare the averages in use with the weights; None if none are."""
    names = (name for component in used.values() for name in component.values())
    averages = [name for name in dict.fromkeys(names) if name.startswith(EMA_PREFIX)]
    return compare_averages(tensors, averages) if averages else None


def _constant(found: AverageComparison) -> str:
    return (
        "every tensor of the moving averages has one value only (they differ from the last weights "
        f"by {_percent(found.distance)}), so they are not a trained model"
    )


def _far(found: AverageComparison) -> str:
    return (
        f"the moving averages differ from the last weights by {_percent(found.distance)} of those "
        f"(averages do by less than {_percent(FAR)})"
    )


def _values(tensors: Tensors, name: str) -> npt.NDArray[np.float32]:
    return np.asarray(tensors[name].numpy(), dtype=np.float32)


def _squared(values: npt.NDArray[np.float32]) -> float:
    """Return the sum of squares."""
    return float(np.sum(np.square(values), dtype=np.float64))


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else f"{share:.1%}"
