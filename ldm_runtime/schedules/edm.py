"""Noise levels of EDM, whose models are trained on a continuous range of them."""

import math

import numpy as np

from ldm_runtime.schedules.tables import SigmaTable

_LEVELS = 1000


def edm_sigmas(sigma_min: float, sigma_max: float) -> SigmaTable:
    """Return 1000 noise levels, evenly spaced in their logarithm from the lowest to the highest.

    They take the place of training sigmas where a share of the noise schedule is asked for: shares
    are of the range of log sigma, as in ComfyUI's `ModelSamplingContinuousEDM`. Schedules that go
    by sigma use their ends alone, which are not rounded.

    Args:
        sigma_min: Above 0.
        sigma_max: Above `sigma_min`.
    """
    return np.geomspace(sigma_min, sigma_max, _LEVELS, dtype=np.float64)


def edm_timestep(sigma: float) -> float:
    """Return what a UNet of EDM is told in place of a training timestep: a quarter of log sigma.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1, c_noise.
    """
    return math.log(sigma) / 4
