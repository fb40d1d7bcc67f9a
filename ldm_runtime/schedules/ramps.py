"""Schedules that go evenly from the largest to the smallest sigma in some function of it.

Each function maps the training sigmas and a number of steps to the sigmas to visit, without the
end. The first and the last are those of the table, not rounded; a single step starts at the first.
"""

import math
from collections.abc import Callable

from ldm_runtime.schedules.tables import SigmaTable

_KARRAS_RHO = 7.0


def karras(training_sigmas: SigmaTable, num_steps: int, rho: float = _KARRAS_RHO) -> list[float]:
    """Visit sigmas evenly spaced in sigma ** (1 / rho).

    Source: Karras et al. 2022 (arXiv:2206.00364), equation 5.
    """
    low, high = (float(training_sigmas[end]) ** (1 / rho) for end in (0, -1))
    return _ramp(training_sigmas, num_steps, lambda x: (high + x * (low - high)) ** rho)


def polyexponential(training_sigmas: SigmaTable, num_steps: int, rho: float = 1.0) -> list[float]:
    """Visit sigmas whose logarithm falls as a power `rho` of the remaining steps.

    Source: k-diffusion's `get_sigmas_polyexponential`, whose default of 1 makes it `exponential`.
    """
    low, high = (math.log(training_sigmas[end]) for end in (0, -1))
    return _ramp(
        training_sigmas, num_steps, lambda x: math.exp((1 - x) ** rho * (high - low) + low)
    )


def exponential(training_sigmas: SigmaTable, num_steps: int) -> list[float]:
    """Visit sigmas evenly spaced in their logarithm.

    Source: k-diffusion's `get_sigmas_exponential`.
    """
    return polyexponential(training_sigmas, num_steps)


def _ramp(table: SigmaTable, num_steps: int, sigma: Callable[[float], float]) -> list[float]:
    gaps = num_steps - 1
    inner = [sigma(i / gaps) for i in range(1, gaps)]
    return [float(table[-1]), *inner, float(table[0])][:num_steps]
