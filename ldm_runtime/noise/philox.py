"""Philox4x32-10: a function of a counter and a key that looks random, so no state to carry.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
"""

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10


def philox4x32(counter: npt.ArrayLike, key: int) -> npt.NDArray[np.uint32]:
    """Return the four words of every counter, shape (4, ...).

    Args:
        counter: Four words of 32 bits, lowest first, shape (4, ...).
        key: 64 bits.
    """
    a, b, c, d = np.asarray(counter, dtype=np.uint64)
    keys = key & 0xFFFFFFFF, key >> 32
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = second >> _HALF ^ b ^ np.uint64(keys[0]), second & _LOW
        c, d = first >> _HALF ^ d ^ np.uint64(keys[1]), first & _LOW
        keys = (keys[0] + _KEY_STEPS[0]) & 0xFFFFFFFF, (keys[1] + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([a, b, c, d]).astype(np.uint32)
