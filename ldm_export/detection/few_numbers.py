"""Buffers of a few numbers, which are used as they are stored in a checkpoint."""

import math
from collections.abc import Mapping
from types import MappingProxyType

from ldm_export.detection.features import Tensors
from ldm_export.errors import WeightsError

#: Largest relative error of rounding to the types that are too coarse for single numbers.
_ROUNDING: Mapping[str, float] = MappingProxyType(
    {"float8_e4m3fn": 2.0**-4, "float8_e5m2": 2.0**-3}
)


def read_numbers(
    tensors: Tensors, name: str, *, remedy: str, usual: float | None = None
) -> tuple[float, ...]:
    """Return the numbers of a buffer; none without it, or where `usual` is known more exactly.

    Args:
        tensors: The checkpoint's.
        name: Name of the buffer.
        remedy: What to do if it is too coarse, after "; ".
        usual: The number that other sources have, if it is one: 8 bits that it rounds to confirm
            it.

    Raises:
        WeightsError: The buffer is stored in 8 bits, and nothing else has its number.
    """
    if name not in tensors:
        return ()
    stored = tensors[name]
    numbers = tuple(stored.numpy().reshape(-1).astype(float).tolist())
    error = _ROUNDING.get(stored.dtype)
    if error is None:
        return numbers
    if usual is not None and len(numbers) == 1 and abs(numbers[0] - usual) <= error * abs(usual):
        return ()
    shown = f" {numbers[0]:g}" if len(numbers) == 1 and math.isfinite(numbers[0]) else ""
    raise WeightsError(
        f"{name}{shown} is stored as {stored.dtype}, which rounds numbers by up to {error:.1%}; "
        f"{remedy}"
    )
