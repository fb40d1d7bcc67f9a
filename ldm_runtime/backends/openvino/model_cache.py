"""Compiled models in this user's cache folder, one folder each.

A compiled model is code for the shapes, the precision, the threads and the processor that it was
compiled for. Its folder is called after the hash of all that, of its graph and weights and of
OpenVINO's version, appears complete or not at all, and is read only if no one else can write there:
see `engines.trust`. OpenVINO's own key lacks precision and threads, and it writes in place.
"""

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ldm_runtime.durable import sync
from ldm_runtime.engines.trust import cache_folder, make_own_folder

_LOGGER = logging.getLogger(__name__)
_FOLDER, _PARTIAL = "openvino", "partial-"
#: Most bytes on disk; the models that were used longest ago go first. One holds the weights of its
#: network once more.
MOST_BYTES = 20_000_000_000
_STALE_SECONDS = 3600.0

Compiled = TypeVar("Compiled")


@dataclass(frozen=True, kw_only=True)
class ModelCache:
    """The compiled models of one network.

    Attributes:
        parent: The folder of all compiled models.
        key: Everything that they were compiled from and for, but their shapes.
    """

    parent: Path
    key: tuple[str, ...]

    def compiled(self, shapes: object, compile_in: Callable[[Path | None], Compiled]) -> Compiled:
        """Return a compiled model, and keep it for the next process where that can be.

        Args:
            shapes: Its shapes; equal ones have equal representations.
            compile_in: Compiles with a folder of OpenVINO's, from which a model is read that is
                there, and into which it is written otherwise; None is without one.
        """
        folder = self.parent / _hash([*self.key, repr(shapes)])
        if _is_there(folder):
            return compile_in(folder)
        try:
            partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.parent))
        except OSError as error:  # the disk is full, or someone has removed the folder
            _warn(self.parent, error)
            return compile_in(None)
        try:
            found = compile_in(partial)
            _move(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        remove_oldest(self.parent, but=folder)
        return found


def model_cache(key: Sequence[str]) -> ModelCache | None:
    """Return the compiled models of a network; None without a folder that is safe.

    Args:
        key: Hashes and settings, of all that they are compiled from and for but their shapes.
    """
    parent = cache_folder() / _FOLDER
    try:
        make_own_folder(parent)
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        _warn(parent, error)
        return None
    return ModelCache(parent=parent, key=tuple(key))


def _warn(parent: Path, error: OSError) -> None:
    _LOGGER.warning(
        "no compiled models are kept in %s (%s), so that every process compiles them; "
        "XDG_CACHE_HOME can name another folder",
        parent,
        error.strerror,
    )


def remove_oldest(parent: Path, but: Path) -> None:
    """Remove the models that were used longest ago until all have few enough bytes.

    Args:
        parent: The folder of all compiled models.
        but: The one that stays.
    """
    _remove_stale(parent)
    folders = sorted(_folders(parent, is_partial=False), key=lambda each: each[1])
    sizes = {folder: _bytes_of(folder) for folder, _ in folders}
    excess = sum(sizes.values()) - MOST_BYTES
    for folder, size in sizes.items():
        if excess > 0 and folder != but:
            shutil.rmtree(folder, ignore_errors=True)  # a process that has read it keeps its pages
            excess -= size


def _remove_stale(parent: Path) -> None:
    """Remove what processes that were killed while they compiled have left."""
    for folder, modified in _folders(parent, is_partial=True):
        if modified < time.time() - _STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _move(partial: Path, folder: Path) -> None:
    """Let a complete folder appear under its name, unless another process was faster."""
    try:
        for file in partial.iterdir():
            sync(file)
        partial.rename(folder)
    except OSError as error:
        _LOGGER.debug("%s is not kept: %s", folder, error)


def _is_there(folder: Path) -> bool:
    """Return whether a folder is there, which is used now."""
    try:
        os.utime(folder)
    except OSError:
        return False
    return True


def _folders(parent: Path, *, is_partial: bool) -> Iterator[tuple[Path, float]]:
    """Yield folders and when they were used; other processes may remove them meanwhile."""
    with suppress(OSError):
        paths = [path for path in parent.iterdir() if path.is_dir()]
        for path in paths:
            if path.name.startswith(_PARTIAL) == is_partial:
                with suppress(OSError):
                    yield path, path.stat().st_mtime


def _bytes_of(folder: Path) -> int:
    total = 0
    with suppress(OSError):
        for file in folder.iterdir():
            total += file.stat().st_size
    return total


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
