"""TensorRT and TensorRT-RTX engines on an NVIDIA GPU, without torch.

An engine is code. It is only opened if the bundle's manifest lists it with its hash, if its record
fits this machine (library and version, compute capability, driver), and if it was built on this
machine or the caller trusts it. A mismatch is reported in one sentence with both values and what to
do.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ldm_runtime.backends.contract import (
    DEFAULT_OPTIONS,
    Abilities,
    EngineSource,
    RunOptions,
    lacks_graph,
)
from ldm_runtime.backends.cuda_device import CudaDevice, Device
from ldm_runtime.backends.tensorrt.engine import EngineFile, Session, TensorRTEngine
from ldm_runtime.backends.tensorrt.runtime import LoadedEngine, cache_path, installed_versions
from ldm_runtime.backends.tensorrt.selection import Machine, Place, choose_record
from ldm_runtime.bundle.files import checked_file
from ldm_runtime.bundle.manifest import ComponentRecord, Manifest
from ldm_runtime.bundle.manifest import GraphVariant as GraphVariant
from ldm_runtime.engines.gpu import Gpu, find_gpu
from ldm_runtime.engines.records import BuilderName, EngineRecord, load_engine_records
from ldm_runtime.engines.trust import is_trusted_engine
from ldm_runtime.errors import BackendError, BundleError
from ldm_runtime.version import extra

_BUILDERS: tuple[BuilderName, ...] = get_args(BuilderName)


def _is_prepared(manifest: Manifest | None) -> bool:
    """Say whether the bundle has engines, so that passing over them is logged."""
    return manifest is not None and bool(manifest.engines)


ABILITIES = Abilities(
    variant="fp16",
    limited_shapes=True,
    min_shared_samples=1,
    is_prepared=_is_prepared,
)


@dataclass(frozen=True, kw_only=True)
class Vendor:
    """The access of this backend to the machine; tests replace it by fakes.

    Attributes:
        find_gpu: Asks the driver for the GPU.
        versions: Returns the versions of installed libraries.
        open_device: Opens the GPU.
        is_trusted: Returns whether an engine file with that hash was built here.
        load_engine_file: Loads an engine file; see `LoadedEngine`.
    """

    find_gpu: Callable[[], Gpu | None] = find_gpu
    versions: Callable[[Iterable[BuilderName]], Mapping[BuilderName, str]] = installed_versions
    open_device: Callable[[], Device] = CudaDevice
    is_trusted: Callable[[str], bool] = is_trusted_engine
    load_engine_file: Callable[
        [Path, EngineRecord, ComponentRecord, RunOptions, Path], EngineFile
    ] = LoadedEngine


_NVIDIA = Vendor()


def open_engine(source: EngineSource, vendor: Vendor = _NVIDIA) -> TensorRTEngine:
    """Open one component of a bundle; see `ldm_runtime.backends.Backend`.

    Engines of the same `source.shared` use one stream and one block of scratch memory.
    """
    records = load_engine_records(source.bundle, source.manifest)
    machine = _machine(source.bundle, records, vendor)
    component = source.component
    trusts = _trusted(vendor, source.options)
    place = Place(bundle=source.bundle, manifest=source.manifest, trusts=trusts)
    record = choose_record(records, component.name, machine, place)
    # Hashed whatever `source.check_hashes` says: an engine file is code.
    engine_file = checked_file(source.bundle, source.manifest, record.engine_path)
    session = source.shared.obtain("tensorrt", lambda: Session(vendor.open_device))
    with session.lock:
        device = session.enter()
        try:
            device.make_current()
            cache = cache_path(record.plan_sha256, machine.gpu)
            loaded = vendor.load_engine_file(engine_file, record, component, source.options, cache)
        except BaseException:
            session.leave()
            raise
    return TensorRTEngine(loaded, record, component, session, source.bundle)


def why_not(
    manifest: Manifest | None,
    bundle: Path | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
    vendor: Vendor = _NVIDIA,
) -> str | None:
    """Say why a bundle cannot run; without its folder, only reasons that hold for any."""
    place = bundle or Path("engines")
    if manifest is not None and not manifest.engines:
        cannot_build = lacks_graph("tensorrt", "fp16", manifest)
        return cannot_build or f"{place} has no TensorRT engines; run `ldm build-engines {place}`"
    try:
        if manifest is None or bundle is None:
            _machine(place, (), vendor)
        else:
            trusts = _trusted(vendor, options)
            _choose_all(Place(bundle=bundle, manifest=manifest, trusts=trusts), vendor)
    except (BackendError, BundleError) as error:
        return str(error)
    return None


def version() -> str:
    """Return the installed libraries and versions, such as "TensorRT-RTX 1.7.1.116"."""
    found = installed_versions(_BUILDERS)
    return ", ".join(f"{name} {each}" for name, each in found.items())


def _choose_all(place: Place, vendor: Vendor) -> None:
    """Choose an engine for every component."""
    records = load_engine_records(place.bundle, place.manifest)
    machine = _machine(place.bundle, records, vendor)
    for component in place.manifest.components:
        choose_record(records, component.name, machine, place)


def _trusted(vendor: Vendor, options: RunOptions) -> Callable[[str], bool]:
    """Return which engine files may run, by hash."""
    return (lambda _: True) if options.trust_engines else vendor.is_trusted


def _machine(bundle: Path, records: tuple[EngineRecord, ...], vendor: Vendor) -> Machine:
    """Return this machine; the driver is checked first, as TensorRT without one crashes."""
    gpu = vendor.find_gpu()
    if gpu is None:
        kinds = sorted({f"{each.builder} {each.builder_version}" for each in records})
        what = f"the engines of {bundle} ({', '.join(kinds)})" if kinds else "TensorRT"
        raise BackendError(
            f"{what} cannot run: this machine has no NVIDIA GPU, or no driver for it"
        )
    builders = tuple({each.builder for each in records}) or _BUILDERS
    versions = vendor.versions(builders)
    if not records and not versions:
        raise BackendError(
            "neither TensorRT nor TensorRT-RTX is installed; install "
            f"{extra('tensorrt')} or {extra('tensorrt-rtx')}"
        )
    return Machine(gpu=gpu, versions=versions)
