"""Normal noise as torch.randn makes it on an NVIDIA GPU, without one.

What torch does (ATen/native/cuda/DistributionTemplates.h, to the same effect from 1.9 to 2.13):

* One Philox4x32-10 stream per thread. The seed is the key; the counter's low half is an offset
  that grows from call to call, its high half the index of the thread. A generator's first call
  begins at offset 0, and each call moves it on by the number of passes that it makes.
* Blocks of 256 threads, as many blocks as the numbers need, but at most what the GPU holds at a
  time: multiprocessors * (threads_per_multiprocessor // 256).
* In one pass a thread turns one output of Philox, four words, into four float32 numbers (or two
  float64 numbers). Number k of a thread goes to position thread + k * threads.

So while the numbers do not outnumber the threads that a GPU holds, number i is the first of
thread i, and every GPU gives the same. Above that the positions depend on the GPU:

| GPU | multiprocessors | threads each | same numbers as any larger GPU up to |
|---|---|---|---|
| T4 | 40 | 1024 | 40,960 |
| RTX 3060 | 28 | 1536 | 43,008 |
| RTX 4090 | 128 | 1536 | 196,608 |
| A100 | 108 | 2048 | 221,184 |
| H100 SXM, H200 | 132 | 2048 | 270,336 |

The latents of a 512 x 512 image are 16,384 numbers, those of a 1024 x 1024 image 65,536.

How exact: the Philox words are exact, and so is which of them becomes which number. float32
numbers go through the GPU's approximate sine and cosine (`__sincosf`, an absolute error of up to
2**-20.5 by NVIDIA's PTX manual), which no document gives bit by bit; with radii up to 6.8 that
bounds the difference by 6e-6; values that torch printed differ by less than 1e-6. float64 numbers
use the accurate functions of CUDA and differ by a few units in the last place.

Source: cuRAND's curand_philox4x32_x.h and curand_normal.h; Box and Muller 1958.
"""

import math
from collections.abc import Iterator
from itertools import chain, islice

import numpy as np
import numpy.typing as npt

from ldm_runtime.noise.contract import Float64Array, NoiseGenerator, Words
from ldm_runtime.noise.philox import philox4x32

_BLOCK = 256
# cuRAND's constants: 2**-32 and the float32 product of 2**-32 and 2 pi.
_TWO_TO_MINUS_32 = 2.0**-32
_TURN = _TWO_TO_MINUS_32 * float(np.float32(2 * math.pi))


class TorchCudaGenerator(NoiseGenerator):
    """The random stream of `torch.Generator("cuda").manual_seed(seed)`.

    Args:
        seed: All 64 bits count.
        multiprocessors: Of the GPU to be like (`multi_processor_count` in torch). The default is
            that of an H100; it matters only above the sizes in the module's table.
        threads_per_multiprocessor: `max_threads_per_multi_processor` in torch.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self, seed: int, *, multiprocessors: int = 132, threads_per_multiprocessor: int = 2048
    ) -> None:
        super().__init__(seed)
        if multiprocessors < 1:
            raise ValueError(f"multiprocessors must be 1 or more, got {multiprocessors}")
        if threads_per_multiprocessor < _BLOCK:
            raise ValueError(
                f"threads_per_multiprocessor must be {_BLOCK} or more, "
                f"got {threads_per_multiprocessor}"
            )
        self._seed = seed
        self._most_blocks = multiprocessors * (threads_per_multiprocessor // _BLOCK)
        self._offset = 0

    def _sample(self, count: int, dtype: np.dtype[np.floating]) -> npt.NDArray[np.floating]:
        if count == 0:
            return np.empty(0, dtype)
        if count * dtype.itemsize > 2**31:
            raise ValueError(
                f"{count} numbers of {dtype} are more than the 2 GiB up to which torch's order on "
                "a GPU is known here; sample them in parts"
            )
        to_normal, per_pass = (_four_floats, 4) if dtype == np.float32 else (_two_doubles, 2)
        threads = _BLOCK * min(-(-count // _BLOCK), self._most_blocks)
        rows = -(-count // threads)
        passes = -(-rows // per_pass)
        numbers = chain.from_iterable(
            to_normal(self._words(self._offset + number, threads)) for number in range(passes)
        )
        sampled = np.concatenate(list(islice(numbers, rows)))[:count]
        self._offset += passes
        return sampled

    def _words(self, offset: int, threads: int) -> Words:
        counter = np.zeros((4, threads), np.uint64)
        counter[0], counter[1] = offset & 0xFFFFFFFF, offset >> 32
        counter[2] = np.arange(threads)
        return philox4x32(counter, self._seed)


def _four_floats(words: Words) -> Iterator[npt.NDArray[np.floating]]:
    """Compute `curand_normal4`: two pairs by Box-Muller, the sine of each first."""
    for radius_word, angle_word in (words[:2], words[2:]):
        uniform = _rounded(_rounded(radius_word) * _TWO_TO_MINUS_32 + _TWO_TO_MINUS_32 / 2)
        angle = _rounded(_rounded(angle_word) * _TURN + _TURN / 2)
        radius = _rounded(np.sqrt(-2 * _rounded(np.log(uniform))))
        for wave in (np.sin, np.cos):
            yield (radius * _rounded(wave(angle))).astype(np.float32) + np.float32(0)


def _two_doubles(words: Words) -> Iterator[npt.NDArray[np.floating]]:
    """Compute `curand_normal2_double`: 53 bits from two words each, angles in units of pi."""
    low, high = words[::2].astype(np.uint64), words[1::2].astype(np.uint64)
    radius_bits, angle_bits = (low ^ high << np.uint64(53 - 32)).astype(np.float64)
    radius = np.sqrt(-2 * np.log(radius_bits * 2.0**-53 + 2.0**-54))
    angle = np.pi * (angle_bits * 2.0**-52 + 2.0**-53)
    yield radius * np.sin(angle) + 0.0
    yield radius * np.cos(angle) + 0.0


def _rounded(x: npt.NDArray[np.uint32] | Float64Array) -> Float64Array:
    """The nearest float32 values, in float64 so that a product and a sum round only once."""
    return x.astype(np.float32).astype(np.float64)
