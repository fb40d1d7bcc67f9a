"""The records of a bundle, and the function that reads them.

`manifest.json` in a bundle decodes straight into `Manifest`. No field has a default, so that a
misspelt or missing key is always an error. `ldm_export` works on the same records: `ModelSpec`
describes a checkpoint, everything else is derived from it.
"""

import hashlib
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from ldm_runtime.errors import BundleError, ManifestError
from ldm_runtime.specs.components import NETWORK_RECORDS, TensorSignature
from ldm_runtime.specs.model import ModelSpec, PredictionType
from ldm_runtime.specs.networks import Networks
from ldm_runtime.specs.plausible import implausible_fields
from ldm_runtime.specs.tasks import takes_prompts

SCHEMA_VERSION = 10
MANIFEST_NAME = "manifest.json"
_MAX_BYTES = 16 << 20

WeightsDType = Literal["float16", "float32"]
GraphVariant = Literal["fp16", "fp32", "int8"]


@dataclass(frozen=True, kw_only=True)
class GraphRecord:
    """One ONNX graph of a component.

    Attributes:
        variant: "fp16" for GPU builders, "fp32" for CPUs, "int8" for CPUs in 8 bits.
        file: Path of the graph.
    """

    variant: GraphVariant
    file: str


@dataclass(frozen=True, kw_only=True)
class ParityRecord:
    """Difference of one graph from torch on one set of inputs, measured at export.

    Attributes:
        variant: Which graph.
        reference: "stored" for torch fp32 over the bundle's weights, "checkpoint" for torch fp32
            over the checkpoint's weights.
        batch: Batch size of the inputs.
        height: Latent height of the inputs (0 where the component has none).
        width: Latent width of the inputs (0 where the component has none).
        context_tokens: Tokens of the context (0 where the component takes none).
        max_relative_error: Largest absolute difference over the largest absolute reference value.
        relative_l2: Euclidean norm of the difference over that of the reference.
    """

    variant: GraphVariant
    reference: Literal["stored", "checkpoint"]
    batch: int
    height: int
    width: int
    context_tokens: int
    max_relative_error: float
    relative_l2: float


@dataclass(frozen=True, kw_only=True)
class ComponentRecord:
    """One network of the bundle.

    Attributes:
        name: Its name in `specs.components.COMPONENTS`, which is also its folder.
        inputs: Inputs of every graph.
        outputs: Outputs of every graph.
        graphs: The graphs, all over `weights_file`.
        weights_file: Path of the one file of weights.
        fp32_islands: Operators or patterns, by name, that stay in fp32 inside the fp16 graph.
        parity: Measured differences from torch.
        key: Hash of everything the component was made from; equal keys mean equal components.
    """

    name: str
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]
    graphs: tuple[GraphRecord, ...]
    weights_file: str
    fp32_islands: tuple[str, ...]
    parity: tuple[ParityRecord, ...]
    key: str


@dataclass(frozen=True, kw_only=True)
class PreviewRecord:
    """A linear map from latents to an image of one pixel per latent pixel, fitted at export.

    Attributes:
        matrix: Red, green and blue, from -1 to 1, per channel of latents in the UNet's scale.
        bias: Added to red, green and blue.
        r2: Share of the variance that the map explains on images it was not fitted to; at most 1,
            and below 0 where their mean colour would be the better prediction.
    """

    matrix: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    bias: tuple[float, float, float]
    r2: float


@dataclass(frozen=True, kw_only=True)
class PredictionRecord:
    """Measurement of a UNet's prediction type, from how its output follows noise in its input.

    Attributes:
        key: Hash of everything it was measured from; equal keys mean equal measurements.
        deviations: Difference of the slope from that of each prediction type, as a root mean square
            over noise levels.
        measured: The type that it is near to, or None where none is clear.
    """

    key: str
    deviations: dict[PredictionType, float]
    measured: PredictionType | None


@dataclass(frozen=True, kw_only=True)
class QuantizationRecord:
    """The 8-bit graphs of a bundle, and what they cost.

    Attributes:
        layers: Layers of the UNet that are computed in 8 bits.
        kept: Weights of its layers that are not, since that would cost more than was asked for.
        calls: Calls of the UNet in which the ranges of activations were measured.
        least_psnr: What was asked for: the least PSNR of an image, in decibels.
        backend: The backend whose images were compared.
        psnr: Of every compared image to the one in fp32, in decibels, at most 100: first of the
            golden images, as torch made them, then of others.
    """

    layers: int
    kept: tuple[str, ...]
    calls: int
    least_psnr: float
    backend: str
    psnr: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of the bundle, by its path inside it."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """A component that does not come from a bundle's checkpoint.

    Attributes:
        component: "autoencoder" or "text encoder".
        file: Name of its file, or of its folder.
        sha256: Hash of the file; of several, of their names and hashes.
    """

    component: str
    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class BuildRecord:
    """Provenance of a bundle: its checkpoint, the versions of packages, and the build time.

    Attributes:
        checkpoint: Name of its file or folder.
        checkpoint_sha256: Hash of the file; of a folder, or of a checkpoint with components from
            files of their own, of the names and hashes of all files that were read.
        components: Components from files of their own.
        versions: Versions of packages, by name.
        seconds: Build time.
    """

    checkpoint: str
    checkpoint_sha256: str
    components: tuple[SourceRecord, ...]
    versions: dict[str, str]
    seconds: float


@dataclass(frozen=True, kw_only=True, repr=False)
class Manifest:
    """Everything a runtime needs to know about a bundle.

    Attributes:
        tokenizer_file: Path of the vocabulary inside the bundle, or None without prompts.
        golden: Folders with a golden request, its latents and images.
        golden_key: Hash of everything the golden outputs were made from.
        preview: The map from latents to previews, or None if there is none.
        prediction: Measurement of the prediction type, or None if there is none.
        quantization: The 8-bit graphs, or None without them.
        engines: Paths of the records of TensorRT engines, each next to its engine file.
        files: Every file of the bundle but the manifest itself.
    """

    schema_version: int
    spec: ModelSpec
    weights_dtype: WeightsDType
    components: tuple[ComponentRecord, ...]
    tokenizer_file: str | None
    golden: tuple[str, ...]
    golden_key: str
    preview: PreviewRecord | None
    prediction: PredictionRecord | None
    quantization: QuantizationRecord | None
    engines: tuple[str, ...]
    files: tuple[FileRecord, ...]
    build: BuildRecord

    def __repr__(self) -> str:
        components = ", ".join(record.name for record in self.components)
        parts = f"{self.spec.task}, {self.weights_dtype} weights, {len(self.files)} files"
        return f"Manifest(schema {self.schema_version}, {parts}; {components})"

    def component(self, name: str) -> ComponentRecord:
        """Return the record of component `name`.

        Raises:
            BundleError: The bundle has no such component.
        """
        for record in self.components:
            if record.name == name:
                return record
        names = ", ".join(record.name for record in self.components)
        raise BundleError(f"this bundle has no component {name!r}; it has {names}")

    def weights_bytes(self, name: str) -> int:
        """Return the size of the weights of component `name`.

        Raises:
            BundleError: The bundle has no such component.
        """
        weights_file = self.component(name).weights_file
        return sum(record.size_bytes for record in self.files if record.path == weights_file)

    def compiled_bytes(self, name: str, precision: str) -> int:
        """Return the size of the weights of component `name` in a precision, as it is compiled.

        In 8 bits each weight is a byte, where the component has a graph for that; in any other
        precision the size is that of the file.

        Raises:
            BundleError: The bundle has no such component.
        """
        stored = self.weights_bytes(name)
        if precision != "int8" or not has_graph(self.component(name), "int8"):
            return stored
        return stored // (2 if self.weights_dtype == "float16" else 4)


def has_graph(component: ComponentRecord, variant: GraphVariant) -> bool:
    """Return whether a component has a graph of a variant."""
    return any(graph.variant == variant for graph in component.graphs)


def without_int8(manifest: Manifest) -> Manifest:
    """Return a manifest without graphs in 8 bits."""
    dropped = {
        graph.file
        for component in manifest.components
        for graph in component.graphs
        if graph.variant == "int8"
    }
    components = tuple(
        replace(each, graphs=tuple(graph for graph in each.graphs if graph.file not in dropped))
        for each in manifest.components
    )
    files = tuple(each for each in manifest.files if each.path not in dropped)
    return replace(manifest, components=components, files=files, quantization=None)


def load_manifest(bundle: Path, *, sha256: str | None = None) -> Manifest:
    """Read and check `bundle/manifest.json`.

    Args:
        bundle: The bundle's folder.
        sha256: Hash that the file must have, in hexadecimal; since the manifest has the hashes of
            all other files, it pins the whole bundle. None takes any.

    Raises:
        ManifestError: The file is missing, damaged, or not the one with that hash; it does not
            match this schema, or was written by an older or newer `ldm-export`.
    """
    path = bundle / MANIFEST_NAME
    data = _read(bundle, path)
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise ManifestError(
            f"{path} has sha256 {found}, not {sha256[:64]} as it should; get the right bundle, or "
            "ask for this one"
        )
    try:
        _check_version(path, msgspec.json.decode(data, type=_Version).schema_version)
        manifest = msgspec.json.decode(data, type=Manifest, dec_hook=_decode_networks)
        _check_digest(path, data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"{path}: {error}; export the bundle again") from error
    _check_sense(path, manifest)
    return manifest


def manifest_digest(document: Mapping[str, object]) -> str:
    """Return the digest of the JSON object of a manifest, which stands in it as `digest`.

    It is the sha256 of the object without that field, with sorted keys and without white space. It
    finds damage of the manifest, whose hashes find damage of the other files.
    """
    rest = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(msgspec.json.encode(rest, order="sorted")).hexdigest()


def _read(bundle: Path, path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ManifestError(f"{path} cannot be read: it is not a file")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(
            f"{path} not found; is {bundle} a folder made by `ldm-export --out {bundle}`?"
        ) from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise ManifestError(f"{path} has more than {_MAX_BYTES} bytes; export the bundle again")
    return data


def is_inside(path: str) -> bool:
    """Return whether a path of a manifest is one inside the bundle, however it is spelt."""
    whole = PurePosixPath(path)
    named = path.isprintable() and bool(whole.parts)
    return named and not whole.is_absolute() and ".." not in whole.parts


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the JSON text of `manifest` and its digest, one key per line."""
    document = msgspec.json.decode(msgspec.json.encode(manifest, enc_hook=encode_networks))
    document["digest"] = manifest_digest(document)
    return msgspec.json.format(msgspec.json.encode(document), indent=1)


def encode_networks(value: object) -> object:
    """Return the networks of a specification as a JSON object, for msgspec's `enc_hook`.

    Raises:
        NotImplementedError: `value` is anything else.
    """
    if isinstance(value, Networks):
        return dict(value)
    raise NotImplementedError(f"a manifest cannot hold a {type(value).__name__}")


def _decode_networks(kind: type, value: object) -> Networks:
    """Read the networks of a specification, each as the record for its name."""
    assert kind is Networks, "the only field of a manifest that is not a plain record"
    if not isinstance(value, dict):
        raise ValueError("networks must be an object")
    if unknown := value.keys() - NETWORK_RECORDS.keys():
        raise ValueError(f"unknown networks {', '.join(sorted(unknown))}")
    if "autoencoder" not in value:
        raise ValueError("networks must include an autoencoder")
    try:
        for name, fields in value.items():
            value[name] = msgspec.convert(fields, NETWORK_RECORDS[name])
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}: {error}") from error
    return Networks(**value)


@dataclass(frozen=True, kw_only=True)
class _Version:
    schema_version: int


def _check_version(path: Path, version: int) -> None:
    if version > SCHEMA_VERSION:
        raise ManifestError(
            f"{path} has schema {version}, this runtime reads {SCHEMA_VERSION}; "
            "upgrade ldm-deploy or export again"
        )
    if version < SCHEMA_VERSION:
        raise ManifestError(
            f"{path} has schema {version} of an older ldm-export, this runtime reads "
            f"{SCHEMA_VERSION}; export the checkpoint again"
        )


def _check_digest(path: Path, data: bytes) -> None:
    document = msgspec.json.decode(data, type=dict[str, object])
    stated, found = document.get("digest"), manifest_digest(document)
    if stated != found:
        raise ManifestError(
            f"{path} was damaged or changed after it was written: its digest is "
            f"{str(stated)[:12]}…, that of its text is {found[:12]}…; export the bundle again"
        )


def _check_sense(path: Path, manifest: Manifest) -> None:
    """Check what types cannot express: values, and that every path is that of a listed file."""
    wrong = [f"spec.{field}" for field in implausible_fields(manifest.spec)]
    if takes_prompts(manifest.spec) and manifest.tokenizer_file is None:
        wrong.append("tokenizer_file")
    record = manifest.quantization
    in_8_bits = any(has_graph(each, "int8") for each in manifest.components)
    if (record is not None) != in_8_bits or (record is not None and not record.psnr):
        wrong.append("quantization")
    if wrong:
        raise ManifestError(f"{path}: {wrong[0]} cannot be what it is; export the bundle again")
    listed = {file.path for file in manifest.files}
    for name in (*sorted(listed), *_named_files(manifest)):
        if not is_inside(name):
            raise ManifestError(f"{path} names {name!r}, which lies outside the bundle")
        if name not in listed:
            raise ManifestError(f"{path} lists no file {name!r}; export the bundle again")


def _named_files(manifest: Manifest) -> Iterator[str]:
    """Yield every path that a manifest names beyond its list of files."""
    if manifest.tokenizer_file is not None:
        yield manifest.tokenizer_file
    for component in manifest.components:
        yield component.weights_file
        yield from (graph.file for graph in component.graphs)
    yield from manifest.engines
    yield from (f"{folder}/request.json" for folder in manifest.golden)
