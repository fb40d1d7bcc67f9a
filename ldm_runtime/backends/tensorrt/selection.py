"""Rules of whether and how a TensorRT engine runs, in pure Python: no CUDA, no TensorRT.

Which of a bundle's engines fits a machine, which inputs an engine takes, and when the work of one
shape is captured as a CUDA graph.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from ldm_runtime.backends.contract import check_input_names
from ldm_runtime.backends.cuda_device import RecordedGraph
from ldm_runtime.bundle.manifest import ComponentRecord, Manifest
from ldm_runtime.engines.build import HARDWARE_COMPATIBLE
from ldm_runtime.engines.gpu import Gpu
from ldm_runtime.engines.library import EXTRAS
from ldm_runtime.engines.records import BuilderName, EngineRecord, ProfileRecord
from ldm_runtime.errors import BackendError, ShapeError
from ldm_runtime.specs.components import DYNAMIC_AXES, TensorSignature

_LOGGER = logging.getLogger(__name__)

_ALIGNMENT = 256


#: Distributions to pin to an exact version, in order of preference.
_DISTRIBUTIONS: Mapping[BuilderName, str] = MappingProxyType(
    {"tensorrt": "tensorrt-cu13", "tensorrt_rtx": "tensorrt-rtx"}
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that engines would run on.

    Attributes:
        gpu: The GPU.
        versions: Version of every library that is installed, by its name in engine records.
    """

    gpu: Gpu
    versions: Mapping[BuilderName, str]


@dataclass(frozen=True, kw_only=True)
class Place:
    """The bundle that engines are in, and which of them may run.

    Attributes:
        bundle: Its folder.
        manifest: Its manifest.
        trusts: Returns whether an engine file with that hash may run.
    """

    bundle: Path
    manifest: Manifest
    trusts: Callable[[str], bool]


def choose_record(
    records: Iterable[EngineRecord], component: str, machine: Machine, place: Place
) -> EngineRecord:
    """Return the record of the engine to run for a component.

    Raises:
        BackendError: None fits; the message is about the one that passes the most checks.
    """
    builders = list(_DISTRIBUTIONS)
    mine = [record for record in records if record.component == component]
    mine.sort(key=lambda record: builders.index(record.builder))
    sentence = f"{place.bundle} has no TensorRT engine for {component}; {_rebuild(place.bundle)}"
    closest = -1
    for record in mine:
        passed, problem = _check(record, machine, place)
        if problem is None:
            return record
        if passed > closest:
            closest, sentence = passed, problem
    raise BackendError(sentence)


def _check(record: EngineRecord, machine: Machine, place: Place) -> tuple[int, str | None]:
    """Return how many checks a record passes, and a message about the first that fails."""
    problems = (
        _stale(record, place.manifest),
        _library(record, machine),
        _target(record, machine.gpu),
        _model(record, machine.gpu),
        _driver(record, machine.gpu),
        _untrusted(record, place),
    )
    for passed, problem in enumerate(problems):
        if problem is not None:
            fix = "" if "`" in problem else f"; {_rebuild(place.bundle)}"
            return passed, f"the {record.component} engine {problem}{fix}"
    return len(problems), None


def _rebuild(bundle: Path) -> str:
    return f"run `ldm build-engines {bundle}`"


def _stale(record: EngineRecord, manifest: Manifest) -> str | None:
    component = manifest.component(record.component)
    hashes = {file.path: file.sha256 for file in manifest.files}
    weights = hashes.get(component.weights_file, "")
    graphs = {hashes.get(graph.file, "") for graph in component.graphs}
    if record.weights_sha256 != weights:
        built = record.weights_sha256
        return f"was built from weights {built[:12]}…, the bundle's are {weights[:12]}…"
    if record.graph_sha256 not in graphs:
        found = ", ".join(f"{each[:12]}…" for each in sorted(graphs))
        return f"was built from the graph {record.graph_sha256[:12]}…, the bundle has {found}"
    return None


def _library(record: EngineRecord, machine: Machine) -> str | None:
    built = f"was built by {record.builder} {record.builder_version}"
    found = machine.versions.get(record.builder)
    if found is None:
        return (
            f"{built}, which is not installed; install {EXTRAS[record.builder]} with "
            f"`{_DISTRIBUTIONS[record.builder]}=={record.builder_version}`"
        )
    if found != record.builder_version:
        return f"{built}, this machine has {found}"
    return None


def _target(record: EngineRecord, gpu: Gpu) -> str | None:
    if gpu.target in record.targets:
        return None
    return f"was built for {', '.join(record.targets)}, this GPU ({gpu.name}) is {gpu.target}"


def _model(record: EngineRecord, gpu: Gpu) -> str | None:
    if record.gpu_name in (None, gpu.name) or HARDWARE_COMPATIBLE in record.flags:
        return None
    return f"was built on {record.gpu_name}, this GPU is {gpu.name}"


def _driver(record: EngineRecord, gpu: Gpu) -> str | None:
    if record.driver_version is None or _major(gpu.driver_version) >= _major(record.driver_version):
        return None
    return (
        f"was built with a driver for CUDA {record.driver_version}, "
        f"the one here is for CUDA {gpu.driver_version}"
    )


def _untrusted(record: EngineRecord, place: Place) -> str | None:
    """Refuse an engine file of another machine, by the hash that it will be compared with."""
    hashes = {file.path: file.sha256 for file in place.manifest.files}
    if place.trusts(hashes.get(record.engine_path, "")):
        return None
    return (
        f"was not built on this machine, and an engine is code; {_rebuild(place.bundle)} to build "
        "it here, or say --trust-engines (trust_engines=True) if you trust who made the bundle"
    )


def _major(version: str) -> int:
    return int(version.partition(".")[0])


class Shaped(Protocol):
    """The shape and type of an array, which may be on the GPU."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of its axes."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of its elements."""
        ...


def check_inputs(
    component: ComponentRecord,
    profiles: Sequence[ProfileRecord],
    inputs: Mapping[str, Shaped],
    bundle: Path,
) -> None:
    """Compare the inputs of a run with the profiles of an engine.

    Raises:
        BackendError: An input is missing, unknown or of the wrong type.
        ShapeError: A shape is outside the profiles, or two inputs disagree about an axis.
    """
    check_input_names(component, inputs)
    ranges = {profile.input: profile for profile in profiles}
    lengths: dict[str, int] = {}
    for signature in component.inputs:
        given = inputs[signature.name]
        if given.dtype != signature.dtype:
            raise BackendError(
                f"input {signature.name!r} must be {signature.dtype}, is {given.dtype}"
            )
        _check_range(signature, given.shape, ranges[signature.name], bundle)
        _check_lengths(signature, given.shape, lengths)


def _check_range(
    signature: TensorSignature, shape: tuple[int, ...], profile: ProfileRecord, bundle: Path
) -> None:
    fits = len(shape) == len(profile.min) and all(
        low <= length <= high
        for low, length, high in zip(profile.min, shape, profile.max, strict=True)
    )
    if not fits:
        ranges = [
            low if low == high else f"{low}-{high}"
            for low, high in zip(profile.min, profile.max, strict=True)
        ]
        limits = zip(signature.axes, profile.min, shape, profile.max, strict=False)
        outside = {axis for axis, low, length, high in limits if not low <= length <= high}
        fix = f"{_rebuild(bundle)} with a wider --min-size, --max-size or --max-batch"
        if outside == {"context_tokens"}:
            fix = "shorten the prompt and the negative prompt"
        raise ShapeError(signature.name, shape, ranges, fix=fix)


def _check_lengths(
    signature: TensorSignature, shape: tuple[int, ...], lengths: dict[str, int]
) -> None:
    for axis, length in zip(signature.axes, shape, strict=True):
        if axis in DYNAMIC_AXES and lengths.setdefault(axis, length) != length:
            wanted = [
                lengths.get(each, given) for each, given in zip(signature.axes, shape, strict=True)
            ]
            raise ShapeError(signature.name, shape, wanted)


def padded(size: int) -> int:
    """Return the bytes to allocate for `size`: at least one alignment, and whole ones."""
    return max(1, -(-size // _ALIGNMENT)) * _ALIGNMENT


class Replay:
    """CUDA graph of one shape: its work is enqueued directly at first, then replayed.

    A graph holds the addresses it was captured with. The first call, and the first one after an
    address changed, runs the work directly, as a warm-up for TensorRT; the next captures it.

    Args:
        record: Captures the work that a function enqueues; None never captures.
    """

    def __init__(self, record: Callable[[Callable[[], None]], RecordedGraph] | None) -> None:
        self._record = record
        self._addresses: tuple[int, ...] | None = None
        self._graph: RecordedGraph | None = None

    def enqueue(self, addresses: tuple[int, ...], work: Callable[[], None]) -> None:
        """Enqueue the work once; it reads and writes at these addresses."""
        stated = addresses == self._addresses
        if not stated:
            self.close()
            self._addresses = addresses
        elif self._graph is None and self._record is not None:
            self._graph = self._try(self._record, work)
        if self._graph is None:
            work()
        else:
            self._graph.launch()

    def close(self) -> None:
        """Free the graph."""
        if self._graph is not None:
            self._graph.close()
        self._graph = self._addresses = None

    def _try(
        self,
        record: Callable[[Callable[[], None]], RecordedGraph],
        work: Callable[[], None],
    ) -> RecordedGraph | None:
        try:
            return record(work)
        except BackendError as error:
            _LOGGER.warning("%s; running without CUDA graphs", error)
            self._record = None
            return None
