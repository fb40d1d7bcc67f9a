"""Samplers: generators that carry noisy latents down a list of sigmas.

`contract` says what they all take and give; `SAMPLERS` is the list of them.
"""

from collections.abc import Mapping
from types import MappingProxyType

from ldm_runtime.samplers import (
    consistency,
    dpm_solver,
    first_order,
    multistep,
    stochastic,
    two_stage,
    unipc,
)
from ldm_runtime.samplers.contract import (
    Denoise,
    EarlierSigma,
    Latents,
    NoiseSampler,
    Sampler,
    SamplerRecord,
)

__all__ = [
    "SAMPLERS",
    "Denoise",
    "EarlierSigma",
    "Latents",
    "NoiseSampler",
    "Sampler",
    "SamplerRecord",
]

SAMPLERS: Mapping[str, SamplerRecord] = MappingProxyType(
    first_order.RECORDS
    | consistency.RECORDS
    | two_stage.RECORDS
    | multistep.RECORDS
    | dpm_solver.RECORDS
    | stochastic.RECORDS
    | unipc.RECORDS
)
