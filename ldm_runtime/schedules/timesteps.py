"""Schedules that choose training timesteps, most of them whole ones.

Each function maps the training sigmas and a number of steps to the sigmas to visit, without the
end: plain floats, decreasing.
"""

import math
from collections.abc import Sequence

import numpy as np

from ldm_runtime.schedules.beta_quantiles import beta_quantiles
from ldm_runtime.schedules.tables import SigmaTable

_QUADRATIC_REACH = 0.8  # of the training schedule, as in LDM
_BETA_SHAPE = 0.6
_DISTILLED = 50  # timesteps of a consistency model
_TURBO_PARTS = 10  # of the training schedule, one per step of a Turbo model


def leading(training_sigmas: SigmaTable, num_steps: int) -> list[float]:
    """Visit every k-th timestep from 1 up, k = len(training_sigmas) // num_steps, backwards.

    This is LDM's DDIM (`ldm`) and diffusers' "leading" with `steps_offset` 1, except that it
    always makes `num_steps` steps where LDM makes more when they do not divide the training
    schedule, and that a step for every timestep starts at 0 where both run off the table.

    Source: Song et al. 2021 (arXiv:2010.02502), appendix D.2, "linear".
    """
    stride = len(training_sigmas) // num_steps
    return _lifted(training_sigmas, [i * stride for i in range(num_steps)])


def ldm(training_sigmas: SigmaTable, num_steps: int) -> list[float]:
    """Visit the timesteps of LDM's DDIM and PLMS samplers, with their mistakes.

    These are 1, 1 + k, 1 + 2 k, ... as far as the table goes, k = len(training_sigmas) //
    num_steps. So 75 steps of 1000 timesteps are 77, and 3, 9, 27, 36, 37, 101 to 111, 251 to 333
    and more than 500 steps ask for timestep 1000, which does not exist.

    Source: `make_ddim_timesteps` in LDM's ldm/modules/diffusionmodules/util.py, "uniform".

    Raises:
        ValueError: LDM would run off the table.
    """
    length = len(training_sigmas)
    return _as_ldm(training_sigmas, range(0, length, length // num_steps), "leading")


def quadratic(training_sigmas: SigmaTable, num_steps: int) -> list[float]:
    """Visit timesteps that grow as a square up to 0.8 of the schedule, none of them twice.

    This is LDM's "quad" (`ldm_quadratic`) where that repeats no timestep, which it does from 30
    steps of 1000 timesteps on. Here a timestep that would repeat moves up by one, and those above
    it that meet it as well. A single step starts at the highest, where LDM's starts at the lowest.

    Source: Song et al. 2021 (arXiv:2010.02502), appendix D.2, "quadratic".
    """
    length = len(training_sigmas)
    squares = _squares(length, num_steps) if num_steps > 1 else _squares(length, 2)[-1:]
    order = np.arange(num_steps)
    return _lifted(training_sigmas, (np.maximum.accumulate(squares - order) + order).tolist())


def ldm_quadratic(training_sigmas: SigmaTable, num_steps: int) -> list[float]:
    """Visit the timesteps of LDM's "quad", which may repeat the lowest ones.

    Source: `make_ddim_timesteps` in LDM's ldm/modules/diffusionmodules/util.py, "quad".

    Raises:
        ValueError: LDM would run off the table, which it does for very short ones.
    """
    squares = _squares(len(training_sigmas), num_steps)
    return _as_ldm(training_sigmas, squares.tolist(), "quadratic")


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


def sgm_uniform(training_sigmas: SigmaTable, num_steps: int) -> list[float]:
    """Visit the timesteps of `linspace` with one more step, except the last of them.

    Source: ComfyUI's `normal_scheduler(sgm=True)`, after sgm's LegacyDDPMDiscretization, which cuts
    the timesteps off to whole ones.
    """
    last = len(training_sigmas) - 1
    return [
        _sigma_at(training_sigmas, last * (num_steps - i) / num_steps) for i in range(num_steps)
    ]


def beta(training_sigmas: SigmaTable, num_steps: int) -> list[float]:
    """Visit timesteps at even quantiles of a Beta(0.6, 0.6) distribution: denser at both ends.

    Timesteps are rounded to whole ones and so repeat when there are many; `sampling_sigmas`
    refuses that, where ComfyUI leaves the repetitions out. diffusers' `use_beta_sigmas` spreads
    the sigmas instead of the timesteps, which is another schedule.

    Source: Lee et al. 2024 (arXiv:2407.12173), with the parameters and the rounding of ComfyUI's
    `beta_scheduler`.
    """
    probabilities = 1 - np.linspace(0, 1, num_steps, endpoint=False)
    quantiles = beta_quantiles(probabilities, _BETA_SHAPE)
    timesteps = np.rint(quantiles * (len(training_sigmas) - 1)).astype(int)
    return [float(training_sigmas[timestep]) for timestep in timesteps]


def consistency(training_sigmas: SigmaTable, num_steps: int) -> list[float]:
    """Visit an even choice of the 50 timesteps that consistency models are distilled at.

    These are every k-th timestep from the last one down, k = len(training_sigmas) // 50: 999, 979,
    ..., 19 of 1000, and all of fewer than 50.

    Source: `LCMScheduler` and `TCDScheduler` of diffusers with 50 `original_inference_steps`; Luo
    et al. 2023 (arXiv:2310.04378), section 4.3, for the 50.
    """
    last, count = len(training_sigmas) - 1, min(_DISTILLED, len(training_sigmas))
    stride = len(training_sigmas) // count
    return [
        float(training_sigmas[last - stride * (i * count // num_steps)]) for i in range(num_steps)
    ]


def turbo(training_sigmas: SigmaTable, num_steps: int) -> list[float]:
    """Visit the first of ten timesteps that are a tenth of the training schedule apart.

    So 1 to 4 steps of 1000 timesteps visit 999, 899, 799 and 699, and the last goes all the way.

    Source: `SubstepSampler` in Stability's generative-models 0ad7de9,
    scripts/demo/turbo.py; ComfyUI's `SDTurboScheduler`.
    """
    parts = [_TURBO_PARTS - min(i, _TURBO_PARTS - 1) for i in range(num_steps)]
    length = len(training_sigmas)
    return [float(training_sigmas[length * part // _TURBO_PARTS - 1]) for part in parts]


def from_800(training_sigmas: SigmaTable, num_steps: int) -> list[float]:
    """Visit evenly spaced timesteps from 800 (of 1000) down: for a UNet that starts there.

    Source: the model card of ByteDance/Hyper-SD, 1-step SDXL UNet.
    """
    return _trailing_from(training_sigmas, num_steps, 0.801)


def from_399(training_sigmas: SigmaTable, num_steps: int) -> list[float]:
    """Visit evenly spaced timesteps from 399 (of 1000) down: for a UNet that starts there.

    Source: the model card of tianweiy/DMD2, 1-step UNet.
    """
    return _trailing_from(training_sigmas, num_steps, 0.4)


def _trailing_from(table: SigmaTable, num_steps: int, share: float) -> list[float]:
    """The sigmas at the ends of even steps over the lowest `share` of the training timesteps."""
    count = round(share * len(table))
    ends = [max(round(count * (num_steps - i) / num_steps), 1) for i in range(num_steps)]
    return [float(table[end - 1]) for end in ends]


def _squares(length: int, num_steps: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    roots = np.linspace(0, np.sqrt(length * _QUADRATIC_REACH), num_steps)
    return (roots**2).astype(np.int64)


def _lifted(table: SigmaTable, timesteps: Sequence[int]) -> list[float]:
    """The sigmas one above increasing timesteps, or at them where that is off the table."""
    offset = min(1, len(table) - 1 - timesteps[-1])
    return [float(table[timestep + offset]) for timestep in reversed(timesteps)]


def _as_ldm(table: SigmaTable, timesteps: Sequence[int], instead: str) -> list[float]:
    highest = timesteps[-1] + 1
    if highest >= len(table):
        raise ValueError(
            f"LDM's timesteps do not exist here: its formula asks for timestep {highest}, "
            f"and the last of this model is {len(table) - 1}; choose another number of steps, or "
            f"the schedule {instead}, which has no such gap"
        )
    return [float(table[timestep + 1]) for timestep in reversed(timesteps)]


def _sigma_at(table: SigmaTable, timestep: float) -> float:
    index = math.floor(timestep)
    weight = timestep - index
    if weight == 0:
        return float(table[index])  # exact: exp(log(sigma)) is not
    low, high = math.log(table[index]), math.log(table[index + 1])
    return math.exp(low + weight * (high - low))
