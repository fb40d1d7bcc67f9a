"""The noise levels of a model of EDM and the statistics of its latents, from marks of its file.

Sources: playground-v2.5 has the tensors `edm_mean` and `edm_std`, as diffusers' single-file loader
reads them; CosXL has `edm_vpred.sigma_max` and `edm_vpred.sigma_min`, as ComfyUI does
(comfy/supported_models.py).
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType

from ldm_export.detection.features import Tensors
from ldm_export.detection.few_numbers import read_numbers
from ldm_export.detection.overrides import Sources, assumed, first_stated
from ldm_export.detection.zero_terminal_snr import check_no_zero_snr
from ldm_export.errors import WeightsError
from ldm_runtime.specs.model import Assumption, EdmSpec, PredictionType

_RANGE: Mapping[str, str] = MappingProxyType(
    {"sigma_min": "edm_vpred.sigma_min", "sigma_max": "edm_vpred.sigma_max"}
)
_MEAN, _STD = "edm_mean", "edm_std"
_REMEDY = "use a checkpoint that holds it in 16 bits or more"
#: Mean and standard deviation of every channel of the autoencoder's latents; empty without.
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def read_edm(sources: Sources) -> tuple[EdmSpec | None, list[Assumption]]:
    """Return the noise levels of a model of EDM, each from the first source that states it.

    Returns:
        None for a model with a training schedule; and what is assumed.

    Raises:
        WeightsError: A mark is not a noise level or too coarse, or the highest is not above the
            lowest.
        ExportError: It is said of the model what only one with a training schedule can be.
    """
    usual = sources.file.edm or sources.family.edm
    if usual is None:
        return None, []
    check_no_zero_snr(sources)
    values, notes = {}, []
    for name in (field.name for field in fields(EdmSpec)):
        own = _scalar(sources.tensors, _RANGE.get(name, ""), getattr(usual, name))
        stated = own or (sources.file.edm and getattr(sources.file.edm, name))
        value, note = first_stated(f"edm.{name}", None, None, getattr(usual, name), file=stated)
        values[name] = value
        notes.append(note)
    edm = EdmSpec(**values)
    if edm.sigma_min >= edm.sigma_max:
        raise WeightsError(
            f"noise levels go from {edm.sigma_min:g} to {edm.sigma_max:g} (edm_vpred.sigma_min and "
            "edm_vpred.sigma_max, or the scheduler's); the second must be the higher"
        )
    return edm, notes


def check_prediction(edm: EdmSpec | None, prediction_type: PredictionType) -> None:
    """Check that a model of EDM predicts what it can.

    Raises:
        WeightsError: It is said to predict x0.
    """
    if edm is not None and prediction_type == "sample":
        raise WeightsError(
            "prediction_type is sample, but a model of EDM predicts epsilon (the output F of its "
            "paper) or v_prediction; give --prediction-type epsilon or v_prediction"
        )


def read_statistics(sources: Sources) -> tuple[Statistics, list[Assumption]]:
    """Return mean and standard deviation of every channel of latents, and what is assumed.

    Raises:
        WeightsError: There is one without the other, or they are not such numbers or too coarse.
    """
    found = {name: read_numbers(sources.tensors, name, remedy=_REMEDY) for name in (_MEAN, _STD)}
    mean = found[_MEAN] or sources.file.latents_mean or ()
    std = found[_STD] or sources.file.latents_std or ()
    if len(mean) != len(std):
        raise WeightsError(
            f"there are {len(mean)} means of latents and {len(std)} standard deviations ({_MEAN} "
            f"and {_STD}, or latents_mean and latents_std); one of each per channel was expected"
        )
    if not (all(map(math.isfinite, mean)) and all(0 < each < math.inf for each in std)):
        raise WeightsError(
            f"the means of latents are {list(mean)} and their standard deviations {list(std)}; "
            "finite numbers were expected, the second above 0"
        )
    if not mean:
        return ((), ()), []
    return (mean, std), [
        assumed("autoencoder.latents_mean", _listed(mean), "file"),
        assumed("autoencoder.latents_std", _listed(std), "file"),
    ]


def _scalar(tensors: Tensors, name: str, usual: float) -> float | None:
    """Return the noise level that a tensor marks, or None without it and where it is `usual`."""
    values = read_numbers(tensors, name, remedy=_REMEDY, usual=usual)
    if not values:
        return None
    if len(values) != 1 or not 0 < values[0] < math.inf:
        raise WeightsError(f"{name} is {list(values)}; one positive number was expected")
    return values[0]


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
