"""The features that a checkpoint states about itself: markers, metadata, and its folder's files.

Sources: the ModelSpec standard (Stability-AI/ModelSpec, 02f6279) for the metadata of safetensors
files; `v_pred` and `ztsnr` are empty tensors that trainers add, and that ComfyUI, among others,
reads so (comfy/supported_models.py).
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ldm_export.checkpoint.file_fields import FileFields
from ldm_export.detection.features import Tensors
from ldm_runtime.specs.model import PredictionType

_LOGGER = logging.getLogger(__name__)

_PREDICTION_TYPES: Mapping[str, PredictionType] = MappingProxyType(
    {"epsilon": "epsilon", "v": "v_prediction"}
)
_PREDICTION_KEY, _SIZE_KEY = "modelspec.prediction_type", "modelspec.resolution"
_V_MARKER, _ZERO_SNR_MARKER = "v_pred", "ztsnr"
_SHOWN = 40  # characters of an untrusted value
_MOST_PIXELS = 4096  # per side; four times what SDXL is trained for


@dataclass(frozen=True, kw_only=True)
class MetadataFields:
    """The features that metadata states; None where it says nothing.

    It is untrusted text, which tools copy from model to model: a hint, behind all that a file holds
    and a measurement.

    Attributes:
        prediction_type: Prediction target of the UNet.
        height: Height in pixels that the model is meant for …
        width: … and width, neither of which need be one that it can generate.
    """

    prediction_type: PredictionType | None = None
    height: int | None = None
    width: int | None = None


def metadata_fields(metadata: Mapping[str, str]) -> MetadataFields:
    """Return what the metadata of a checkpoint says.

    A value that the standard does not know, or that no model has, is a warning.
    """
    width, height = _size(metadata)
    return MetadataFields(prediction_type=_stated_prediction(metadata), height=height, width=width)


def file_fields(
    tensors: Tensors, metadata: MetadataFields, stated: FileFields | None = None
) -> FileFields:
    """Return what the marker tensors of a checkpoint say, and its other files.

    A marker that metadata contradicts is a warning.

    Args:
        tensors: The checkpoint's.
        metadata: What its metadata says.
        stated: What the configuration files next to its weights say.
    """
    stated = stated or FileFields()
    return replace(
        stated,
        prediction_type=_marked_prediction(tensors, metadata) or stated.prediction_type,
        zero_terminal_snr=_ZERO_SNR_MARKER in tensors or stated.zero_terminal_snr,
    )


def _marked_prediction(tensors: Tensors, metadata: MetadataFields) -> PredictionType | None:
    if _V_MARKER not in tensors:
        return None
    if metadata.prediction_type not in {None, "v_prediction"}:
        _LOGGER.warning(
            "the file has the tensor %s, which marks v_prediction, but its metadata says %s = %s; "
            "going by the tensor, unless --prediction-type says otherwise",
            _V_MARKER,
            _PREDICTION_KEY,
            metadata.prediction_type,
        )
    return "v_prediction"


def _stated_prediction(metadata: Mapping[str, str]) -> PredictionType | None:
    value = metadata.get(_PREDICTION_KEY)
    stated = None if value is None else _PREDICTION_TYPES.get(value)
    if value is not None and stated is None:
        _warn(_PREDICTION_KEY, value, "v or epsilon")
    return stated


def _size(metadata: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Return width and height in pixels."""
    value = metadata.get(_SIZE_KEY)
    if value is None:
        return None, None
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", value, re.ASCII)
    sides = (0, 0) if match is None else (int(match[1]), int(match[2]))
    if not 0 < max(sides) <= _MOST_PIXELS:
        _warn(
            _SIZE_KEY,
            value,
            f"width x height in pixels, at most {_MOST_PIXELS} each, such as 512x512,",
        )
        return None, None
    return sides


def _warn(key: str, value: str, expected: str) -> None:
    shown = value[:_SHOWN] + "…" * (len(value) > _SHOWN)
    _LOGGER.warning("ignoring %s = %a of the file; %s was expected", key, shown, expected)
