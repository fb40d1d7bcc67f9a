"""Storage of engines in an existing bundle, so that no interruption leaves it broken.

New engine files and records are collected in `<folder>.partial` next to their folder; the engines
of an interrupted build are reused if their build spec is unchanged. A manifest never names a file
that is missing or outdated: before a folder is replaced, a manifest without it is written. While
engines are built the bundle's folder is locked, which keeps an export from replacing it.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from ldm_runtime.bundle.files import check_file, sha256_of
from ldm_runtime.bundle.graph_files import check_graph_files
from ldm_runtime.bundle.manifest import (
    MANIFEST_NAME,
    ComponentRecord,
    FileRecord,
    Manifest,
    encode_manifest,
    load_manifest,
)
from ldm_runtime.durable import link_or_copy, locked_folder, sync, write_file
from ldm_runtime.engines.build import build_engine
from ldm_runtime.engines.build_specs import (
    ComponentFiles,
    EngineOptions,
    Toolchain,
    choose_toolchain,
    make_build_specs,
)
from ldm_runtime.engines.records import (
    ENGINES_FOLDER,
    EngineBuildSpec,
    EngineRecord,
    decode_engine_record,
    encode_engine_record,
)
from ldm_runtime.engines.trust import cache_folder, is_trusted_engine, trust_engine
from ldm_runtime.errors import BundleError, EngineBuildError
from ldm_runtime.progress import Progress, Silent

_PARTIAL = ".partial"

#: Called with a label before every change on disk; tests interrupt there.
OnWrite = Callable[[str], None]


def add_engines(
    bundle: Path,
    options: EngineOptions,
    *,
    progress: Progress | None = None,
    on_write: OnWrite = lambda _: None,
) -> Manifest:
    """Build the engines of a bundle, or reuse those with the same build spec.

    Engines for other builders, versions and targets are kept if they are of the same graphs and
    weights; all others are removed.

    Args:
        bundle: The bundle's folder.
        options: The engines to build.
        progress: Told about every engine.
        on_write: Called with a label before every change on disk.

    Returns:
        The bundle's new manifest.

    Raises:
        EngineBuildError: No builder can be used, or it fails; another build or an export keeps the
            bundle locked; or its manifest was changed during the build.
        BundleError: The bundle is not one, or a graph is altered or names other files.
    """
    load_manifest(bundle)  # raises if this is not a bundle
    toolchain = choose_toolchain(options)
    if isinstance(toolchain, str):
        raise EngineBuildError(toolchain)
    with _locked(bundle):
        store = _Store(bundle=bundle, manifest=load_manifest(bundle), on_write=on_write)
        files = component_files(store.manifest.components, store.manifest.files)
        if not files:
            raise EngineBuildError(
                f"{bundle} has no fp16 graphs to build engines from; export it without --no-fp16"
            )
        build_specs = make_build_specs(toolchain, options.sizes, store.manifest.spec, files)
        for record in store.manifest.files:
            if record.path.startswith(tuple(f"{name}/" for name in files)):
                check_file(bundle, record)
        for component in store.manifest.components:
            for graph in component.graphs:
                check_graph_files(bundle, graph.file, component.weights_file)
        progress = progress or Silent()
        progress.plan(dict.fromkeys(map(engine_step, build_specs)))
        for build_spec in build_specs:
            _obtain(store, build_spec, toolchain, progress)
        return _publish(store, build_specs)


def component_files(
    components: Iterable[ComponentRecord], files: Iterable[FileRecord]
) -> dict[str, ComponentFiles]:
    """Return the source files of engines, by component."""
    hashes = {record.path: record.sha256 for record in files}
    return {
        component.name: ComponentFiles(
            graph_sha256=hashes[graph.file], weights_sha256=hashes[component.weights_file]
        )
        for component in components
        for graph in component.graphs
        if graph.variant == "fp16"
    }


def engine_step(build_spec: EngineBuildSpec) -> str:
    """Return the name of an engine's build step, for progress."""
    target = f" {build_spec.targets[0]}" if len(build_spec.targets) == 1 else ""
    return f"{build_spec.component} engine{target}"


def write_engine(
    graph: Path,
    build_spec: EngineBuildSpec,
    toolchain: Toolchain,
    folder: Path,
    *,
    on_progress: Callable[[float], None] = lambda _: None,
) -> EngineRecord:
    """Build an engine and write its engine file and, last, its record.

    Args:
        graph: The fp16 graph.
        build_spec: The engine to build.
        toolchain: The builder.
        folder: Existing folder for the two files.
        on_progress: Called with the fraction that is done, from another thread.

    Raises:
        EngineBuildError: The builder cannot be used, or fails.
    """
    started = time.monotonic()
    engine_file = folder / Path(build_spec.engine_path).name
    build_engine(
        graph,
        build_spec,
        engine_file,
        on_progress=on_progress,
        timing_cache=_timing_cache(build_spec),
    )
    sync(engine_file)
    record = EngineRecord(
        **build_spec.as_fields(),
        plan=engine_file.name,
        plan_sha256=sha256_of(engine_file),
        driver_version=toolchain.gpu.driver_version if toolchain.gpu else None,
        seconds=round(time.monotonic() - started, 1),
        size_bytes=engine_file.stat().st_size,
    )
    write_file(folder / Path(build_spec.record_path).name, encode_engine_record(record))
    trust_engine(record.plan_sha256)
    return record


@dataclass(frozen=True, kw_only=True)
class _Store:
    bundle: Path
    manifest: Manifest
    on_write: OnWrite

    def target(self, build_spec: EngineBuildSpec) -> Path:
        """Return the folder of an engine's files."""
        return self.bundle / build_spec.folder

    def partial(self, build_spec: EngineBuildSpec) -> Path:
        """Return the partial folder of an engine's files."""
        return self.bundle / (build_spec.folder + _PARTIAL)

    def graph(self, build_spec: EngineBuildSpec) -> Path:
        """Return the graph that the engine is built from."""
        component = self.manifest.component(build_spec.component)
        (file,) = (graph.file for graph in component.graphs if graph.variant == "fp16")
        return self.bundle / file

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace the bundle's manifest in one step."""
        self.on_write("manifest")
        write_file(self.bundle / MANIFEST_NAME, encode_manifest(manifest))


def _obtain(
    store: _Store, build_spec: EngineBuildSpec, toolchain: Toolchain, progress: Progress
) -> None:
    """Build an engine into its partial folder, unless it is there or already in place."""
    step, outcome = engine_step(build_spec), "reused"
    progress.begin(step)
    partial = store.partial(build_spec)
    if not any(_holds(folder, build_spec) for folder in (store.target(build_spec), partial)):
        store.on_write(f"build {build_spec.engine_path}")
        partial.mkdir(parents=True, exist_ok=True)
        for path in (
            build_spec.record_path,
            build_spec.engine_path,
        ):  # perhaps links to published ones
            (partial / Path(path).name).unlink(missing_ok=True)
        write_engine(
            store.graph(build_spec), build_spec, toolchain, partial, on_progress=progress.advance
        )
        outcome = "built"
    progress.end(step, outcome)


def _timing_cache(build_spec: EngineBuildSpec) -> Path | None:
    """Return the file of TensorRT's kernel times: by version and GPU, outside any bundle."""
    if build_spec.builder != "tensorrt":
        return None
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", build_spec.gpu_name or "unknown")
    name = f"tensorrt-{build_spec.builder_version}-{gpu}.timing"
    return cache_folder() / name


def _publish(store: _Store, build_specs: Sequence[EngineBuildSpec]) -> Manifest:
    """Move the partial folders into place and list their files in the manifest."""
    folders = sorted({each.folder for each in build_specs if not _is_published(store, each)})
    new = [build_spec for build_spec in build_specs if build_spec.folder in folders]
    for build_spec in new:
        if _holds(store.target(build_spec), build_spec):  # perhaps unlisted
            for path in (build_spec.engine_path, build_spec.record_path):
                store.on_write(f"link {path}")
                _link(store.bundle / path, store.partial(build_spec))
    records = _file_records(store, new)  # reads gigabytes, while the old engines are still listed
    _check_unchanged(store)
    # The manifest drops these folders before they are replaced, and lists them again afterwards.
    kept = _without(store, folders)
    if kept != store.manifest:
        store.write_manifest(kept)
    for folder in folders:
        target = store.bundle / folder
        store.on_write(f"replace {folder}")
        if target.exists():
            shutil.rmtree(target)
        store.on_write(f"place {folder}")
        store.bundle.joinpath(folder + _PARTIAL).rename(target)
        sync(store.bundle / ENGINES_FOLDER)
    if new:
        kept = replace(
            kept,
            engines=(*kept.engines, *(build_spec.record_path for build_spec in new)),
            files=(*kept.files, *records),
        )
        store.write_manifest(kept)
    _remove_unlisted(store, kept)
    return kept


def _check_unchanged(store: _Store) -> None:
    """Refuse to write the manifest that was read before the build over another one.

    Locks keep exports out, but not copies of bundles, nor what runs on other machines.

    Raises:
        EngineBuildError: The manifest is another one.
        ManifestError: There is none.
    """
    if load_manifest(store.bundle) != store.manifest:
        raise EngineBuildError(
            f"{store.bundle / MANIFEST_NAME} was changed while engines were built; build them again"
        )


def _file_records(store: _Store, build_specs: Sequence[EngineBuildSpec]) -> list[FileRecord]:
    """Return the records that files in partial folders get once they are in place."""
    places = {
        path: store.partial(each) / Path(path).name
        for each in build_specs
        for path in (each.engine_path, each.record_path)
    }
    return [
        FileRecord(path=path, sha256=sha256_of(place), size_bytes=place.stat().st_size)
        for path, place in sorted(places.items())
    ]


def _without(store: _Store, folders: Sequence[str]) -> Manifest:
    """Return the manifest without engines of these folders and those of other graphs."""
    files = component_files(store.manifest.components, store.manifest.files)
    kept = []
    for listed in store.manifest.engines:
        try:
            path = store.bundle / listed
            record = decode_engine_record(path.read_bytes(), path)
        except (OSError, BundleError):
            continue
        sources = ComponentFiles(
            graph_sha256=record.graph_sha256, weights_sha256=record.weights_sha256
        )
        if record.folder not in folders and files.get(record.component) == sources:
            kept.append(record)
    paths = {path for record in kept for path in (record.engine_path, record.record_path)}
    return replace(
        store.manifest,
        engines=tuple(record.record_path for record in kept),
        files=tuple(
            file
            for file in store.manifest.files
            if file.path in paths or not file.path.startswith(f"{ENGINES_FOLDER}/")
        ),
    )


def _remove_unlisted(store: _Store, manifest: Manifest) -> None:
    """Remove engines that the manifest no longer names, also those of interrupted builds.

    A backend's files next to an engine file that stays are kept.
    """
    listed = {file.path for file in manifest.files}
    folders = {Path(path).parent.name for path in manifest.engines}
    for folder in sorted((store.bundle / ENGINES_FOLDER).iterdir()):
        if folder.name not in folders:
            store.on_write(f"remove {folder.name}")
            shutil.rmtree(folder)
            continue
        for path in sorted((*folder.glob("*.plan"), *folder.glob("*.json"))):
            if path.relative_to(store.bundle).as_posix() not in listed:
                store.on_write(f"remove {path.name}")
                path.unlink()


def _is_published(store: _Store, build_spec: EngineBuildSpec) -> bool:
    return build_spec.record_path in store.manifest.engines and _holds(
        store.target(build_spec), build_spec
    )


def _holds(folder: Path, build_spec: EngineBuildSpec) -> bool:
    """Tell whether a folder has the complete engine of a build spec, and it was built here."""
    path = folder / Path(build_spec.record_path).name
    try:
        record = decode_engine_record(path.read_bytes(), path)
        engine_file = folder / record.plan
        if record.build_spec != build_spec or not is_trusted_engine(record.plan_sha256):
            return False
        return sha256_of(engine_file) == record.plan_sha256
    except (OSError, BundleError):
        return False


def _link(path: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    target = folder / path.name
    target.unlink(missing_ok=True)
    link_or_copy(path, target)


def _locked(bundle: Path) -> AbstractContextManager[None]:
    running = EngineBuildError(f"another process is changing {bundle}; wait for it")
    return locked_folder(bundle, running)
