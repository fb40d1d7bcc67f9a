"""Quantiles of the Beta distribution with two equal parameters of at most 1."""

import math

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

_TERMS = 64  # the series is used up to x = 1/2, where each term is less than half the one before
_MOST_NEWTON_STEPS = 50  # 5 are enough at a parameter of 0.6, some 40 at 0.01
_SMALLEST_STEP = 1e-15  # the next would be its square


def beta_quantiles(probabilities: Float64Array, shape: float) -> Float64Array:
    """Return x with I_x(shape, shape) = probability: to 1e-15, and to 1e-13 of itself below 1/2.

    The distribution is symmetric, so it is solved for the lower half. There
    I_x(a, a) = x^a / B(a, a) * sum over n of (1 - a)_n / (n! (a + n)) x^n, which in z = x^a is a
    convex function without the infinite slope at 0; Newton's method from the right of the root
    approaches it from that side. Source: NIST DLMF 8.17.7 and 8.17.4.

    Args:
        probabilities: Between 0 and 1.
        shape: Both parameters of the distribution, above 0 and at most 1.
    """
    lower = np.minimum(probabilities, 1 - probabilities)
    area = math.gamma(shape) ** 2 / math.gamma(2 * shape)  # B(shape, shape)
    series = _series(shape)
    z = np.minimum(lower * shape * area, 0.5**shape)  # from the first term, which is too little
    for _ in range(_MOST_NEWTON_STEPS):
        x = z ** (1 / shape)
        excess = z * np.polynomial.polynomial.polyval(x, series) / area - lower
        step = excess * shape * area * (1 - x) ** (1 - shape)
        z = z - step
        if np.all(np.abs(step) < _SMALLEST_STEP):
            break
    x = z ** (1 / shape)
    x = np.where(probabilities == 0.5, 0.5, x)  # exactly, because what is asked of it is a tie
    return np.where(probabilities <= 0.5, x, 1 - x)


def _series(shape: float) -> Float64Array:
    """The coefficients of x^n in the sum."""
    rising = np.cumprod([1.0, *((n - shape) / n for n in range(1, _TERMS))])
    return rising / (shape + np.arange(_TERMS))
