"""Memory of freed networks, given back to the operating system and not only to the allocator."""

import ctypes
import gc


def give_back_memory() -> None:
    """Collect garbage and return the freed memory to the operating system.

    Networks are in reference cycles after torch has traced them, and the C library keeps small
    blocks (of less than 32 MB) for later, so that otherwise every component adds to the next one.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only the GNU library has it
    if trim is not None:
        trim(0)
