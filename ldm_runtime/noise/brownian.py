"""A Brownian path over sigma: noise that depends on the seed and the noise levels alone.

A sampler that takes its noise from such a path follows the same random curve whatever its number of
steps, so that more steps refine an image instead of making another one. The path is virtual: it
is never stored, every point of it can be computed at any time and in any order, bit for bit.

W(0) is 0 and W(2**14) is sampled. A stretch of the path whose ends are known is bisected: the
middle is the mean of the ends plus normal noise of a quarter of the stretch's length as variance,
as the Brownian bridge has it. The stretches are the nodes of a binary tree, and each samples its
noise from Philox with the seed as key and its number as counter, so no sample depends on another.
Below `RESOLUTION` the path is straight, which takes less than RESOLUTION / length of the variance
from the increment over a stretch.

Cost: up to 36 bisections for the first point and, since the stretches that lead to the last point
are kept, about 20 for the next point of a run. At (1, 4, 64, 64) a bisection takes 0.25 ms on one
core of a server, so an increment takes 5 ms, the first one 14, and a path keeps at most 5.5 MB.

Source: the Brownian bridge is textbook; "virtual Brownian tree": Li et al. 2020
(arXiv:2001.01328), section 4. k-diffusion's `BrownianTreeNoiseSampler` has the same purpose and
other numbers (its increments also have the other sign, which makes no difference to their law).
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LARGEST_SIGMA = 2.0**14
RESOLUTION = 2.0**-22

_END_NODE = 0  # samples W(LARGEST_SIGMA); the nodes of the tree count from 1
_RECENT = 3  # dpmpp_sde asks for W at three sigmas per step, one of them twice
_KEY_TAG = 0x42524F574E  # keeps the numbers apart from other uses of Philox with the same seed

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Stretch:
    """A part of the path between two known points, and its number in the tree."""

    node: int
    low: float
    high: float
    at_low: Float64Array
    at_high: Float64Array

    def holds(self, sigma: float) -> bool:
        return self.low <= sigma < self.high

    @property
    def length(self) -> float:
        return self.high - self.low


class BrownianPath:
    """One Brownian path over sigma, from 0 to below `LARGEST_SIGMA`.

    Holds the stretches around the last point it computed; not to be shared between threads.

    Raises:
        ValueError: The seed does not fit 64 unsigned bits.
    """

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must lie between 0 and 2**64 - 1, got {seed}")
        self._key = np.array([seed, _KEY_TAG], dtype=np.uint64)
        self._shape = shape
        end = math.sqrt(LARGEST_SIGMA) * self._normal(_END_NODE).astype(np.float64)
        self._stretches = [_Stretch(1, 0.0, LARGEST_SIGMA, np.zeros(shape), end)]
        self._recent: dict[float, Float64Array] = {}

    def __call__(self, sigma: float, sigma_next: float) -> Float32Array:
        """Return (W(sigma) - W(sigma_next)) / sqrt(sigma - sigma_next), standard normal.

        Raises:
            ValueError: Not `LARGEST_SIGMA` > sigma > sigma_next >= 0.
        """
        if not LARGEST_SIGMA > sigma > sigma_next >= 0:
            raise ValueError(
                f"a Brownian increment from sigma {sigma} to {sigma_next} is impossible; it must "
                f"go down, from below {LARGEST_SIGMA:g} to 0 or above"
            )
        increment = self._at(sigma) - self._at(sigma_next)
        return (increment / math.sqrt(sigma - sigma_next)).astype(np.float32)

    def _at(self, sigma: float) -> Float64Array:
        """W(sigma)."""
        if sigma not in self._recent:
            while len(self._recent) >= _RECENT:
                del self._recent[next(iter(self._recent))]
            self._recent[sigma] = self._computed_at(sigma)
        return self._recent[sigma]

    def _computed_at(self, sigma: float) -> Float64Array:
        while not self._stretches[-1].holds(sigma):
            self._stretches.pop()
        while self._stretches[-1].length > RESOLUTION:
            self._stretches.append(self._half(self._stretches[-1], sigma))
        last = self._stretches[-1]
        return last.at_low + (sigma - last.low) / last.length * (last.at_high - last.at_low)

    def _half(self, whole: _Stretch, sigma: float) -> _Stretch:
        """The half of a stretch that holds `sigma`."""
        middle = (whole.low + whole.high) / 2
        at_middle = whole.at_low + whole.at_high
        at_middle /= 2
        at_middle += math.sqrt(whole.length) / 2 * self._normal(whole.node)
        if sigma < middle:
            return _Stretch(2 * whole.node, whole.low, middle, whole.at_low, at_middle)
        return _Stretch(2 * whole.node + 1, middle, whole.high, at_middle, whole.at_high)

    def _normal(self, node: int) -> Float32Array:
        counter = np.array([0, 0, node, 0], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=self._key, counter=counter))
        return rng.standard_normal(self._shape, dtype=np.float32)
