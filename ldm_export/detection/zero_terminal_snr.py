"""Whether a model was trained down to nothing but noise, which its noise schedule need not show.

Source: Lin et al. 2023 (arXiv:2305.08891); from nothing but noise only v can be predicted.
"""

import logging

from ldm_export.detection.overrides import Sources, first_stated
from ldm_export.errors import ExportError
from ldm_runtime.specs.model import PredictionType

_LOGGER = logging.getLogger(__name__)

_PLACES = {"flag": "--zero-terminal-snr", "config": "config: sampling.zero_terminal_snr"}


def source_of_zero_snr(sources: Sources, prediction_type: PredictionType) -> str | None:
    """Return who says that the last training timestep was nothing but noise; None if no one does.

    Raises:
        ExportError: The flag or the configuration says so of a model that does not predict v. A
            mark of the file is only a warning there: tools copy marks from model to model.
    """
    source = _source(sources)
    if source is None or prediction_type == "v_prediction":
        return source
    if source in _PLACES:
        raise ExportError(
            f"{_PLACES[source]} is for models that predict v, and this one predicts "
            f"{prediction_type}; leave it out, or give --prediction-type v_prediction with it"
        )
    _LOGGER.warning(
        "the file is marked ztsnr (rescale_betas_zero_snr), trained down to nothing but noise, "
        "which only v_prediction can be; its prediction_type is %s, so the mark is ignored",
        prediction_type,
    )
    return None


def is_zero_snr_stated(sources: Sources) -> bool:
    """Return whether anyone says that the last training timestep was nothing but noise."""
    return _source(sources) is not None


def is_zero_snr_asked_for(sources: Sources) -> bool:
    """Return whether the user says so, by the flag or the configuration."""
    return _source(sources) in _PLACES


def check_no_zero_snr(sources: Sources) -> None:
    """Check that no one asks a model of EDM, which has no training timesteps, for it.

    Raises:
        ExportError: The flag or the configuration does.
    """
    place = _PLACES.get(_source(sources) or "")
    if place is not None:
        raise ExportError(
            f"{place} rescales the noise of training timesteps, and a model of EDM has none; leave "
            "it out"
        )


def _source(sources: Sources) -> str | None:
    stated, note = first_stated(
        "alphas_cumprod",
        sources.flags.zero_terminal_snr,
        sources.config.sampling.zero_terminal_snr,
        family=False,
        file=sources.file.zero_terminal_snr or None,
    )
    return note.source if stated else None
