"""Fréchet distance on random convolutional features: how far one set of images is from another.

The features are those of a small network with fixed random weights, which have seen no images at
all: what differs in edges, colours or how much of an image is covered differs in them. Random
networks rank sets of images soundly where a trained one is out of its domain (Naeem et al. 2020,
arXiv:2002.09797, section 4). A distance compares only with distances from this file, between sets
of the same size: the fewer images, the farther two sets of the same kind are apart.
"""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ldm_runtime.noise import TorchCpuGenerator

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

#: Filters of each layer; a layer halves height and width.
CHANNELS = (8, 16, 24)
#: Each filter gives its mean and its standard deviation over an image.
FEATURES = 2 * sum(CHANNELS)
_WEIGHTS_SEED = 0
_LEAK = np.float32(0.2)  # slope below zero
_SIDE = 3  # pixels of a filter


@dataclass(frozen=True, kw_only=True, eq=False)
class Gaussian:
    """A normal distribution over d features.

    Attributes:
        mean: (d,) float64.
        covariance: (d, d) float64.
    """

    mean: Float64Array
    covariance: Float64Array


def distance(first: Gaussian, second: Gaussian) -> float:
    """Return the squared Fréchet distance, 0 or more; either may be singular.

    It is |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)). The trace of that root is the sum of the
    singular values of S1^(1/2) S2^(1/2), which takes roots of symmetric matrices only.

    Source: Dowson and Landau 1982, "The Fréchet distance between multivariate normal
    distributions", equation 4.
    """
    shift = first.mean - second.mean
    common = np.linalg.norm(_root(first.covariance) @ _root(second.covariance), "nuc")
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * common
    return max(float(shift @ shift + spread), 0.0)  # rounding may fall below 0


def fit(features: Float64Array) -> Gaussian:
    """Return the normal distribution with the mean and covariance of features (N, d).

    Raises:
        ValueError: There are fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance takes at least 2 images, got {len(features)}")
    covariance = np.cov(features, rowvar=False).reshape(features.shape[1], features.shape[1])
    return Gaussian(mean=features.mean(axis=0), covariance=covariance)


def features_of(images: npt.NDArray[np.uint8]) -> Float64Array:
    """Return (N, FEATURES) features of RGB images (N, H, W, 3)."""
    hidden = images.astype(np.float32) / np.float32(127.5) - np.float32(1)
    found = []
    for weights in _weights():
        hidden = _convolve(hidden, weights)
        hidden = np.maximum(hidden, _LEAK * hidden)
        found += [hidden.mean(axis=(1, 2)), hidden.std(axis=(1, 2))]
    return np.concatenate(found, axis=1).astype(np.float64)


def _convolve(images: Float32Array, weights: Float32Array) -> Float32Array:
    """Correlate (N, H, W, C) with filters (9 C, D) at every second pixel, zeros around."""
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [
        padded[:, row : row + height : 2, column : column + width : 2]
        for row in range(_SIDE)
        for column in range(_SIDE)
    ]
    result: Float32Array = np.concatenate(patches, axis=-1) @ weights
    return result


@functools.cache
def _weights() -> tuple[Float32Array, ...]:
    """Sample the filters: normal, with the variance that keeps the signal's size.

    Source: He et al. 2015 (arXiv:1502.01852), equation 10.
    """
    generator = TorchCpuGenerator(_WEIGHTS_SEED)
    inputs = (3, *CHANNELS[:-1])
    taps = [_SIDE**2 * count for count in inputs]
    return tuple(
        generator.randn((count, filters)) * np.float32((2 / count) ** 0.5)
        for count, filters in zip(taps, CHANNELS, strict=True)
    )


def _root(matrix: Float64Array) -> Float64Array:
    """Return the symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    root: Float64Array = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root
