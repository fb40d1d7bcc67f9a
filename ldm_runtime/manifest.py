"""The records of a bundle, and the one function that reads them.

`manifest.json` in a bundle decodes straight into `Manifest`. No field has a default, so that a
misspelt or forgotten key is always an error. The records are also what `ldm_export` passes
around while it works: `ModelSpec` says what a checkpoint is, everything else is derived from it.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import msgspec

from ldm_runtime.components import COMPONENTS, Component, TensorSignature
from ldm_runtime.errors import BundleError, ManifestError

SCHEMA_VERSION = 3
MANIFEST_NAME = "manifest.json"

PredictionType = Literal["epsilon", "v_prediction", "sample"]
WeightsDType = Literal["float16", "float32"]
GraphVariant = Literal["fp16", "fp32"]
Task = Literal[
    "unconditional",
    "class-to-image",
    "text-to-image",
    "layout-to-image",
    "semantic-synthesis",
    "super-resolution",
    "inpainting",
    "retrieval",
    "first-stage",
]


@dataclass(frozen=True, kw_only=True)
class UNetSpec:
    """Hyperparameters of a CompVis `UNetModel`.

    Attributes:
        in_channels: Channels of the input: latents, then what conditions them pixel by pixel.
        out_channels: Channels of the prediction.
        model_channels: Channels of the first level; level i has this times `channel_mult[i]`.
        channel_mult: One multiplier a level, from full latent resolution down.
        num_res_blocks: Residual blocks a level (one more on the way up).
        attention: "transformer" blocks with cross-attention (SpatialTransformer), or "qkv" blocks
            of self-attention alone (AttentionBlock).
        transformer_depth: Blocks in each attention of a level, 0 for none; one a level. A "qkv"
            attention is one block.
        middle_depth: Blocks in the middle attention.
        num_heads: Attention heads everywhere, or None if the head size is fixed instead.
        num_head_channels: Channels a head, or None if the number of heads is fixed instead.
        context_dim: Width of what cross-attention attends to, or None without cross-attention.
        linear_projection: Whether a transformer is entered and left by linear layers (SD 2) and
            not by 1x1 convolutions (LDM, SD 1).
        scale_shift_norm: Whether the time embedding scales and shifts, and is not added.
        resblock_updown: Whether residual blocks change the resolution, and not convolutions.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention: Literal["transformer", "qkv"]
    transformer_depth: tuple[int, ...]
    middle_depth: int
    num_heads: int | None
    num_head_channels: int | None
    context_dim: int | None
    linear_projection: bool
    scale_shift_norm: bool
    resblock_updown: bool

    @property
    def concat_channels(self) -> int:
        """Channels of what is laid behind the latents and conditions them pixel by pixel."""
        return self.in_channels - self.out_channels

    def heads_over(self, channels: int) -> int:
        """Return how many heads attention over `channels` has."""
        if self.num_heads is not None:
            return self.num_heads
        assert self.num_head_channels is not None, "a spec fixes one of the two"
        return channels // self.num_head_channels


@dataclass(frozen=True, kw_only=True)
class AutoencoderSpec:
    """Hyperparameters of a first stage.

    Attributes:
        kind: "kl": a diagonal Gaussian posterior; "vq": latents are replaced by the nearest vectors
            of a codebook before they are decoded.
        image_channels: Channels of the picture.
        channels: Channels of the first level; level i has this times `channel_mult[i]`.
        channel_mult: One multiplier a level, from full resolution down.
        num_res_blocks: Residual blocks a level in the encoder (one more in the decoder).
        attention_levels: Levels that carry attention besides the middle.
        middle_attention: Whether the middle carries attention.
        z_channels: Channels inside, before the 1x1 quantisation convolutions.
        embed_dim: Channels of the latents.
        codebook_size: Vectors in the codebook, or None without one.
        latent_scale_factor: Multiplies the autoencoder's latents into the UNet's.
    """

    kind: Literal["kl", "vq"]
    image_channels: int
    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    middle_attention: bool
    z_channels: int
    embed_dim: int
    codebook_size: int | None
    latent_scale_factor: float

    @property
    def factor(self) -> int:
        """Pixels a latent pixel covers in each direction: f in the paper."""
        return int(2 ** (len(self.channel_mult) - 1))


@dataclass(frozen=True, kw_only=True)
class TextEncoderSpec:
    """Hyperparameters of a transformer over tokens, those of a prompt or of a layout.

    Attributes:
        kind: "clip": causal; "bert": every token sees every other, heads of 64 channels whatever
            the width. Both are pre-normalised, with the output after the final LayerNorm.
        width: Channels of a token, which is the UNet's `context_dim`.
        num_layers: Transformer layers.
        num_heads: Attention heads.
        feed_forward_dim: Inner width of the feed-forward layers.
        vocab_size: Rows of the token embedding.
        max_tokens: Length every prompt is padded or cut to, start and end tokens included; of a
            layout three tokens an object and two of the crop.
        activation: Feed-forward activation.
        pad_token_id: What short prompts are filled with.
    """

    kind: Literal["clip", "bert"]
    width: int
    num_layers: int
    num_heads: int
    feed_forward_dim: int
    vocab_size: int
    max_tokens: int
    activation: Literal["quick_gelu", "gelu"]
    pad_token_id: int


@dataclass(frozen=True, kw_only=True)
class ClassEmbedderSpec:
    """A learned vector for every class.

    Attributes:
        num_classes: Rows of the embedding, the null class included.
        width: Channels of a row, which is the UNet's `context_dim`.
        null_class: The class that stands for none, which guidance needs; None without one.
    """

    num_classes: int
    width: int
    null_class: int | None


@dataclass(frozen=True, kw_only=True)
class RescalerSpec:
    """A semantic map, brought to the size of the latents (SpatialRescaler).

    Attributes:
        num_classes: Classes of a pixel.
        out_channels: Channels of the result, which is the UNet's `concat_channels`.
        num_halvings: How often height and width are halved.
    """

    num_classes: int
    out_channels: int
    num_halvings: int


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What a request that leaves a field open gets. Sizes in pixels; eta is of `sampler`."""

    height: int
    width: int
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    eta: float


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """One fact that the weights cannot tell, and where it was taken from.

    Attributes:
        field: Dotted name of a field of `ModelSpec`.
        value: Its value, as text.
        source: "family", "config" or "flag".
    """

    field: str
    value: str
    source: str


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a checkpoint is: everything downstream is derived from this record.

    Attributes:
        family: Row of the family table that recognised it.
        task: What the model does with a request.
        weights: Which of a checkpoint's two sets of UNet weights was used.
        unet: The denoising network, or None of a first stage alone.
        autoencoder: The first stage.
        text_encoder: What encodes prompts or layouts, if the task has them.
        class_embedder: What encodes class labels, if the task has them.
        rescaler: What encodes semantic maps, if the task has them.
        alphas_cumprod: Training noise schedule, one value a training timestep; empty without a
            UNet.
        prediction_type: What the UNet was trained to output.
        assumptions: What the weights could not tell.
    """

    family: str
    task: Task
    weights: Literal["ema", "model"]
    unet: UNetSpec | None
    autoencoder: AutoencoderSpec
    text_encoder: TextEncoderSpec | None
    class_embedder: ClassEmbedderSpec | None
    rescaler: RescalerSpec | None
    alphas_cumprod: tuple[float, ...]
    prediction_type: PredictionType
    defaults: SamplingDefaults
    assumptions: tuple[Assumption, ...]


@dataclass(frozen=True, kw_only=True)
class GraphRecord:
    """One ONNX graph of a component: "fp16" for GPU builders, "fp32" for the CPU engine."""

    variant: GraphVariant
    file: str


@dataclass(frozen=True, kw_only=True)
class ParityRecord:
    """How far one graph was from torch on one set of inputs when it was exported.

    Attributes:
        variant: Which graph.
        reference: "stored" for torch fp32 over the bundle's weights, "checkpoint" for torch fp32
            over the checkpoint's own weights.
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
        name: Its name in `components.COMPONENTS`, which is also its folder.
        inputs: Inputs of every graph.
        outputs: Outputs of every graph.
        graphs: The graphs, all over `weights_file`.
        weights_file: Path of the one file of weights.
        fp32_islands: What stays in fp32 inside the fp16 graph, as operator or pattern names.
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
    """A linear map from latents to a picture of one pixel a latent pixel, fitted at export.

    Attributes:
        matrix: Red, green and blue, from -1 to 1, of every channel of latents in the UNet's scale.
        bias: What is added to each.
        r2: Share of the variance that the map explains of pictures it was not fitted to; at most 1,
            and below 0 where their mean colour would be the better guess.
    """

    matrix: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    bias: tuple[float, float, float]
    r2: float


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of the bundle, by its path inside it."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class BuildRecord:
    """How and with what the bundle was built."""

    checkpoint: str
    checkpoint_sha256: str
    versions: dict[str, str]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a runtime needs to know about a bundle.

    Attributes:
        tokenizer_file: Path of the vocabulary inside the bundle, or None without prompts.
        golden: Folders with a golden request, its latents and images.
        golden_key: Hash of everything the golden outputs were made from.
        preview: What latents look like without decoding them, or None if that cannot be said.
        engines: Paths of the records of TensorRT engines, each beside its plan.
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
    engines: tuple[str, ...]
    files: tuple[FileRecord, ...]
    build: BuildRecord

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


def components_of(spec: ModelSpec) -> Mapping[str, Component]:
    """Return the networks of a model by name, in the order of drawing.

    A UNet without cross-attention takes no context.
    """
    present = {
        "text_encoder": spec.text_encoder is not None,
        "class_embedder": spec.class_embedder is not None,
        "rescaler": spec.rescaler is not None,
        "unet": spec.unet is not None,
        "vae_decoder": True,
        "vae_encoder": True,
    }
    components = {name: COMPONENTS[name] for name, is_there in present.items() if is_there}
    if spec.unet is not None and spec.unet.context_dim is None:
        unet = components["unet"]
        inputs = tuple(tensor for tensor in unet.inputs if tensor.name != "context")
        components["unet"] = replace(unet, inputs=inputs)
    return components


def axis_sizes(spec: ModelSpec) -> Mapping[str, int]:
    """Return the length of every axis of a model's `components_of` that is fixed."""
    autoencoder = spec.autoencoder
    halves = 2 if autoencoder.kind == "kl" else 1
    sizes = {
        "latent_channels": autoencoder.embed_dim,
        "moment_channels": halves * autoencoder.embed_dim,
        "image_channels": autoencoder.image_channels,
        "class_tokens": 1,
    }
    if spec.unet is not None:
        sizes["unet_channels"] = spec.unet.in_channels
        sizes["concat_channels"] = spec.unet.concat_channels
        if spec.unet.context_dim is not None:
            sizes["context_dim"] = spec.unet.context_dim
    if spec.text_encoder is not None:
        sizes["tokens"] = spec.text_encoder.max_tokens
    return sizes


def load_manifest(bundle: Path) -> Manifest:
    """Read and check `bundle/manifest.json`.

    Raises:
        ManifestError: The file is missing, does not match this schema, or was written by an
            older or newer `ldm-export`.
    """
    path = bundle / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(
            f"{path} not found; is {bundle} a folder made by `ldm-export --out {bundle}`?"
        ) from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from error
    try:
        _check_version(path, msgspec.json.decode(data, type=_Version).schema_version)
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"{path}: {error}; export the bundle again") from error
    _check_sense(path, manifest)
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the JSON text of `manifest`, one key a line."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)


_LEAST_TOKENS = 3  # the first, the last and one between


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


def _check_sense(path: Path, manifest: Manifest) -> None:
    """Check what types cannot say and others rely on; damage elsewhere is found by hashes."""
    spec = manifest.spec
    autoencoder, unet, text = spec.autoencoder, spec.unet, spec.text_encoder
    wrong = {
        "spec.autoencoder.channel_mult": not autoencoder.channel_mult,
        "spec.autoencoder.latent_scale_factor": not 0 < autoencoder.latent_scale_factor < math.inf,
        "spec.unet.channel_mult": unet is not None and not unet.channel_mult,
        "spec.text_encoder.max_tokens": text is not None and text.max_tokens < _LEAST_TOKENS,
        "tokenizer_file": spec.task == "text-to-image" and manifest.tokenizer_file is None,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ManifestError(f"{path}: {name} cannot be what it is; export the bundle again")


def check_file(bundle: Path, record: FileRecord, *, hashed: bool = True) -> None:
    """Check that a file of a bundle is the one its record describes.

    Args:
        bundle: The bundle's folder.
        record: What the manifest says of the file.
        hashed: Whether to compare the contents and not only the size.

    Raises:
        BundleError: The file is missing, or its size or hash differs.
    """
    path = bundle / record.path
    try:
        size = path.stat().st_size
    except OSError:
        raise BundleError(f"{path} is missing; export the bundle again") from None
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
