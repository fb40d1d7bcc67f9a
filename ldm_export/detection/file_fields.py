"""The features that a checkpoint states about itself: markers, metadata, and its folder's files.

Sources: the ModelSpec standard (Stability-AI/ModelSpec, 02f6279) for the metadata of safetensors
files; `v_pred` and `ztsnr` are empty tensors that trainers add, and that ComfyUI, among others,
reads so (comfy/supported_models.py).
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
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


def file_fields(
    tensors: Tensors, metadata: Mapping[str, str], stated: FileFields | None = None
) -> FileFields:
    """Return what the marker tensors and the metadata of a checkpoint say, and its other files.

    Metadata is untrusted text; a value that the standard does not know is a warning, and so is one
    that a marker contradicts, since tools copy metadata from model to model.

    Args:
        tensors: The checkpoint's.
        metadata: Its own.
        stated: What the configuration files next to its weights say.
    """
    stated = stated or FileFields()
    width, height = _size(metadata)
    return replace(
        stated,
        prediction_type=_prediction_type(tensors, metadata) or stated.prediction_type,
        zero_terminal_snr=_ZERO_SNR_MARKER in tensors or stated.zero_terminal_snr,
        height=height or stated.height,
        width=width or stated.width,
    )


def _prediction_type(tensors: Tensors, metadata: Mapping[str, str]) -> PredictionType | None:
    value = metadata.get(_PREDICTION_KEY)
    stated = None if value is None else _PREDICTION_TYPES.get(value)
    if value is not None and stated is None:
        _warn(_PREDICTION_KEY, value, "v or epsilon")
    if _V_MARKER not in tensors:
        return stated
    if stated not in {None, "v_prediction"}:
        _LOGGER.warning(
            "the file has the tensor %s, which marks v_prediction, but its metadata says %s = %s; "
            "going by the tensor, unless --prediction-type says otherwise",
            _V_MARKER,
            _PREDICTION_KEY,
            stated,
        )
    return "v_prediction"


def _size(metadata: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Return width and height in pixels."""
    value = metadata.get(_SIZE_KEY)
    if value is None:
        return None, None
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", value, re.ASCII)
    if match is None:
        _warn(_SIZE_KEY, value, "width x height in pixels, such as 512x512,")
        return None, None
    return int(match[1]), int(match[2])


def _warn(key: str, value: str, expected: str) -> None:
    shown = value[:_SHOWN] + "…" * (len(value) > _SHOWN)
    _LOGGER.warning("ignoring %s = %a of the file; %s was expected", key, shown, expected)
