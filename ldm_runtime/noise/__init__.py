"""Normal noise by name: equal to torch's on the CPU or on a GPU, or NumPy's."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ldm_runtime.noise.contract import NoiseGenerator
from ldm_runtime.noise.torch_cpu import TorchCpuGenerator
from ldm_runtime.noise.torch_cuda import TorchCudaGenerator

__all__ = [
    "NOISES",
    "NoiseGenerator",
    "NumpyGenerator",
    "TorchCpuGenerator",
    "TorchCudaGenerator",
]


class NumpyGenerator(NoiseGenerator):
    """NumPy's PCG64 and its ziggurat: the fastest, and equal to no other program's noise.

    NumPy reserves the right to change `standard_normal` in a feature release (its policy NEP 19).
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def _sample(self, count: int, dtype: np.dtype[np.floating]) -> npt.NDArray[np.floating]:
        if dtype == np.float32:
            return self._generator.standard_normal(count, np.float32)
        return self._generator.standard_normal(count, np.float64)


#: From a name to the class of generator, which takes a seed.
NOISES: Mapping[str, Callable[[int], NoiseGenerator]] = MappingProxyType(
    {
        "torch-cpu": TorchCpuGenerator,
        "torch-cuda": TorchCudaGenerator,
        "numpy": NumpyGenerator,
    }
)
