"""Test doubles for code that uses this package: a fake engine, and bundles of a few kilobytes.

There is a tiny bundle of every task. It is complete and opens in every backend that reads its fp32
graphs, but it generates coloured patterns. Its networks exist twice, as ONNX graphs and as
NumPy functions, and its golden outputs come from the latter. Nothing here needs more than NumPy.
"""

from ldm_runtime.testing.bundle import write_tiny_bundle
from ldm_runtime.testing.engine import FakeEngine
from ldm_runtime.testing.networks import tiny_networks
from ldm_runtime.testing.requests import tiny_requests
from ldm_runtime.testing.specs import (
    TINY_SPEC,
    autoencoder_spec,
    text_encoder_spec,
    tiny_spec,
    unet_spec,
)

__all__ = [
    "TINY_SPEC",
    "FakeEngine",
    "autoencoder_spec",
    "text_encoder_spec",
    "tiny_networks",
    "tiny_requests",
    "tiny_spec",
    "unet_spec",
    "write_tiny_bundle",
]
