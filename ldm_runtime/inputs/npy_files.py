"""Arrays from `.npy` files of strangers: no pickles, and no more memory than the file has bytes."""

import io
import math
from collections.abc import Callable
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from ldm_runtime.inputs.reading import NamedBytes

#: Longest header in bytes: NumPy's own limit, beyond which parsing is not safe.
MAX_HEADER = 10_000

#: Raises `ValueError` for the type and shape of an array that are not wanted; told its name.
CheckArray = Callable[[np.dtype[Any], tuple[int, ...], str], None]

_HEADERS = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
# Errors that damaged headers were seen to raise.
_DAMAGE = (ValueError, TypeError, SyntaxError, TokenError, OverflowError, MemoryError)


def decode_npy(named: NamedBytes, check: CheckArray) -> npt.NDArray[Any]:
    """Return the array of a `.npy` file, read-only.

    Not with `np.load`, which allocates any size that a header gives.

    Args:
        named: The bytes of the file.
        check: Called before the numbers are looked at.

    Raises:
        ValueError: In one sentence, why the file cannot be read, or what `check` said.
    """
    file = io.BytesIO(named.data)
    try:
        version = npy_format.read_magic(file)
        shape, is_fortran, dtype = _HEADERS[version](file, max_header_size=MAX_HEADER)
    except (*_DAMAGE, KeyError) as error:
        raise ValueError(
            f"{named.name} is not a readable .npy file; write it with numpy.save"
        ) from error
    check(dtype, shape, named.name)
    data = named.data[file.tell() :]
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{named.name} is damaged or cut off: {len(data)} bytes for "
            f"{'x'.join(map(str, shape))} numbers of {dtype}"
        )
    return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
