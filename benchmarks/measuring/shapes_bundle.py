"""The bundle of the shapes model, which benchmarks measure unless they are given another."""

import subprocess
import sys
from pathlib import Path

from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import MANIFEST_NAME, load_manifest
from ldm_runtime.errors import LdmError
from measuring.rows import ROOT

CHECKPOINT = ROOT / "models/shapes/shapes.ckpt"
CACHE = ROOT / "out/engines"


def shapes_bundle() -> Path:
    """Return the bundle of the shapes model; see `exported_bundle`."""
    return exported_bundle(CHECKPOINT, CACHE)


def exported_bundle(checkpoint: Path, cache: Path) -> Path:
    """Return a checkpoint's bundle, exported if it is not there or not of this checkpoint.

    Raises:
        LdmError: It cannot be exported, or another model's bundle is in its place.
    """
    if (cache / MANIFEST_NAME).is_file():
        build = load_manifest(cache).build
        if not checkpoint.is_file() or build.checkpoint_sha256 == sha256_of(checkpoint):
            return cache
        if build.checkpoint != checkpoint.name:
            raise LdmError(
                f"{cache} was made from {build.checkpoint}, not from {checkpoint.name}; "
                f"measure it with --bundle {cache}, or remove it"
            )
    if not checkpoint.is_file():
        raise LdmError(
            f"there is no {checkpoint} to export; give --bundle a folder made by ldm-export"
        )
    print(f"exporting {checkpoint.name} to {cache}, once", file=sys.stderr)
    command = ["-m", "ldm_export.cli", "--ckpt", str(checkpoint), "--out", str(cache)]
    command += ["--engines", "none", "--replace"]  # an older checkpoint of the same name
    if subprocess.run([sys.executable, *command], stdout=sys.stderr, cwd=ROOT).returncode:
        raise LdmError(f"exporting {checkpoint} failed; the reason is above")
    return cache
