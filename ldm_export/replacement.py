"""The bundle in the place of a new one: an export must not replace another model's unasked."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from ldm_export.errors import ExportError
from ldm_runtime.bundle.manifest import MANIFEST_NAME

_DIGITS = 12  # of a hash, in messages


@dataclass(frozen=True, kw_only=True)
class BundleOrigin:
    """The checkpoint that a bundle was made from, which manifests of all versions record.

    Attributes:
        checkpoint: Name of its file.
        checkpoint_sha256: Its hash.
    """

    checkpoint: str
    checkpoint_sha256: str


@dataclass(frozen=True, kw_only=True)
class _Origin:
    build: BundleOrigin


def origin_of(bundle: Path) -> BundleOrigin | None:
    """Return the origin of the bundle in a folder, or None if there is no readable one."""
    try:
        return msgspec.json.decode((bundle / MANIFEST_NAME).read_bytes(), type=_Origin).build
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def check_replacement(bundle: Path, checkpoint: str, sha256: str) -> None:
    """Refuse to replace the bundle of another checkpoint.

    Args:
        bundle: Place of the new bundle.
        checkpoint: Name of the file of the checkpoint to export.
        sha256: Its hash.

    Raises:
        ExportError: A bundle of a checkpoint with another hash is there.
    """
    origin = origin_of(bundle)
    if origin is not None and origin.checkpoint_sha256 != sha256:
        raise ExportError(
            f"{bundle} holds the bundle of another checkpoint, {origin.checkpoint} (sha256 "
            f"{origin.checkpoint_sha256[:_DIGITS]}…), not of {checkpoint} "
            f"({sha256[:_DIGITS]}…); add --replace to replace it, or give another --out"
        )
