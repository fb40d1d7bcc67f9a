"""GPU detection through the library of the NVIDIA driver, and nothing else.

TensorRT without a driver crashes the interpreter, so this comes before every use of it.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_NAME_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The first GPU that is visible to this process.

    Attributes:
        name: Its name in the driver.
        compute_capability: Major and minor number.
        driver_version: Highest CUDA version that the driver supports, such as "13.0".
    """

    name: str
    compute_capability: tuple[int, int]
    driver_version: str

    @property
    def target(self) -> str:
        """The compute capability in the builders' notation, such as "sm89"."""
        major, minor = self.compute_capability
        return f"sm{major}{minor}"


def find_gpu(load: Callable[[str], Any] = ctypes.CDLL) -> Gpu | None:
    """Return the first GPU, or None if there is no driver or no GPU.

    Args:
        load: Opens the driver's library; tests pass a fake.
    """
    try:
        driver = load(_LIBRARY)
    except OSError:
        return None
    device, count, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    capability = ctypes.c_int(), ctypes.c_int()
    calls: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("cuInit", (0,)),
        ("cuDriverGetVersion", (ctypes.byref(version),)),
        ("cuDeviceGetCount", (ctypes.byref(count),)),
        ("cuDeviceGet", (ctypes.byref(device), 0)),
        ("cuDeviceGetName", (name, _NAME_BYTES, device)),
        ("cuDeviceGetAttribute", (ctypes.byref(capability[0]), _MAJOR, device)),
        ("cuDeviceGetAttribute", (ctypes.byref(capability[1]), _MINOR, device)),
    )
    for function, arguments in calls:
        if getattr(driver, function)(*arguments):
            return None  # cuInit without a GPU, cuDeviceGet if all are hidden
    return Gpu(
        name=name.value.decode(),
        compute_capability=(capability[0].value, capability[1].value),
        driver_version=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )
