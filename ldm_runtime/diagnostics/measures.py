"""Error measures between two arrays, in which a bundle's bounds are given."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_runtime.errors import BundleError

Array = npt.NDArray[Any]


def max_relative_error(actual: Array, expected: Array) -> float:
    """Return the largest absolute difference over the largest absolute expected value."""
    difference, scale = _difference(actual, expected), np.abs(expected.astype(np.float64))
    return _ratio(float(np.abs(difference).max()), float(scale.max()))


def relative_l2(actual: Array, expected: Array) -> float:
    """Return the Euclidean norm of the difference over that of what was expected."""
    difference = _difference(actual, expected)
    return _ratio(
        float(np.linalg.norm(difference)),
        float(np.linalg.norm(expected.astype(np.float64).ravel())),
    )


def psnr(actual: Array, expected: Array) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images in decibels; equal is infinite."""
    mean_square = float(np.square(_difference(actual, expected)).mean())
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


def _difference(actual: Array, expected: Array) -> npt.NDArray[np.float64]:
    if actual.shape != expected.shape:
        raise BundleError(
            f"golden output has shape {expected.shape}, this bundle produced {actual.shape}; "
            "export the bundle again"
        )
    return (actual.astype(np.float64) - expected).ravel()


def _ratio(difference: float, scale: float) -> float:
    if scale == 0:
        return math.inf if difference else 0.0
    return difference / scale
