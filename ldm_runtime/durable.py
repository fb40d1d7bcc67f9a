"""Changes on disk that are there after a crash, or not at all."""

import ctypes
import errno
import fcntl
import os
import sys
from collections.abc import Iterable
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# The kernel, or the file system, cannot exchange; an overlay cannot for folders of its lower layer.
_CANNOT_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EXDEV})


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it has all of `data` or is as it was."""
    partial = path.with_name(path.name + ".new")
    partial.write_bytes(data)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


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
    """Create a folder and lock it; return the descriptor, which holds the lock until it is closed.

    The lock goes with the process, however that ends.

    Raises:
        BlockingIOError: Somebody else holds it.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # its last owner removed it in between
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may just have removed the folder that was locked here.
            if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


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
