"""The ceilings of this machine, measured: float32 matrix products and copies in memory.

    python -m ldm_runtime.benchmark.ceilings

`measure_apart` runs this file in its own process, because the library behind NumPy's products
reads its number of threads from the environment when it is loaded.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from ldm_runtime.benchmark.children import run_child
from ldm_runtime.benchmark.rows import usable_cpus

_SIZE = 2048  # large enough that a product is bound by arithmetic
_COPIED_BYTES = 256 * 1024 * 1024  # larger than caches
_ROUNDS = 8
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The best of several rounds.

    Attributes:
        matmul_flops: Floating-point operations a second in a float32 matrix product.
        copy_bytes: Bytes read plus bytes written a second by a copy.
        threads: Threads that did it.
    """

    matmul_flops: float
    copy_bytes: float
    threads: int

    def __str__(self) -> str:
        return (
            f"matmul {self.matmul_flops / 1e9:.1f} GFLOP/s (float32), "
            f"copy {self.copy_bytes / 1e9:.1f} GB/s (read + written), {self.threads} threads"
        )


def measure(threads: int) -> Ceilings:
    """Measure in this process; products use the threads that NumPy was loaded with."""
    rng = np.random.default_rng(0)
    left, right = (rng.random((_SIZE, _SIZE), dtype=np.float32) for _ in range(2))
    product = np.empty_like(left)
    source = np.ones(_COPIED_BYTES // 4, dtype=np.float32)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    matmul, copy = [], []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_ROUNDS):  # interleaved, so that a disturbance does not hit one alone
            started = time.perf_counter()
            np.matmul(left, right, out=product)
            matmul.append(time.perf_counter() - started)
            started = time.perf_counter()
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))
            copy.append(time.perf_counter() - started)
    return Ceilings(
        matmul_flops=2.0 * _SIZE**3 / min(matmul),
        copy_bytes=2.0 * source.nbytes / min(copy),
        threads=threads,
    )


def measure_apart() -> Ceilings:
    """Measure in its own process, with one thread per usable CPU.

    Raises:
        LdmError: The process failed.
    """
    threads = dict.fromkeys(_THREAD_VARIABLES, str(usable_cpus()))
    return Ceilings(**run_child("measuring the machine", __file__, environment=threads))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure(usable_cpus()))) + "\n")
