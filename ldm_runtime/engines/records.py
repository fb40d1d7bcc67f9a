"""Records of the TensorRT engines in a bundle: source files, builder, targets and profiles.

An engine file lies at `tensorrt/<builder>-<version>-<targets>/<component>.plan`, its record next to
it as `<component>.json`. The manifest lists both with their hashes, and names the records in
`engines`. An engine is up to date if its build spec equals the one that would be built now, and
only then.
"""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import msgspec

from ldm_runtime.bundle.files import checked_file
from ldm_runtime.bundle.manifest import Manifest
from ldm_runtime.errors import BundleError

ENGINES_FOLDER = "tensorrt"

#: Library of an engine, by import name: data-centre TensorRT or TensorRT-RTX.
BuilderName = Literal["tensorrt", "tensorrt_rtx"]


@dataclass(frozen=True, kw_only=True)
class ProfileRecord:
    """The range of shapes of one input of an engine, per axis.

    Attributes:
        input: Name of the input.
        min: Lowest lengths.
        opt: Lengths that the engine is optimized for.
        max: Highest lengths.
    """

    input: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class EngineBuildSpec:
    """Engine build spec: everything that determines an engine.

    Attributes:
        component: The network.
        builder: The library that builds it.
        builder_version: Its exact version; an engine file runs on no other.
        graph_sha256: Hash of the ONNX file.
        weights_sha256: Hash of its weights.
        flags: Builder flags beyond the defaults, by the vendor's names.
        profiles: One record per input, together one optimization profile.
        targets: Compute capabilities it runs on, such as "sm89".
        gpu_name: GPU that its kernels were timed on; None for TensorRT-RTX, which needs none.
    """

    component: str
    builder: BuilderName
    builder_version: str
    graph_sha256: str
    weights_sha256: str
    flags: tuple[str, ...]
    profiles: tuple[ProfileRecord, ...]
    targets: tuple[str, ...]
    gpu_name: str | None

    def as_fields(self) -> dict[str, Any]:
        """Return the fields of the build spec by name, for a record as well."""
        return {field.name: getattr(self, field.name) for field in fields(EngineBuildSpec)}

    @property
    def folder(self) -> str:
        """Folder of the engine file, inside the bundle."""
        targets = "-".join(self.targets)
        return f"{ENGINES_FOLDER}/{self.builder}-{self.builder_version}-{targets}"

    @property
    def record_path(self) -> str:
        """Path of the record, inside the bundle."""
        return f"{self.folder}/{self.component}.json"

    @property
    def engine_path(self) -> str:
        """Path of the engine file, inside the bundle."""
        return f"{self.folder}/{self.component}.plan"


@dataclass(frozen=True, kw_only=True)
class EngineRecord(EngineBuildSpec):
    """A build spec and the engine file that was built from it.

    Attributes:
        plan: Name of the engine file, in the record's folder.
        plan_sha256: Its hash.
        driver_version: CUDA version of the driver at the build, such as "13.0"; None without one.
        seconds: How long the build took.
        size_bytes: Size of the engine file.
    """

    plan: str
    plan_sha256: str
    driver_version: str | None
    seconds: float
    size_bytes: int

    @property
    def build_spec(self) -> EngineBuildSpec:
        """The build spec alone, to compare with another."""
        return EngineBuildSpec(**self.as_fields())


def engine_key(build_spec: EngineBuildSpec) -> str:
    """Return the hash of a build spec; for a record, of the build spec in it."""
    fields = msgspec.json.encode(build_spec.as_fields(), order="deterministic")
    return hashlib.sha256(fields).hexdigest()


def encode_engine_record(record: EngineRecord) -> bytes:
    """Return the JSON text of a record, one key per line."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1)


def decode_engine_record(data: bytes, path: Path) -> EngineRecord:
    """Read the JSON text of a record.

    Args:
        data: The text.
        path: Where it is from, for the message.

    Raises:
        BundleError: It does not match the schema.
    """
    try:
        return msgspec.json.decode(data, type=EngineRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path}: {error}; run `ldm build-engines` again") from error


def load_engine_records(bundle: Path, manifest: Manifest) -> tuple[EngineRecord, ...]:
    """Compare the records of the engines in a bundle with the manifest, and return them.

    The engine files themselves are not read.

    Raises:
        BundleError: A record is missing, altered, malformed or not in its place.
    """
    records = []
    for listed in manifest.engines:
        path = checked_file(bundle, manifest, listed)
        record = decode_engine_record(path.read_bytes(), path)
        if record.record_path != listed or f"{record.folder}/{record.plan}" != record.engine_path:
            raise BundleError(
                f"{path} describes the engine {record.engine_path}, which belongs to another "
                "record; run `ldm build-engines` again"
            )
        records.append(record)
    return tuple(records)
