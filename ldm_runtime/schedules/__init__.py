"""Noise schedules: from a checkpoint's `alphas_cumprod` to the sigmas a sampler visits.

A sigma is the noise level of latents = x0 + sigma * noise. The training schedule is a table of
increasing sigmas, indexed by the training timestep. Everything is computed in float64, and samplers
get plain Python floats: since NumPy 2, a float32 array times an `np.float64` is
float64, while times a Python float it stays float32.

The sigmas of a run decrease strictly, except those of `ldm_quadratic`, which repeats some as LDM
does; and there are as many as asked for, except with `ldm`, which makes more steps as LDM does. The
schedules of distilled models (`consistency`, `turbo`, `from_800`, `from_399`) end at few.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, get_args

from ldm_runtime.schedules.edm import edm_sigmas, edm_timestep
from ldm_runtime.schedules.ramps import exponential, karras, polyexponential
from ldm_runtime.schedules.tables import (
    SigmaTable,
    earlier_sigma,
    rescale_zero_terminal_snr,
    steps_until,
    timestep_at,
    timestep_of,
    training_sigmas,
    without_infinite_noise,
)
from ldm_runtime.schedules.timesteps import (
    beta,
    consistency,
    from_399,
    from_800,
    ldm,
    ldm_quadratic,
    leading,
    linspace,
    quadratic,
    sgm_uniform,
    trailing,
    turbo,
)

__all__ = [
    "BY_SIGMA",
    "SCHEDULES",
    "FinalSigma",
    "Schedule",
    "SigmaTable",
    "custom_sigmas",
    "earlier_sigma",
    "edm_sigmas",
    "edm_timestep",
    "initial_scale",
    "most_steps",
    "rescale_zero_terminal_snr",
    "sampling_sigmas",
    "steps_until",
    "timestep_at",
    "timestep_of",
    "training_sigmas",
    "without_infinite_noise",
]

#: From the training sigmas and a number of steps to that many decreasing sigmas, without the end.
Schedule = Callable[[SigmaTable, int], list[float]]
#: Where the last step leads: "zero", or "smallest" for the first of the training sigmas.
FinalSigma = Literal["zero", "smallest"]

SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        "leading": leading,
        "trailing": trailing,
        "linspace": linspace,
        "quadratic": quadratic,
        "ldm": ldm,
        "ldm_quadratic": ldm_quadratic,
        "karras": karras,
        "exponential": exponential,
        "polyexponential": polyexponential,
        "sgm_uniform": sgm_uniform,
        "beta": beta,
        "consistency": consistency,
        "turbo": turbo,
        "from_800": from_800,
        "from_399": from_399,
    }
)

#: The schedules that go by sigma alone; the others visit training timesteps.
BY_SIGMA = ("karras", "exponential", "polyexponential")

_MAY_REPEAT = "ldm_quadratic"
# Those whose source starts from noise of unit variance divided by the scale of the latents.
_UNIT_VARIANCE = {
    *("leading", "quadratic", "ldm", "ldm_quadratic", "sgm_uniform", "beta"),
    *("consistency", "turbo", "from_800", "from_399"),
}


def sampling_sigmas(
    training_sigmas: SigmaTable, num_steps: int, schedule: str, final_sigma: FinalSigma
) -> list[float]:
    """Return the sigmas of a run, one more than its steps.

    Args:
        training_sigmas: From the function of that name.
        num_steps: Steps, from 1 to the length of the training schedule.
        schedule: Name in `SCHEDULES`.
        final_sigma: "smallest" ends at `training_sigmas[0]`, as LDM's DDIM does (it ends at
            `alphas_cumprod[0]`), and "zero" at 0. A schedule that visits the smallest sigma
            itself always ends at 0, because a step from there to there is none.

    Raises:
        ValueError: An argument is out of range, there is no such name, or the schedule cannot
            make that many steps.
    """
    _check_schedule(schedule)
    if final_sigma not in get_args(FinalSigma):
        raise ValueError(f"unknown final sigma {final_sigma!r}; choose zero or smallest")
    if not 1 <= num_steps <= len(training_sigmas):
        raise ValueError(
            f"{num_steps} steps are impossible; this model can make 1 to {len(training_sigmas)}"
        )
    if (most := most_steps(training_sigmas, num_steps, schedule)) < num_steps:
        raise ValueError(
            f"the schedule {schedule} would visit a timestep twice in {num_steps} steps; with "
            f"this model it can make up to {most}"
        )
    sigmas = SCHEDULES[schedule](training_sigmas, num_steps)
    smallest = float(training_sigmas[0])
    ends_above = final_sigma == "smallest" and sigmas[-1] > smallest
    return [*sigmas, smallest if ends_above else 0.0]


def most_steps(training_sigmas: SigmaTable, num_steps: int, schedule: str) -> int:
    """Return `num_steps`, or the most below it in which a schedule visits no timestep twice.

    Args:
        training_sigmas: From the function of that name.
        num_steps: Steps, from 1 to the length of the training schedule.
        schedule: Name in `SCHEDULES`.

    Raises:
        ValueError: There is no such schedule, or it cannot make that many steps.
    """
    _check_schedule(schedule)

    def is_too_many(steps: int) -> bool:
        return _repeats(SCHEDULES[schedule](training_sigmas, steps))

    if schedule == _MAY_REPEAT or not is_too_many(num_steps):
        return num_steps
    return bisect_left(range(1, num_steps), True, key=is_too_many)  # more steps repeat more


def custom_sigmas(values: Sequence[float]) -> list[float]:
    """Return a user's list of sigmas as a run needs them, with 0 at its end.

    Raises:
        ValueError: A value is not finite or not above 0 (the last may be 0), the values do not
            decrease, or there is none above 0.
    """
    sigmas = [float(value) for value in values]
    if sigmas and sigmas[-1] == 0:
        sigmas.pop()
    if not sigmas:
        raise ValueError("sigmas needs at least one value above 0, such as [14.6, 3.2, 0.6]")
    for index, sigma in enumerate(sigmas):
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ValueError(
                f"sigmas[{index}] is {sigma}, but every value must be finite and above 0; only the "
                "last may be 0"
            )
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas), start=1):
        if sigma_next >= sigma:
            raise ValueError(
                f"sigmas must decrease, but value {index} is {sigma_next} after {sigma}"
            )
    return [*sigmas, 0.0]


def initial_scale(sigmas: Sequence[float], schedule: str) -> float:
    """Return the factor that turns standard normal noise into the first latents.

    "leading", "quadratic" and LDM's start below the last timestep, from latents that have unit
    variance once divided by sqrt(1 + sigma^2), as LDM and diffusers do; so do sgm and ComfyUI with
    "sgm_uniform", "beta" and "turbo", and diffusers with the others of distilled models. The rest
    start at the largest sigma as k-diffusion and diffusers' Euler do. (diffusers' DDIM and
    DPM-Solver use the former always.)

    Args:
        sigmas: From `sampling_sigmas`.
        schedule: Name in `SCHEDULES`.

    Raises:
        ValueError: There is no such schedule.
    """
    _check_schedule(schedule)
    return math.hypot(1.0, sigmas[0]) if schedule in _UNIT_VARIANCE else sigmas[0]


def _check_schedule(schedule: str) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")


def _repeats(sigmas: Sequence[float]) -> bool:
    return any(sigma <= sigma_next for sigma, sigma_next in pairwise(sigmas))
