"""The file of a network's weights in pages that can be given back to the system.

OpenVINO maps such a file as well, reads it when it compiles a model, and keeps the pages, which
nothing reads again: kernels have copies in the order and precision that they compute in. Stable
Diffusion 1.5's weights take 1.7 GB twice that way.
"""

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ldm_runtime.bundle.graph_weights import StoredWeight


class MappedWeights:
    """A file of weights, mapped into memory.

    Args:
        file: The file; it must not change while it is mapped.

    Raises:
        OSError: It cannot be read.
        ValueError: It is empty.
    """

    def __init__(self, file: Path) -> None:
        with file.open("rb") as stream:
            # Copied when it is written, as OpenVINO takes no array that is read-only. None is.
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)

    def array(self, weight: StoredWeight) -> npt.NDArray[np.floating]:
        """Return a weight without reading it.

        Raises:
            ValueError: The file ends before it does.
        """
        count = int(np.prod(weight.shape))
        flat = np.frombuffer(self._map, weight.dtype, count, weight.offset)
        return flat.reshape(weight.shape)

    def give_back(self) -> None:
        """Let the system have the pages that were read; they are read again when they are used."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
