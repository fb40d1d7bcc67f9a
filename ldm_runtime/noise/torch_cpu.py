"""Normal noise equal to torch.randn on the CPU, bit for bit, so that a seed means the same image.

What torch does (checked against torch 2.13; the float32 path is older than that):

* A Mersenne Twister MT19937 seeded with the low 32 bits of the seed.
* 16 numbers or more: Box-Muller in groups of 16 (8 radii, then 8 angles). If the count is not
  a multiple of 16, the last 16 numbers are sampled again.
  float32 comes from uniforms of 24 bits, with the logarithm, sine and cosine of the Cephes library
  (S. Moshier, single/logf.c and single/sinf.c) and every product that feeds a sum fused into it.
  float64 comes from uniforms of 53 bits, two words each, and the C library's functions.
* Fewer than 16: one at a time, in double precision, from uniforms of 53 bits, then rounded to the
  precision asked for. Each pair gives two numbers and the second waits in the generator, even
  across calls of the other kinds.

The C library's functions are called through `math`, since NumPy's own may round differently; the
bits are torch's wherever torch runs on the same C library. The float32 arithmetic is that of
torch's AVX2 and AVX-512 kernels, which agree; on a processor without AVX2 torch calls the C library
instead and its noise differs from this by up to 3e-6.

Here the float32 arithmetic runs on float64 arrays that hold float32 values: a product of two of
them is exact, so rounding once after the sum gives the fused result. (The float64 sum is itself
rounded; a test shows that this spoils none of the 2**24 radii and 2**24 angles that can occur.)
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ldm_runtime.noise.contract import Float32Array, Float64Array, NoiseGenerator, Words

_GROUP = 16


def _float32(value: float) -> float:
    return float(np.float32(value))


_SQRT_HALF = _float32(math.sqrt(0.5))
_LN2_HIGH, _LN2_LOW = _float32(0.693359375), _float32(-2.12194440e-4)
_LOG_POLYNOMIAL = tuple(
    map(
        _float32,
        (
            7.0376836292e-2,
            -1.1514610310e-1,
            1.1676998740e-1,
            -1.2420140846e-1,
            1.4249322787e-1,
            -1.6668057665e-1,
            2.0000714765e-1,
            -2.4999993993e-1,
            3.3333331174e-1,
        ),
    )
)
_TWO_PI, _FOUR_OVER_PI = _float32(2 * math.pi), _float32(4 / math.pi)
# pi / 4 in three parts, each short enough that multiples of the first two are exact.
_QUARTER_PI_PARTS = (0.78515625, 2.4187564849853515625e-4, _float32(3.77489497744594108e-8))
_COS_POLYNOMIAL = tuple(
    map(_float32, (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2))
)
_SIN_POLYNOMIAL = tuple(map(_float32, (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)))


class TorchCpuGenerator(NoiseGenerator):
    """The random stream of `torch.Generator().manual_seed(seed)`.

    Only the low 32 bits of a seed count, as in torch.

    Raises:
        ValueError: The seed does not fit 64 unsigned bits.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)
        self._waiting: float | None = None

    def _sample(self, count: int, dtype: np.dtype[np.floating]) -> npt.NDArray[np.floating]:
        if count < _GROUP:
            return np.array([self._next_double() for _ in range(count)], dtype)
        per_number, to_normal = (1, _box_muller) if dtype == np.float32 else (2, _box_muller_double)
        words = self._words(count * per_number)  # also those of the last count % 16 numbers
        numbers = np.empty(count, dtype)
        whole = count - count % _GROUP
        numbers[:whole] = to_normal(words[: whole * per_number])
        if whole < count:
            numbers[-_GROUP:] = to_normal(self._words(_GROUP * per_number))
        return numbers

    def _words(self, count: int) -> Words:
        return self._twister.randint(0, 2**32, size=count, dtype=np.uint32)

    def _next_double(self) -> float:
        if self._waiting is not None:
            number, self._waiting = self._waiting, None
            return number
        angle_bits, radius_bits = (
            (int(high) << 32 | int(low)) % 2**53 for high, low in self._words(4).reshape(2, 2)
        )
        theta = 2 * math.pi * (angle_bits * 2.0**-53)
        radius = math.sqrt(-2 * math.log1p(-radius_bits * 2.0**-53))
        self._waiting = radius * math.sin(theta)
        return radius * math.cos(theta)


def _box_muller(words: Words) -> Float32Array:
    """Turn words (a multiple of 16) into as many float32 numbers, in torch's order."""
    uniform = (words & 0xFFFFFF).astype(np.float64).reshape(-1, 2, _GROUP // 2) * 2.0**-24
    radius = _rounded(np.sqrt(-2 * _log(1 - uniform[:, 0])))
    sin, cos = _sin_cos(_rounded(_TWO_PI * uniform[:, 1]))
    numbers = np.stack([radius * cos, radius * sin], axis=1).astype(np.float32)
    return numbers.reshape(-1) + np.float32(0)  # torch adds the mean, which turns -0 into 0


def _box_muller_double(words: Words) -> Float64Array:
    """Turn words (a multiple of 32) into half as many float64 numbers, in torch's order."""
    high, low = words.astype(np.uint64).reshape(-1, 2).T
    bits = (high << np.uint64(32) | low) & np.uint64(2**53 - 1)
    uniform = bits.astype(np.float64).reshape(-1, 2, _GROUP // 2) * 2.0**-53
    radius = np.sqrt(-2 * _each(math.log, 1 - uniform[:, 0]))
    angle = 2 * math.pi * uniform[:, 1]
    waves = np.stack([_each(math.cos, angle), _each(math.sin, angle)], axis=1)
    return (radius[:, None] * waves).reshape(-1) + 0.0


def _each(function: Callable[[float], float], x: Float64Array) -> Float64Array:
    return np.fromiter(map(function, x.ravel().tolist()), np.float64, x.size).reshape(x.shape)


def _log(x: Float64Array) -> Float64Array:
    """Cephes logf: x = mantissa * 2**exponent, a polynomial in mantissa - 1."""
    mantissa, exponent = np.frexp(x)
    below = mantissa < _SQRT_HALF
    scale = exponent - below.astype(np.float64)
    m = _rounded(np.where(below, 2 * mantissa, mantissa) - 1)
    square = _rounded(m * m)
    tail = _rounded(_horner(_LOG_POLYNOMIAL, m) * m)
    tail = _rounded(tail * square + _rounded(scale * _LN2_LOW))
    tail = _rounded(tail - 0.5 * square)
    return _rounded(scale * _LN2_HIGH + _rounded(m + tail))


def _sin_cos(theta: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Cephes sinf and cosf for theta >= 0: subtract quarter turns, a polynomial for each half."""
    eighths = _rounded(theta * _FOUR_OVER_PI).astype(np.int32)
    quarters = (eighths + 1) // 2
    x = theta
    for part in _QUARTER_PI_PARTS:
        x = _rounded(x - 2 * quarters * part)
    square = _rounded(x * x)
    sin = _rounded(_horner(_SIN_POLYNOMIAL, square) * square)
    sin = _rounded(sin * x + x)
    cos = _rounded(_horner(_COS_POLYNOMIAL, square) * square)
    cos = _rounded(_rounded(cos * square - 0.5 * square) + 1)
    swapped = quarters % 2 == 1
    sin, cos = np.where(swapped, cos, sin), np.where(swapped, sin, cos)
    return np.where(quarters & 2, -sin, sin), np.where((quarters + 1) & 2, -cos, cos)


def _horner(coefficients: tuple[float, ...], x: Float64Array) -> Float64Array:
    value: Float64Array | float = coefficients[0]
    for coefficient in coefficients[1:]:
        value = _rounded(value * x + coefficient)
    return np.asarray(value)


def _rounded(x: Float64Array) -> Float64Array:
    """The nearest float32 values, still in float64."""
    return x.astype(np.float32).astype(np.float64)
