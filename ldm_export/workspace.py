"""Where a bundle is put together, so that no crash leaves a broken one.

Work goes on in a sibling of the bundle, `<out>.partial`. Each stage (a component, the golden
outputs, …) writes its files, syncs them and then its record; a later export takes over every stage
whose record is equal, from the partial folder or from the bundle that is about to be replaced.
When all is there the manifest is written and the two folders change places in one step.
"""

import ctypes
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from ldm_export.errors import ExportError
from ldm_runtime.errors import BundleError, ManifestError
from ldm_runtime.manifest import (
    MANIFEST_NAME,
    ComponentRecord,
    FileRecord,
    Manifest,
    check_file,
    encode_manifest,
    load_manifest,
    sha256_of,
)

_RECORDS = ".stages"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

#: What became of a stage.
Outcome = Literal["built", "reused"]


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """A finished stage.

    Attributes:
        key: Hash of everything its files were made from.
        files: What it wrote.
        component: The component it made, if it made one.
    """

    key: str
    files: tuple[FileRecord, ...]
    component: ComponentRecord | None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of an export.

    Attributes:
        name: For progress and records.
        key: Hash of everything its files are made from.
        paths: The files and folders, inside the bundle, that are this stage's alone.
        build: Writes them under the folder it is given, and returns the component's record.
    """

    name: str
    key: str
    paths: tuple[str, ...]
    build: Callable[[Path], ComponentRecord | None]


def check_destination(out: Path) -> None:
    """Refuse to export over anything that is not a bundle.

    Raises:
        ExportError: `out` is a file, or a folder with something else in it.
    """
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; give --out the name of a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_NAME).is_file():
        raise ExportError(
            f"{out} exists and is not a bundle (it has no {MANIFEST_NAME}), so it is left alone; "
            "give --out another folder"
        )
    partial = _partial(out)
    if partial.exists() and not partial.is_dir():
        raise ExportError(f"{partial} is a file, but the export needs a folder there; move it")
    if partial.is_dir() and any(partial.iterdir()) and not (partial / _RECORDS).is_dir():
        raise ExportError(
            f"{partial} exists and is not an interrupted export; move it or give another --out"
        )


class Workspace:
    """The partial folder of one export, locked against a second one.

    Args:
        out: The bundle's final place.
        on_write: Called with a label before every change on disk; tests interrupt here.
    """

    def __init__(self, out: Path, on_write: Callable[[str], None] = lambda _: None) -> None:
        check_destination(out)
        self.out, self.folder, self._on_write = out, _partial(out), on_write
        self._previous = _published_stages(out)
        self._finished: dict[str, StageRecord] = {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and keep others out of it.

        Raises:
            ExportError: Another export to the same place is running.
        """
        (self.folder / _RECORDS).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise ExportError(f"another export to {self.out} is running; wait for it") from None
        try:
            yield
        finally:
            os.close(descriptor)

    def can_reuse(self, stage: Stage) -> bool:
        """Tell whether a stage is already there, unchanged."""
        return self._saved(stage) is not None or self._published(stage) is not None

    def run(self, stage: Stage) -> tuple[StageRecord, Outcome]:
        """Take a stage over if its record and files are what they should be, or build it."""
        saved, outcome = self._saved(stage), "reused"
        if saved is None:
            self._clear(stage)
            published = self._published(stage)
            if published is not None:
                self._link(published.files)
                saved = published
            else:
                self._on_write(f"build {stage.name}")
                saved, outcome = self._build(stage), "built"
            self._on_write(f"record {stage.name}")
            _write(self._record_path(stage), msgspec.json.encode(saved))
        self._finished[stage.name] = saved
        return saved, "built" if outcome == "built" else "reused"

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file of the finished stages."""
        return tuple(file for record in self._finished.values() for file in record.files)

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest and put the bundle in its place, in one step."""
        wanted = {record.path for record in manifest.files}
        for path in _files(self.folder):
            relative = path.relative_to(self.folder)
            if relative.parts[0] != _RECORDS and relative.as_posix() not in wanted:
                self._on_write(f"remove {relative}")
                path.unlink()
        self._on_write("manifest")
        _write(self.folder / MANIFEST_NAME, encode_manifest(manifest))
        check_destination(self.out)
        self._on_write("swap")
        _swap(self.folder, self.out)
        _sync(self.out.parent)
        self._on_write("tidy")
        shutil.rmtree(self.out / _RECORDS)
        self._on_write("remove old")
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _record_path(self, stage: Stage) -> Path:
        return self.folder / _RECORDS / f"{stage.name}.json"

    def _saved(self, stage: Stage) -> StageRecord | None:
        try:
            record = msgspec.json.decode(self._record_path(stage).read_bytes(), type=StageRecord)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return record if _is_intact(self.folder, record, stage.key) else None

    def _published(self, stage: Stage) -> StageRecord | None:
        record = self._previous.get(stage.name)
        return record if record and _is_intact(self.out, record, stage.key) else None

    def _clear(self, stage: Stage) -> None:
        self._on_write(f"clear {stage.name}")
        self._record_path(stage).unlink(missing_ok=True)
        for path in (self.folder / name for name in stage.paths):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _link(self, files: Iterable[FileRecord]) -> None:
        for file in files:
            self._on_write(f"link {file.path}")
            target = self.folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.out / file.path, target)
            except OSError:  # a file system without hard links
                shutil.copy2(self.out / file.path, target)

    def _build(self, stage: Stage) -> StageRecord:
        component = stage.build(self.folder)
        paths = sorted(
            path
            for name in stage.paths
            for path in (_files(self.folder / name) if (self.folder / name).is_dir() else
                         [self.folder / name])
        )
        for path in paths:
            self._on_write(f"sync {path.relative_to(self.folder)}")
            _sync(path)
        return StageRecord(
            key=stage.key,
            files=tuple(
                FileRecord(
                    path=path.relative_to(self.folder).as_posix(),
                    sha256=sha256_of(path),
                    size_bytes=path.stat().st_size,
                )
                for path in paths
            ),
            component=component,
        )


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _published_stages(out: Path) -> dict[str, StageRecord]:
    """Return the stages of the bundle at `out`, or none if there is no readable one."""
    try:
        manifest = load_manifest(out)
    except ManifestError:
        return {}
    files = {record.path: record for record in manifest.files}
    stages = {}
    for component in manifest.components:
        golden = f"golden/components/{component.name}.npz"
        own = tuple(f for path, f in files.items() if path.startswith(f"{component.name}/"))
        stages[component.name] = StageRecord(
            key=component.key,
            files=(*own, *(files[path] for path in [golden] if path in files)),
            component=component,
        )
    golden_files = tuple(
        record
        for path, record in files.items()
        if any(path.startswith(f"{folder}/") for folder in manifest.golden)
    )
    stages["golden"] = StageRecord(key=manifest.golden_key, files=golden_files, component=None)
    return stages


def _is_intact(folder: Path, record: StageRecord, key: str) -> bool:
    if record.key != key:
        return False
    try:
        for file in record.files:
            check_file(folder, file)
    except BundleError:
        return False
    return True


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _write(path: Path, data: bytes) -> None:
    """Write a file so that it has all of `data` or does not exist."""
    partial = path.with_name(path.name + ".new")
    partial.write_bytes(data)
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(new: Path, out: Path) -> None:
    """Put `new` at `out`; what was there, if anything, is at `new` afterwards."""
    if not out.exists():
        new.rename(out)
        return
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(new), os.fsencode(out)
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(out))
    old = out.with_name(out.name + ".old")
    out.rename(old)
    new.rename(out)
    old.rename(new)
