"""Memory that goes back to the system when a network is gone, and not only to the allocator."""

import ctypes
import gc


def give_back_memory() -> None:
    """Collect garbage and give the freed memory back.

    Networks hang in reference cycles after torch traced them, and the C library keeps small blocks
    (of less than 32 MB) for later, so that without this every component adds to the next one.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only the GNU library has it
    if trim is not None:
        trim(0)
