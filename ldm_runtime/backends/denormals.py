"""Denormals flushed to zero: a processor computes with them up to a hundred times slower.

ONNX Runtime sets this mode for the threads it starts, but computes on the calling thread too. There
it sets it once per process, for the caller that creates the first session, and never resets it:
later callers stay slow, and NumPy in that first thread no longer sees denormals. OpenVINO leaves it
on wherever it compiled or ran. Hence this switch, which holds for one block on one thread.
"""

import ctypes
import platform
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Where fenv_t (glibc and musl agree) keeps the control word, and its flush-to-zero bits:
# MXCSR's FTZ and DAZ on x86-64, FPCR's FZ on AArch64.
_CONTROL_WORDS = {"x86_64": (28, 0x8040), "aarch64": (0, 1 << 24)}
_FENV_SIZE = 64  # 32 bytes on x86-64, 8 on AArch64


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Flush denormals to zero on this thread within the block; elsewhere than Linux do nothing."""
    control_word = _CONTROL_WORDS.get(platform.machine())
    if not sys.platform.startswith("linux") or control_word is None:
        yield
        return
    offset, bits = control_word
    library = ctypes.CDLL(None)
    before = ctypes.create_string_buffer(_FENV_SIZE)
    library.fegetenv(before)
    flushed = ctypes.create_string_buffer(before.raw, _FENV_SIZE)
    (value,) = struct.unpack_from("<I", before, offset)
    struct.pack_into("<I", flushed, offset, value | bits)
    library.fesetenv(flushed)
    try:
        yield
    finally:
        library.fesetenv(before)
