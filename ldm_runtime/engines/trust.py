"""Engine files that this machine built: the only ones that run without being asked for.

An engine file is code, and the author of a bundle writes the manifest that lists it. So the user's
cache folder has a list of the engine files that were built here, by hash, one empty file for each:
nothing is rewritten, so that builds at the same time need no lock and a crash loses nothing. A list
and not a signature next to each engine: both are as safe as the folder that the list or the key
would lie in, and a signature would have to name the machine, or bundles would carry it to others.

The folder also has what libraries keep from run to run: kernel times and compiled kernels, which
are code as well. It is read where no one else may write.
"""

import errno
import logging
import os
import re
import stat
from pathlib import Path

from ldm_runtime.durable import sync, whole_file

_LOGGER = logging.getLogger(__name__)

_FOLDER = "trusted-engines"
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """Return the folder of this user's files, which may not exist yet.

    It is `ldm-deploy` in `$XDG_CACHE_HOME`, by default in `~/.cache`.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    # As the XDG base directory specification demands, a path that is not absolute is ignored.
    parent = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return parent / "ldm-deploy"


def trust_engine(sha256: str) -> None:
    """Note that an engine file with this hash was built here; a failure is logged and ignored."""
    folder = cache_folder() / _FOLDER
    try:
        make_own_folder(folder)
        os.close(os.open(folder / sha256, os.O_WRONLY | os.O_CREAT, 0o600))
        sync(folder)
    except OSError as error:
        _LOGGER.warning(
            "%s cannot be written (%s), so that the engine built here will not be trusted; set "
            "XDG_CACHE_HOME to a folder that can, or pass --trust-engines",
            folder,
            error.strerror,
        )


def is_trusted_engine(sha256: str) -> bool:
    """Return whether an engine file with this hash was built here, by this user.

    A folder that belongs to another user, or that others may write to, says nothing.
    """
    folder = cache_folder() / _FOLDER
    try:
        return (
            is_own_folder(folder)
            and re.fullmatch("[0-9a-f]{64}", sha256) is not None
            and (stat.S_ISREG((folder / sha256).lstat().st_mode))
        )
    except OSError:
        return False


def read_own_file(path: Path, otherwise: str) -> bytes:
    """Return the bytes of a file that a library keeps in the cache folder; none if it is missing.

    That it cannot be read, or may be another user's, is logged.

    Args:
        path: The file.
        otherwise: What happens without it, as the end of a sentence.
    """
    try:
        _check_own_folder(path.parent)
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as error:
        _LOGGER.warning("%s cannot be read (%s); %s", path, error.strerror, otherwise)
        return b""


def write_own_file(path: Path, data: bytes) -> None:
    """Write a file that a library keeps in the cache folder, whole or not at all.

    Raises:
        OSError: It cannot be written, or others may write to its folder.
    """
    make_own_folder(path.parent)
    with whole_file(path, synced=False) as file:
        file.write(data)


def make_own_folder(folder: Path) -> None:
    """Make a folder and the missing ones above it, which no one else may enter.

    Raises:
        OSError: It cannot be made, or is there and others may write to it.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):  # `parents=True` would give the mode to the last one alone
        each.mkdir(mode=0o700, exist_ok=True)
    _check_own_folder(folder)


def is_own_folder(folder: Path) -> bool:
    """Return whether a folder belongs to this user and no one else may write to it.

    Raises:
        OSError: There is no such folder.
    """
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & _OTHERS_MAY_WRITE


def _check_own_folder(folder: Path) -> None:
    """Check that a folder belongs to this user and no one else may write to it.

    Raises:
        OSError: It does not, others may, or there is no such folder.
    """
    if not is_own_folder(folder):
        raise PermissionError(
            errno.EPERM,
            f"others may write to its folder; run `chmod go-w {folder}` if it is yours, or set "
            "XDG_CACHE_HOME",
        )
