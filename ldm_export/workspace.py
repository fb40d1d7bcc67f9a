"""The folder in which a bundle is put together, so that no crash leaves a broken one.

Work goes on in a sibling of the bundle, `<out>.partial`, which holds

* `steps/`   the records of finished steps; by this folder the whole is recognised,
* `bundle/`  the new bundle; once it is published, the one it replaced,
* `old/`     the replaced bundle, where the system cannot exchange two folders in one step.

Each step (a component, the golden outputs, …) writes its files, syncs them and then its record; a
later export reuses every step whose record is equal, from the partial folder or from the bundle
that is about to be replaced. After the last step the manifest is written and the two bundles change
places.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from ldm_export.errors import ExportError
from ldm_export.replacement import check_replacement
from ldm_runtime.bundle.files import check_file, sha256_of
from ldm_runtime.bundle.manifest import (
    MANIFEST_NAME,
    ComponentRecord,
    FileRecord,
    Manifest,
    encode_manifest,
    load_manifest,
    without_int8,
)
from ldm_runtime.bundle.quantized_graphs import INT8_FILES
from ldm_runtime.diagnostics.golden_requests import SHEET_FILE
from ldm_runtime.durable import (
    exchange_folders,
    is_part,
    link_or_copy,
    locked_folder,
    sync,
    sync_folders,
    write_file,
)
from ldm_runtime.engines.records import (
    ENGINES_FOLDER,
    EngineRecord,
    engine_key,
    load_engine_records,
)
from ldm_runtime.engines.store import engine_step
from ldm_runtime.engines.trust import is_trusted_engine
from ldm_runtime.errors import BundleError, ManifestError

_STEPS, _BUNDLE, _OLD = "steps", "bundle", "old"

#: Whether a step was built or reused.
Outcome = Literal["built", "reused"]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A finished step.

    Attributes:
        key: Hash of everything its files were made from.
        files: The files it wrote.
        component: The component it made, if it made one.
    """

    key: str
    files: tuple[FileRecord, ...]
    component: ComponentRecord | None


@dataclass(frozen=True, kw_only=True)
class ExportStep:
    """One step of an export.

    Attributes:
        name: For progress and records.
        key: Hash of everything its files are made from.
        paths: The files and folders, inside the bundle, that only this step writes.
        build: Writes them under the folder it is given, and returns the component's record.
    """

    name: str
    key: str
    paths: tuple[str, ...]
    build: Callable[[Path], ComponentRecord | None]


def check_destination(out: Path) -> None:
    """Refuse to export over anything that is not a bundle, or not only a bundle.

    Raises:
        ExportError: `out` is a file, a mount point, or a folder with something else in it; or the
            place of the partial bundle is taken.
    """
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; give --out the name of a folder")
    if os.path.ismount(out):
        raise ExportError(f"{out} is a mount point, which cannot be replaced; add a folder's name")
    if out.is_dir() and any(out.iterdir()):
        _check_bundle(out)
    partial = _partial(out)
    if partial.exists() and not partial.is_dir():
        raise ExportError(f"{partial} is a file, but the export needs a folder there; move it")
    if partial.is_dir() and any(partial.iterdir()) and not (partial / _STEPS).is_dir():
        raise ExportError(
            f"{partial} exists and is not an interrupted export; move it or give another --out"
        )


class Workspace:
    """The partial folder of one export, locked against a second one.

    Args:
        out: The bundle's final place.
        on_write: Called with a label before every change on disk; tests interrupt here.
        exchange: Lets two folders change places, or returns False if the operating system cannot.
    """

    def __init__(
        self,
        out: Path,
        on_write: Callable[[str], None] = lambda _: None,
        exchange: Callable[[Path, Path], bool] = exchange_folders,
    ) -> None:
        check_destination(out)
        self.out = out.resolve()
        self._partial = _partial(self.out)
        self._folder = self._partial / _BUNDLE
        self._on_write, self._exchange = on_write, exchange
        self._previous: dict[str, StepRecord] = {}
        self._finished: dict[str, StepRecord] = {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the partial folder and keep others out of it.

        Raises:
            ExportError: Another export to the same place is running.
        """
        self._on_write("lock")
        running = ExportError(f"another export to {self.out} is running; wait for it")
        with locked_folder(self._partial, running):
            self._prepare()
            yield

    def find(self, step: ExportStep) -> StepRecord | None:
        """Return the record of a step that is already done, with its files unchanged, or None."""
        return self._saved(step) or self._published(step)

    def look(self) -> None:
        """Take note of what the bundle in its place has, without locking or changing anything."""
        self._previous = _published_steps(self.out)

    @property
    def drops_int8(self) -> bool:
        """Whether the bundle in its place has graphs in 8 bits, which no export takes over."""
        try:
            return load_manifest(self.out).quantization is not None
        except ManifestError:
            return False

    def can_reuse(self, step: ExportStep) -> bool:
        """Return whether a step is already done, with its files unchanged."""
        return self.find(step) is not None

    def run(self, step: ExportStep) -> tuple[StepRecord, Outcome]:
        """Reuse a step if its record and files are what they should be, or build it."""
        outcome: Outcome = "reused"
        record = self._saved(step)
        if record is None:
            self._clear(step)
            record = self._published(step)
            if record is not None:
                self._link(record.files)
            else:
                self._on_write(f"build {step.name}")
                record, outcome = self._build(step), "built"
            self._on_write(f"record {step.name}")
            write_file(self._record_path(step), msgspec.json.encode(record))
        self._finished[step.name] = record
        return record, outcome

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file of the finished steps."""
        return tuple(file for record in self._finished.values() for file in record.files)

    def publish(self, manifest: Manifest, *, replace: bool) -> None:
        """Write the manifest, put the bundle in its place, and remove what it replaces.

        Args:
            manifest: The new bundle's.
            replace: Whether the bundle of another checkpoint may be replaced.

        Raises:
            ExportError: Something that must not be replaced has come to that place, or engines are
                being built in the bundle there.
        """
        self._remove_strays({record.path for record in manifest.files})
        self._on_write("manifest")
        write_file(self._folder / MANIFEST_NAME, encode_manifest(manifest))
        check_destination(self.out)  # an export takes minutes, in which anything may have happened
        if not replace:
            made_from = manifest.build
            check_replacement(self.out, made_from.checkpoint, made_from.checkpoint_sha256)
        with self._locked_out():
            self._swap()
        sync(self.out.parent)
        for name in (_BUNDLE, _OLD, _STEPS):  # without steps/ it would not be recognised
            if (self._partial / name).exists():
                self._on_write(f"remove {name}")
                shutil.rmtree(self._partial / name)
        self._on_write("remove partial")
        self._partial.rmdir()

    def _prepare(self) -> None:
        self._on_write("prepare")
        (self._partial / _STEPS).mkdir(exist_ok=True)
        old = self._partial / _OLD
        if old.exists() and not self.out.exists():  # interrupted between the renames of _swap
            self._on_write("restore")
            old.rename(self.out)
        self._folder.mkdir(exist_ok=True)
        (self._folder / MANIFEST_NAME).unlink(missing_ok=True)
        self.look()

    def _locked_out(self) -> AbstractContextManager[None]:
        """Keep `ldm build-engines` and others out of the bundle that is to be replaced."""
        building = ExportError(
            f"another process is changing {self.out}, so it is not replaced; export again "
            "afterwards, which takes over all that is done"
        )
        return locked_folder(self.out, building) if self.out.exists() else nullcontext()

    def _swap(self) -> None:
        self._on_write("swap")
        if not self.out.exists():
            self._folder.rename(self.out)
        elif not self._exchange(self._folder, self.out):
            old = self._partial / _OLD
            if old.exists():
                shutil.rmtree(old)
            self.out.rename(old)
            self._on_write("replace")
            self._folder.rename(self.out)

    def _remove_strays(self, wanted: set[str]) -> None:
        """Remove the files of an earlier, interrupted export of another model."""
        for folder, _, names in os.walk(self._folder, topdown=False):
            for path in (Path(folder, name) for name in names):
                if path.relative_to(self._folder).as_posix() not in wanted:
                    self._on_write(f"remove {path.relative_to(self._folder)}")
                    path.unlink()
            if not any(Path(folder).iterdir()) and Path(folder) != self._folder:
                Path(folder).rmdir()

    def _record_path(self, step: ExportStep) -> Path:
        return self._partial / _STEPS / f"{step.name}.json"

    def _saved(self, step: ExportStep) -> StepRecord | None:
        try:
            record = msgspec.json.decode(self._record_path(step).read_bytes(), type=StepRecord)
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        return record if _is_intact(self._folder, record, step.key) else None

    def _published(self, step: ExportStep) -> StepRecord | None:
        record = self._previous.get(step.name)
        return record if record and _is_intact(self.out, record, step.key) else None

    def _clear(self, step: ExportStep) -> None:
        self._on_write(f"clear {step.name}")
        self._record_path(step).unlink(missing_ok=True)
        for path in (self._folder / name for name in step.paths):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _link(self, files: Sequence[FileRecord]) -> None:
        targets = [self._folder / file.path for file in files]
        for file, target in zip(files, targets, strict=True):
            self._on_write(f"link {file.path}")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not link_or_copy(self.out / file.path, target):
                sync(target)
        sync_folders(targets, self._folder)

    def _build(self, step: ExportStep) -> StepRecord:
        component = step.build(self._folder)
        paths = [path for name in step.paths for path in _files(self._folder / name)]
        for path in paths:
            self._on_write(f"sync {path.relative_to(self._folder)}")
            sync(path)
        sync_folders(paths, self._folder)
        files = tuple(
            FileRecord(
                path=path.relative_to(self._folder).as_posix(),
                sha256=sha256_of(path),
                size_bytes=path.stat().st_size,
            )
            for path in paths
        )
        return StepRecord(key=step.key, files=files, component=component)


@dataclass(frozen=True, kw_only=True)
class _ListedFile:
    path: str


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """The fields that every version of a manifest has."""

    schema_version: int
    files: tuple[_ListedFile, ...]


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _check_bundle(folder: Path) -> None:
    """Raise unless `folder` is a bundle, of any version, and holds no other file."""
    try:
        listing = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes(), type=_Listing)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ExportError(
            f"{folder} exists and is not a bundle (it has no {MANIFEST_NAME} of one), so it is "
            "left alone; give --out another folder"
        ) from None
    known = {MANIFEST_NAME, *(file.path for file in listing.files)}
    found = (path.relative_to(folder).as_posix() for path in _files(folder))
    other = sorted(path for path in set(found) - known if not _is_left_over(path))
    if other:
        raise ExportError(
            f"{folder} holds files that are not of its bundle and would be lost "
            f"({', '.join(other[:3])}); move them or give --out another folder"
        )


def _is_left_over(path: str) -> bool:
    """Return whether a file is of no use without the process that made it.

    Next to engines lie caches of runtimes and files of interrupted builds, and next to graphs those
    of a quantisation that was interrupted.
    """
    return (
        path.startswith(f"{ENGINES_FOLDER}/")
        or PurePosixPath(path).name in INT8_FILES
        or is_part(PurePosixPath(path).name)
    )


def _published_steps(out: Path) -> dict[str, StepRecord]:
    """Return the steps of the bundle at `out`, or none if there is no readable bundle."""
    try:
        manifest = load_manifest(out)
    except ManifestError:
        return {}
    manifest = without_int8(manifest)  # measured with networks and outputs that may be others now
    files = {
        each.path: each for each in manifest.files if ".." not in PurePosixPath(each.path).parts
    }
    steps = {
        each.name: StepRecord(
            key=each.key,
            files=_listed(files, (f"{each.name}/", f"golden/components/{each.name}.npz")),
            component=each,
        )
        for each in manifest.components
    }
    golden = _listed(files, (*(f"{folder}/" for folder in manifest.golden), SHEET_FILE))
    steps["golden"] = StepRecord(key=manifest.golden_key, files=golden, component=None)
    try:
        engines = load_engine_records(out, manifest)
    except BundleError:
        engines = ()
    for engine in filter(_was_built_here, engines):
        steps[engine_step(engine)] = StepRecord(
            key=engine_key(engine),
            files=_listed(files, (engine.engine_path, engine.record_path)),
            component=None,
        )
    return steps


def _was_built_here(engine: EngineRecord) -> bool:
    return is_trusted_engine(engine.plan_sha256)


def _listed(files: dict[str, FileRecord], prefixes: tuple[str, ...]) -> tuple[FileRecord, ...]:
    return tuple(file for path, file in files.items() if path.startswith(prefixes))


def _is_intact(folder: Path, record: StepRecord, key: str) -> bool:
    if record.key != key or not record.files:
        return False
    try:
        for file in record.files:
            check_file(folder, file)
    except BundleError:
        return False
    return True


def _files(place: Path) -> list[Path]:
    """Return the files below a folder, sorted; for a file, the file itself."""
    if not place.is_dir():
        return [place]
    return sorted(path for path in place.rglob("*") if path.is_symlink() or not path.is_dir())
