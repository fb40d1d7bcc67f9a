"""A full disk as one sentence, with the space that an export takes."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm_export.errors import ExportError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def full_disk_named(out: Path, needed_bytes: int) -> Iterator[None]:
    """Say how much space an export takes, where the disk has no more or its user may have no more.

    Args:
        out: Folder of the bundle.
        needed_bytes: Its size.

    Raises:
        ExportError: The disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(out.absolute().parent).free
        raise ExportError(
            f"{out}: no space left on the disk: the bundle takes about {needed_bytes / 1e6:,.0f} "
            f"MB, an old one stays until it is replaced, and {free / 1e6:,.0f} MB are free; make "
            "room, and run the same command again to resume"
        ) from error
