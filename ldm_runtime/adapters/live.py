"""Adapters as inputs of the networks that they change: each request scales them for itself.

Nothing is merged, so that requests with other adapters and scales share calls of a network. The
arithmetic is W x + up (down x) in place of (W + up down) x, without rounding to the type that the
bundle stores its weights in.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ldm_runtime.adapters.files import AdapterFile
from ldm_runtime.adapters.merging import (
    ADAPTED_NETWORKS,
    Adapter,
    Change,
    MergedAdapters,
    plain_scale,
)
from ldm_runtime.adapters.names import Target
from ldm_runtime.bundle.low_rank_branches import Branch, places
from ldm_runtime.bundle.manifest import ComponentRecord, Manifest
from ldm_runtime.errors import RequestError
from ldm_runtime.specs.components import COMPONENTS

#: Most adapters of one request. Branches are as wide as the widest two, for all requests.
MOST_AT_ONCE = 2
_VARIANT = "fp32"
#: Choices of scales whose matrices stay in memory.
_KEPT = 2

Float32Array = npt.NDArray[np.float32]
#: The inputs of a network's branches by name, each of one sample: (1, rows, columns).
Matrices = Mapping[str, Float32Array]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Factors:
    """What an adapter does to a layer: up (out, rank) · down (rank, in)."""

    target: Target
    down: Float32Array
    up: Float32Array


class LiveAdapters:
    """The adapters of a generator that requests scale, as branches of the bundle's networks.

    They are read into memory.

    Args:
        files: The adapters by name.
        bundle: The bundle's folder.
        manifest: Its manifest.

    Raises:
        ValueError: In one sentence, which adapter is for another model, or cannot be an input.
        RequestError: A layer of an adapter does not fit.
        BundleError: A graph of the bundle is not one.
    """

    def __init__(self, files: Mapping[str, AdapterFile], bundle: Path, manifest: Manifest) -> None:
        self.files = MappingProxyType(dict(files))
        self._factors = {name: _factors_of(file, bundle, manifest) for name, file in files.items()}
        self._branches = {
            record.name: tuple(self._branches_of(record, bundle))
            for record in manifest.components
            if COMPONENTS[record.name].network in ADAPTED_NETWORKS
        }
        self._latest = lru_cache(maxsize=_KEPT)(self._matrices_of)

    def branches(self, component: str) -> tuple[Branch, ...]:
        """Return the branches of a component's graphs."""
        return self._branches.get(component, ())

    def matrices(self, scales: Mapping[str, float]) -> Mapping[str, Matrices]:
        """Return the inputs of the branches of every component that has any.

        Args:
            scales: Factors of the updates of adapters, from `plain_scales`; the others are left
                out.

        Raises:
            RequestError: An adapter is unknown, there are more than `MOST_AT_ONCE`, or a scale is
                too large.
        """
        self._check(scales)
        return self._latest(tuple(sorted((name, each) for name, each in scales.items() if each)))

    def _matrices_of(self, scales: tuple[tuple[str, float], ...]) -> Mapping[str, Matrices]:
        return {
            component: dict(self._inputs(component, branches, scales))
            for component, branches in self._branches.items()
        }

    def _check(self, scales: Mapping[str, float]) -> None:
        for name in scales:
            if name not in self.files:
                known = ", ".join(self.files) or "none"
                raise RequestError("adapters", f"there is no {name!r}; there are {known}")
        if (count := sum(scale != 0 for scale in scales.values())) > MOST_AT_ONCE:
            raise RequestError(
                "adapters",
                f"at most {MOST_AT_ONCE} go together while they are live, got {count}; leave "
                "some out, or merge them",
            )

    def _branches_of(self, record: ComponentRecord, bundle: Path) -> Iterator[Branch]:
        """Yield the branches of a component.

        Raises:
            ValueError: An adapter changes what has no place for a branch.
        """
        graph = next((each.file for each in record.graphs if each.variant == _VARIANT), None)
        if graph is None:  # which no backend runs that takes branches
            return
        known, network = places(bundle / graph), COMPONENTS[record.name].network
        ranks: dict[str, list[int]] = {}
        for name, factors in self._factors.items():
            for weight, each in factors[network].items():
                if weight in known:
                    ranks.setdefault(weight, []).append(sum(len(part.down) for part in each))
                elif record.name == network:
                    raise ValueError(
                        f"{self.files[name].name} changes {weight}, which is neither a linear "
                        "layer of tokens nor a 1x1 convolution, so that it cannot be live; merge "
                        "the adapter"
                    )
        for weight, widths in ranks.items():
            rank = sum(sorted(widths)[-MOST_AT_ONCE:])
            yield Branch(weight=weight, place=known[weight], rank=rank)

    def _inputs(
        self, component: str, branches: tuple[Branch, ...], scales: tuple[tuple[str, float], ...]
    ) -> Iterator[tuple[str, Float32Array]]:
        """Yield the two matrices of every branch of a component."""
        network = COMPONENTS[component].network
        for branch in branches:
            place = branch.place
            down = np.zeros((place.inputs, branch.rank), np.float32)
            up = np.zeros((branch.rank, place.outputs), np.float32)
            first = 0
            for name, scale in scales:
                for factors in self._factors[name][network].get(branch.weight, ()):
                    rows = slice(first, first + len(factors.down))
                    down[:, rows] = factors.down.T
                    up[rows, factors.target.rows(place.outputs)] = _scaled(name, scale, factors)
                    first = rows.stop
            if place.is_convolution:
                down, up = down.T, up.T
            yield branch.down, np.ascontiguousarray(down)[np.newaxis]
            yield branch.up, np.ascontiguousarray(up)[np.newaxis]


def plain_scales(scales: Mapping[str, float]) -> dict[str, float]:
    """Return the scales that a request has, by name, as plain numbers.

    Raises:
        RequestError: One is not a finite number.
    """
    try:
        return {name: plain_scale(repr(name), scale) for name, scale in scales.items()}
    except ValueError as error:
        raise RequestError("adapters", str(error)) from error


def _scaled(name: str, scale: float, factors: _Factors) -> Float32Array:
    """Return the scaled second matrix of an adapter, (rank, out).

    Raises:
        RequestError: The scale is too large for float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (scale * factors.up.T).astype(np.float32, copy=False)
    if not np.isfinite(scaled).all():
        raise RequestError(
            "adapters",
            f"{name!r} has the scale {scale:g}, which makes numbers that are not finite; give a "
            "smaller one, such as 1",
        )
    return scaled


def _factors_of(
    file: AdapterFile, bundle: Path, manifest: Manifest
) -> Mapping[str, Mapping[str, list[_Factors]]]:
    """Return what an adapter does, by network and weight.

    Raises:
        ValueError: It is for another model, or cannot be an input.
        RequestError: A layer does not fit; the field is `live_adapters`.
    """
    adapter = MergedAdapters([Adapter(file=file, scale=1.0)], bundle, manifest)
    try:
        adapter.check_shapes()
    except RequestError as error:  # which is of adapters that are merged
        raise RequestError("live_adapters", error.reason) from error
    return {
        network: {
            weight: [_factors_of_change(file, change) for change in changes]
            for weight, changes in adapter.changes_of(network).items()
        }
        for network in ADAPTED_NETWORKS
    }


def _factors_of_change(file: AdapterFile, change: Change) -> _Factors:
    try:
        factors = change.layer.factors()
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    if factors is None:
        raise ValueError(
            f"{file.name} has {change.layer.name}, a {change.layer.kind}, and only a LoRA of a "
            "matrix can be live; merge the adapter"
        )
    return _Factors(target=change.target, down=factors[0], up=factors[1])
