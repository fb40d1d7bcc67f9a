"""Noise schedules: from a checkpoint's `alphas_cumprod` to the sigmas a sampler visits.

A sigma is the noise level of latents = x0 + sigma * noise. The training schedule is a table of
increasing sigmas, indexed by the training timestep. Everything is computed in float64, and what a
sampler gets are plain Python floats: since NumPy 2, a float32 array times an `np.float64` is
float64, while times a Python float it stays float32.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

SigmaTable = npt.NDArray[np.float64]
#: From the training sigmas and a number of steps to that many decreasing sigmas, without the end.
Schedule = Callable[[SigmaTable, int], list[float]]
#: Where the last step leads: "zero", or "smallest" for the first of the training sigmas.
FinalSigma = Literal["zero", "smallest"]

_KARRAS_RHO = 7.0


def training_sigmas(alphas_cumprod: Sequence[float]) -> SigmaTable:
    """Return the noise level sqrt((1 - a) / a) of every training timestep, increasing.

    Raises:
        ValueError: `alphas_cumprod` has fewer than two values, a value outside (0, 1), or does
            not decrease.
    """
    alphas = np.asarray(alphas_cumprod, dtype=np.float64)
    if alphas.ndim != 1 or alphas.size < 2:
        raise ValueError(f"alphas_cumprod must be a list of two or more, got shape {alphas.shape}")
    outside = np.flatnonzero(~((alphas > 0) & (alphas < 1)))
    if outside.size:
        index = int(outside[0])
        raise ValueError(
            f"alphas_cumprod[{index}] is {float(alphas[index])}, but every value must lie between "
            "0 and 1, both excluded"
        )
    rising = np.flatnonzero(np.diff(alphas) >= 0)
    if rising.size:
        index = int(rising[0]) + 1
        raise ValueError(
            f"alphas_cumprod must decrease, but value {index} is {float(alphas[index])} "
            f"after {float(alphas[index - 1])}"
        )
    return np.sqrt((1 - alphas) / alphas)


def leading(training_sigmas: SigmaTable, num_steps: int) -> list[float]:
    """Visit every k-th timestep from 1 up, k = len(training_sigmas) // num_steps, backwards.

    This is CompVis' DDIM and diffusers' "leading" with `steps_offset` 1, except that it always
    makes `num_steps` steps where CompVis makes more when they do not divide the training
    schedule, and that a step for every timestep starts at 0 where both run off the table.

    Source: Song et al. 2021 (arXiv:2010.02502), appendix D.2, "linear".
    """
    stride = len(training_sigmas) // num_steps
    offset = min(1, len(training_sigmas) - 1 - (num_steps - 1) * stride)
    return [float(training_sigmas[i * stride + offset]) for i in reversed(range(num_steps))]


def trailing(training_sigmas: SigmaTable, num_steps: int) -> list[float]:
    """Visit evenly spaced timesteps that start at the last one, rounded to whole ones.

    Source: Lin et al. 2023 (arXiv:2305.08891), table 2.
    """
    length = len(training_sigmas)
    # The ends of the steps as diffusers adds them up: its rounding errors decide ties such as
    # 937.5 of 48 steps, and make one step too many of 61.
    ends = np.round(np.arange(length, 0, -length / num_steps)[:num_steps]).astype(int)
    return [float(training_sigmas[end - 1]) for end in ends]


def linspace(training_sigmas: SigmaTable, num_steps: int) -> list[float]:
    """Visit evenly spaced timesteps from the last to the first, fractions in log sigma.

    A single step starts at the last. Source: k-diffusion's `DiscreteSchedule.get_sigmas`.
    """
    last, gaps = len(training_sigmas) - 1, max(num_steps - 1, 1)
    return [_sigma_at(training_sigmas, last * (gaps - i) / gaps) for i in range(num_steps)]


def karras(training_sigmas: SigmaTable, num_steps: int) -> list[float]:
    """Visit sigmas evenly spaced in sigma ** (1 / 7), from the largest to the smallest.

    Source: Karras et al. 2022 (arXiv:2206.00364), equation 5.
    """
    lowest, highest = float(training_sigmas[0]), float(training_sigmas[-1])
    low, high = lowest ** (1 / _KARRAS_RHO), highest ** (1 / _KARRAS_RHO)
    gaps = max(num_steps - 1, 1)
    inner = [(high + i / gaps * (low - high)) ** _KARRAS_RHO for i in range(1, num_steps - 1)]
    return [highest, *inner, lowest][:num_steps]  # the ends as they are in the table, not rounded


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {"leading": leading, "trailing": trailing, "linspace": linspace, "karras": karras}
)


def sampling_sigmas(
    training_sigmas: SigmaTable, num_steps: int, schedule: str, final_sigma: FinalSigma
) -> list[float]:
    """Return the `num_steps` + 1 strictly decreasing sigmas of a run.

    Args:
        training_sigmas: From the function of that name.
        num_steps: Steps, from 1 to the length of the training schedule.
        schedule: Name in `SCHEDULES`.
        final_sigma: "smallest" ends at `training_sigmas[0]`, as LDM's DDIM does (it ends at
            `alphas_cumprod[0]`), and "zero" at 0. A schedule that visits the smallest sigma
            itself always ends at 0, because a step from there to there is none.

    Raises:
        ValueError: An argument is out of range or no such name.
    """
    _check_schedule(schedule)
    if final_sigma not in get_args(FinalSigma):
        raise ValueError(f"unknown final sigma {final_sigma!r}; choose zero or smallest")
    if not 1 <= num_steps <= len(training_sigmas):
        raise ValueError(
            f"{num_steps} steps are impossible; this model can make 1 to {len(training_sigmas)}"
        )
    sigmas = SCHEDULES[schedule](training_sigmas, num_steps)
    smallest = float(training_sigmas[0])
    ends_above = final_sigma == "smallest" and sigmas[-1] > smallest
    return [*sigmas, smallest if ends_above else 0.0]


def initial_scale(sigmas: Sequence[float], schedule: str) -> float:
    """Return what standard normal noise is multiplied with to become the first latents.

    "leading" starts below the last timestep, from latents that have unit variance once divided by
    sqrt(1 + sigma^2), as CompVis and diffusers do. The others start at the largest sigma as
    k-diffusion and diffusers' Euler do. (diffusers' DDIM and DPM-Solver use the former always.)

    Args:
        sigmas: From `sampling_sigmas`.
        schedule: Name in `SCHEDULES`.

    Raises:
        ValueError: There is no such schedule.
    """
    _check_schedule(schedule)
    return math.hypot(1.0, sigmas[0]) if schedule == "leading" else sigmas[0]


def _check_schedule(schedule: str) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")


def _sigma_at(table: SigmaTable, timestep: float) -> float:
    index = math.floor(timestep)
    weight = timestep - index
    if weight == 0:
        return float(table[index])  # exact: exp(log(sigma)) is not
    low, high = math.log(table[index]), math.log(table[index + 1])
    return math.exp(low + weight * (high - low))
