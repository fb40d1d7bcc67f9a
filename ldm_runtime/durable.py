"""Changes on disk that are there after a crash, or not at all."""

import ctypes
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_LOGGER = logging.getLogger(__name__)

#: Names of files that `whole_file` is writing.
_PART = re.compile(r"\..+\.[0-9a-f]{8}\.part", re.DOTALL)
_STALE_SECONDS = 3600
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# The kernel, or the file system, cannot exchange; an overlay cannot for folders of its lower layer.
_CANNOT_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EXDEV})


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it has all of `data` or is as it was."""
    with whole_file(path) as file:
        file.write(data)
    sync(path.parent)


@contextmanager
def whole_file(path: Path, *, replace: bool = True, synced: bool = True) -> Iterator[BinaryIO]:
    """Write a file that appears complete, when the block ends, or not at all.

    Args:
        path: The file.
        replace: Whether to replace what is there.
        synced: Whether to wait until it is on the disk, for what a crash must not lose.

    Raises:
        FileExistsError: There is something at `path` that is not to be replaced.
        OSError: The folder cannot be written to.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with partial.open("xb") as file:
            yield file
            if synced:
                file.flush()
                os.fsync(file.fileno())
        if replace:
            partial.replace(path)
        else:
            _rename_without_replacing(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_part(name: str) -> bool:
    """Return whether a file of that name is one that `whole_file` is writing, or left behind."""
    return _PART.fullmatch(name) is not None


def remove_stale_parts(folder: Path, seconds: float = _STALE_SECONDS) -> None:
    """Remove what processes that were killed while they wrote to a folder have left there.

    Args:
        folder: The folder; its parts are hidden files.
        seconds: Age from which a part is stale. A file takes seconds, so an hour is safe; 0 is
            for a folder that the caller has locked.
    """
    before = time.time() - seconds
    try:
        with os.scandir(folder) as entries:
            parts = [entry for entry in entries if _PART.fullmatch(entry.name)]
        for part in parts:
            if part.stat(follow_symlinks=False).st_mtime <= before:
                os.unlink(part)
    except OSError as error:
        _LOGGER.debug("parts of files in %s stay: %s", folder, error.strerror)


def link_or_copy(source: Path, target: Path) -> bool:
    """Make a file appear a second time, by a hard link if possible; return whether it is one."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
        return False
    return True


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(paths: Iterable[Path], top: Path) -> None:
    """Sync every folder between files and `top`, which is above all of them, `top` included."""
    folders = {folder for path in paths for folder in path.parents if folder.is_relative_to(top)}
    for folder in sorted(folders, reverse=True):
        sync(folder)


def lock_folder(folder: Path) -> int:
    """Create a folder if need be and lock it; return the descriptor that holds the lock.

    It is held until the descriptor is closed. The lock goes with the process, however that ends.

    Raises:
        BlockingIOError: Another process holds it.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # its last owner removed it in between
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may just have removed the folder that was locked here.
            if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def locked_folder(folder: Path, refusal: Exception) -> Iterator[None]:
    """Create a folder if need be and hold its lock, as `lock_folder` does, in a `with` block.

    Raises:
        Exception: `refusal`, if another process holds the lock.
    """
    try:
        lock = lock_folder(folder)
    except BlockingIOError:
        raise refusal from None
    try:
        yield
    finally:
        os.close(lock)


def exchange_folders(first: Path, second: Path) -> bool:
    """Let two folders change places in one step; return False if the system cannot do that."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if sys.platform != "linux" or renameat2 is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _rename_without_replacing(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, this never replaces a file
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.rename(path)
