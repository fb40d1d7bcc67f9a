"""Multistep samplers: one denoiser call per step, and slopes remembered from the steps before.

They differ in the polynomial through the slopes. `plms` and `ipndm` take it as if all steps were
equally long; `lms` in sigma and `deis` in log sigma, as long as they are. All start from nothing
remembered with a step of low order, which is what the order of a whole run comes from.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ldm_runtime.samplers.contract import Denoise, Latents, NoiseSampler, SamplerRecord
from ldm_runtime.samplers.first_order import slope_at

FloatArray = npt.NDArray[np.float64]
_Slope = tuple[float, Latents]  # with the place on its polynomial's axis, a sigma or its logarithm

#: Adams-Bashforth weights by the number of slopes known, the newest first.
_EQUAL_STEPS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
_LMS_ORDER, _DEIS_ORDER = 4, 3
_NODES = 16  # of Gauss-Legendre: exact for `lms`, below rounding for steps of `deis` up to e ** 10


def plms(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Adams-Bashforth steps of order 4, started with the mean of the slopes at both ends.

    The start makes one denoiser call more than there are steps, except for a run of one step.

    Source: Liu et al. 2022 (arXiv:2202.09778), equations 9 and 12; CompVis' PLMSSampler, which
    starts with one improved Euler step in place of three Runge-Kutta steps.
    """
    slopes: list[Latents] = []
    for sigma, sigma_next in pairwise(sigmas):
        slopes = [slope_at(denoise, latents, sigma), *slopes[:3]]
        slope = _combine(_EQUAL_STEPS[len(slopes) - 1], slopes)
        if len(slopes) == 1 and len(sigmas) > 2:
            guess = latents + (sigma_next - sigma) * slope
            slope = 0.5 * (slope + slope_at(denoise, guess, sigma_next))
        latents = latents + (sigma_next - sigma) * slope
        yield latents


def ipndm(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Adams-Bashforth steps of order 4, started with those of order 1, 2 and 3.

    Source: Zhang and Chen 2022 (arXiv:2204.13902), iPNDM.
    """
    slopes: list[Latents] = []
    for sigma, sigma_next in pairwise(sigmas):
        slopes = [slope_at(denoise, latents, sigma), *slopes[:3]]
        slope = _combine(_EQUAL_STEPS[len(slopes) - 1], slopes)
        latents = latents + (sigma_next - sigma) * slope
        yield latents


def lms(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Adams-Bashforth steps of order 4 for steps of any length, the polynomial in sigma.

    In hundreds of steps of a schedule that narrows towards its end, such as `karras`, the last
    one, to sigma 0, is a hundred times as long as those before it, and extrapolating a cubic so far
    magnifies the rounding of float32: to about 0.02 in 1,000 steps, as in the source. In 100 steps
    nothing of this is left.

    Source: k-diffusion's `sample_lms`, whose coefficients are integrated numerically.
    """
    known: list[_Slope] = []
    for sigma, sigma_next in pairwise(sigmas):
        known = _remember((sigma, slope_at(denoise, latents, sigma)), known, _LMS_ORDER)
        knots, slopes = zip(*known, strict=True)
        latents = latents + _combine(_integrals(knots, sigma_next, np.ones_like), slopes)
        yield latents


def deis(
    denoise: Denoise,
    latents: Latents,
    sigmas: Sequence[float],
    *,
    eta: float,
    noise_sampler: NoiseSampler,
) -> Iterator[Latents]:
    """Steps of order 3 for steps of any length, the polynomial in log sigma.

    A step to sigma 0 (infinitely far in log sigma) ends at the predicted x0.

    Source: Zhang and Chen 2022 (arXiv:2204.13902), section 3, tAB-DEIS with log rho for t, as
    diffusers has it; rho is sigma.
    """
    known: list[_Slope] = []
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(latents, sigma)
        known = _remember((math.log(sigma), (latents - x0) / sigma), known, _DEIS_ORDER)
        if sigma_next > 0:
            knots, slopes = zip(*known, strict=True)
            latents = latents + _combine(_integrals(knots, math.log(sigma_next), np.exp), slopes)
        else:
            latents = x0
        yield latents


def _remember(newest: _Slope, known: Sequence[_Slope], order: int) -> list[_Slope]:
    """Put a slope first, leaving out what a polynomial of that order has no use for.

    That is also an older slope at the same place: LDM's quadratic timesteps repeat some.
    """
    return [newest, *(slope for slope in known if slope[0] != newest[0])][:order]


def _combine(weights: Sequence[float], slopes: Sequence[Latents]) -> Latents:
    first, *others = (weight * slope for weight, slope in zip(weights, slopes, strict=True))
    return sum(others, start=first)


def _integrals(
    knots: Sequence[float], end: float, density: Callable[[FloatArray], FloatArray]
) -> list[float]:
    """Integrate the Lagrange polynomials of `knots` times `density` from the first knot to `end`.

    Source: Gauss-Legendre quadrature, Abramowitz and Stegun, equation 25.4.30.
    """
    nodes, weights = _gauss_legendre(_NODES)
    half = (end - knots[0]) / 2
    points = knots[0] + half * (nodes + 1)
    weights = half * weights * density(points)
    return [
        float(np.sum(weights * _lagrange(knot, [k for k in knots if k != knot], points)))
        for knot in knots
    ]


@cache
def _gauss_legendre(count: int) -> tuple[FloatArray, FloatArray]:
    return np.polynomial.legendre.leggauss(count)


def _lagrange(knot: float, others: Sequence[float], points: FloatArray) -> FloatArray:
    """The polynomial that is 1 at `knot` and 0 at `others`, at some points."""
    factors = [(points - other) / (knot - other) for other in others]
    return np.prod(factors, axis=0) if factors else np.ones_like(points)


RECORDS = {
    "plms": SamplerRecord(
        function=plms,
        source="Liu et al. 2022 (arXiv:2202.09778); CompVis, PLMSSampler",
        order=2,
        final_sigma="smallest",
    ),
    "lms": SamplerRecord(function=lms, source="k-diffusion, sample_lms", order=2),
    "ipndm": SamplerRecord(
        function=ipndm, source="Zhang and Chen 2022 (arXiv:2204.13902), iPNDM", order=2
    ),
    "deis": SamplerRecord(
        function=deis,
        source="Zhang and Chen 2022 (arXiv:2204.13902), tAB-DEIS in log rho",
        order=2,
        final_sigma="smallest",
    ),
}
