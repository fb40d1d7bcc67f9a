"""The number format of training: bfloat16 where the processor is faster with it."""

import time
from functools import cache

import torch

_CHANNELS, _SIDE, _REPEATS = 64, 16, 5


def autocast() -> torch.autocast:
    """Return a context in which networks compute in the faster of bfloat16 and float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=_bfloat16_is_faster())


@cache
def _bfloat16_is_faster() -> bool:
    """Time a convolution in both formats: some processors that have bfloat16 are slower with it."""
    return _seconds(torch.bfloat16) < _seconds(torch.float32)


@torch.enable_grad()  # may be asked for first where nothing is trained
def _seconds(dtype: torch.dtype) -> float:
    layer = torch.nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1).to(dtype)
    images = torch.ones(32, _CHANNELS, _SIDE, _SIDE, dtype=dtype)
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        layer(images).sum().backward()
        best = min(best, time.perf_counter() - started)
    return best
