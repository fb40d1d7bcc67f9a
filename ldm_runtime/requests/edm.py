"""The part of a request that EDM leaves no choice in: its models have no training timesteps."""

from ldm_runtime.errors import RequestError
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.samplers import SAMPLERS, SamplerRecord
from ldm_runtime.schedules import BY_SIGMA
from ldm_runtime.specs.model import ModelSpec

_NONE = "of which this bundle has none: it is of EDM, trained on a range of noise levels"


def default_schedule(record: SamplerRecord, spec: ModelSpec) -> str:
    """Return the schedule of a sampler that a request with no schedule has.

    It is the model's for the model's own sampler, and the sampler's for others. Of EDM it is the
    model's for every sampler, or that of Karras et al. 2022 (arXiv:2206.00364).
    """
    defaults = spec.defaults
    if spec.edm is not None:
        return defaults.schedule or "karras"
    own = defaults.schedule if record is SAMPLERS[defaults.sampler] else None
    return own or record.schedule


def check_schedule(schedule: str, spec: ModelSpec) -> None:
    """Check that a model has the timesteps that a schedule visits.

    Raises:
        RequestError: It has none.
    """
    if spec.edm is not None and schedule not in BY_SIGMA:
        raise RequestError(
            "schedule",
            f"{schedule!r} visits training timesteps, {_NONE}; choose {_listed(BY_SIGMA)}",
        )


def check_timesteps(request: GenerationRequest, sampler: str, spec: ModelSpec) -> None:
    """Check that a request asks for nothing of training timesteps where a model has none.

    Args:
        request: The request.
        sampler: Its sampler, or that of the model.
        spec: The model.

    Raises:
        RequestError: It does.
    """
    if spec.edm is None:
        return
    if SAMPLERS[sampler].goes_by_timestep:
        usable = [name for name, each in SAMPLERS.items() if not each.goes_by_timestep]
        raise RequestError(
            "sampler", f"{sampler!r} goes by training timesteps, {_NONE}; choose {_listed(usable)}"
        )
    if request.zero_terminal_snr:
        raise RequestError(
            "zero_terminal_snr", f"rescales the noise of training timesteps, {_NONE}; leave it out"
        )


def _listed(names: list[str] | tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
