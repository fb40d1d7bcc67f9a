"""Files of a bundle, compared with their records before they are opened."""

import hashlib
import stat
from functools import lru_cache
from pathlib import Path

from ldm_runtime.bundle.manifest import FileRecord, Manifest, is_inside
from ldm_runtime.errors import BundleError


def checked_file(bundle: Path, manifest: Manifest, path: str, *, hashed: bool = True) -> Path:
    """Compare a file of a bundle with its record, and return its full path.

    Raises:
        BundleError: The path leaves the bundle or is not in the manifest, or the file is missing,
            altered, or a link that leads out of the bundle.
    """
    if not is_inside(path):
        raise BundleError(f"the manifest of {bundle} names {path!r}, which lies outside the bundle")
    for record in manifest.files:
        if record.path == path:
            check_file(bundle, record, hashed=hashed)
            return bundle / path
    raise BundleError(f"the manifest of {bundle} lists no file {path!r}; export the bundle again")


def check_file(bundle: Path, record: FileRecord, *, hashed: bool = True) -> None:
    """Check that a file of a bundle is the one its record describes.

    Args:
        bundle: The bundle's folder.
        record: Its record in the manifest.
        hashed: Whether to compare the contents and not only the size.

    Raises:
        BundleError: The file is missing, its size or hash differs, or it is a link that leads out
            of the bundle: no hash vouches for what it will lead to when it is opened.
    """
    path = bundle / record.path
    try:
        status = path.stat()
        target = path.resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL in the path; a link to itself
        raise BundleError(f"{path} is missing; export the bundle again") from None
    if not target.is_relative_to(bundle.resolve()):
        raise BundleError(
            f"{path} is a link to {target}, outside the bundle; copy the bundle together with what "
            f"its links lead to, with `cp -rL {bundle} NEW-FOLDER`, and open the copy"
        )
    size = status.st_size
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is not a file; export the bundle again")
    if size != record.size_bytes:
        raise BundleError(
            f"{path} has {size} bytes, the manifest says {record.size_bytes}; "
            "export the bundle again"
        )
    if hashed and (found := sha256_of(path)) != record.sha256:
        raise BundleError(
            f"{path} has sha256 {found[:12]}…, the manifest says {record.sha256[:12]}…; "
            "export the bundle again"
        )


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file; repeated calls on an unchanged file are free."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, modified: int, inode: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
