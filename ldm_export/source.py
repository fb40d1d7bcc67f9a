"""An opened checkpoint, its detection, and the cache keys of what is made from it."""

import hashlib
import importlib.metadata
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, get_args

import msgspec
import numpy as np

from ldm_export.checkpoint.checkpoint import Checkpoint
from ldm_export.checkpoint.mistaken_files import part_of_several
from ldm_export.checkpoint.stored_tensors import StoredTensor
from ldm_export.detection.averages import are_averages_of, warn_of_averages
from ldm_export.detection.chosen_config import StatedConfig, chosen_config
from ldm_export.detection.detect import Detection, detect
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import CheckpointError, ExportError
from ldm_export.intake.opening import open_model
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import (
    BuildRecord,
    SourceRecord,
    WeightsDType,
    encode_networks,
)
from ldm_runtime.engines.build_specs import EngineOptions, Toolchain, choose_toolchain
from ldm_runtime.specs.model import ModelSpec, PredictionType, components_of

_LOGGER = logging.getLogger(__name__)

#: Raised whenever the same checkpoint would give another bundle, so that nothing stale is reused.
CACHE_VERSION = 17
_SAMPLING_FIELDS = ("defaults", "prediction_type", "label_names")
_PACKAGES = ("ldm-deploy", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of an export: checkpoint, destination, and what the checkpoint does not say.

    Attributes:
        checkpoint: The `.ckpt`, `.pt` or `.safetensors` file, or a diffusers folder.
        out: Folder of the bundle.
        config: CompVis configuration; None takes `<checkpoint>.yaml` or `config.yaml` next to the
            checkpoint if there is one, and "none" ignores what lies there.
        overrides: Features that the user states.
        weights_dtype: How weights are stored.
        engines: Which TensorRT engines to build; none by default.
        replace: Whether the bundle of another checkpoint at `out` may be replaced.
        fp16: Whether to write the fp16 graphs, which GPUs need and CPUs do not.
        quantize: Whether to add graphs in 8 bits, as `ldm_runtime.quantization` does.
        vae: File or folder of an autoencoder that takes the place of the checkpoint's.
        text_encoder: File or folder of a CLIP text encoder that does likewise.
        text_encoder_2: File or folder of the second text encoder of SDXL, likewise.
        tiny_decoder: File or folder of a TAESD that the bundle can decode with as well.
        image_normalizer: File or folder with the statistics of embeddings of images.
    """

    checkpoint: Path
    out: Path
    config: StatedConfig = None
    overrides: Overrides = field(default_factory=Overrides)
    weights_dtype: WeightsDType = "float16"
    engines: EngineOptions = field(default_factory=lambda: EngineOptions(builder="none"))
    replace: bool = False
    fp16: bool = True
    quantize: bool = False
    vae: Path | None = None
    text_encoder: Path | None = None
    text_encoder_2: Path | None = None
    tiny_decoder: Path | None = None
    image_normalizer: Path | None = None

    def __post_init__(self) -> None:
        if self.weights_dtype not in get_args(WeightsDType):
            raise ExportError(
                f"weights_dtype is {self.weights_dtype!r}; use "
                f"{' or '.join(map(repr, get_args(WeightsDType)))}"
            )
        if not self.fp16 and self.engines.builder != "none":
            raise ExportError(
                f"engines ({self.engines.builder}) are built from fp16 graphs, which --no-fp16 "
                "leaves out; take --engines none with it, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened checkpoint and what was detected in it.

    Attributes:
        options: The options of the export.
        checkpoint: The opened checkpoint.
        detection: The model, and where its weights go.
        sha256: Of the checkpoint, see `checkpoint_sha256`; empty if nothing will be written.
        toolchain: Builder of engines and its targets, or None without engines.
        detect_again: Detects the same, with what its UNet was `measured` to predict.
    """

    options: ExportOptions
    checkpoint: Checkpoint
    detection: Detection
    sha256: str
    toolchain: Toolchain | None
    detect_again: Callable[..., Detection]

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.detection.spec

    def measured_as(self, prediction_type: PredictionType) -> Self:
        """Return it detected again, as one of its family that predicts what was measured."""
        return replace(self, detection=self.detect_again(measured=prediction_type))

    def with_spec(self, spec: ModelSpec) -> Self:
        """Return it with another record of the model."""
        return replace(self, detection=replace(self.detection, spec=spec))

    def weights(self, component: str) -> Mapping[str, StoredTensor]:
        """Return a component's tensors by parameter name of its network."""
        names = self.detection.weights[component]
        return {
            name: self.checkpoint.tensors[stored]
            for name, stored in names.items()
            if stored not in self.detection.ignored
        }

    def parameters(self) -> dict[str, int]:
        """Return the number of weights of every component."""
        return {
            name: sum(int(np.prod(each.shape)) for each in self.weights(name).values())
            for name in components_of(self.spec)
        }

    def key(self, step: str, *inputs: Any) -> str:  # noqa: ANN401  (any JSON value)
        """Return the hash of everything a step's files are made from.

        Networks do not depend on how they are sampled: another default size does not rebuild them.

        Args:
            step: Its name.
            *inputs: What it is made from in addition to the checkpoint.
        """
        spec = msgspec.to_builtins(self.spec, enc_hook=encode_networks)
        is_network = step in {*components_of(self.spec), "prediction"}
        for name in ("assumptions", *(_SAMPLING_FIELDS if is_network else ())):
            del spec[name]
        known = [
            CACHE_VERSION,
            step,
            self.sha256,
            spec,
            self.options.weights_dtype,
            self.options.fp16,
            versions(),
            *inputs,
        ]
        return hashlib.sha256(msgspec.json.encode(known, order="deterministic")).hexdigest()


def open_source(options: ExportOptions, checkpoint: Checkpoint, *, hashed: bool = True) -> Source:
    """Recognise a checkpoint and choose the builder of engines.

    Args:
        options: The options of the export.
        checkpoint: The opened checkpoint.
        hashed: Whether to read it whole, for its hash and to check its averages, which only an
            estimate can do without.

    Raises:
        CheckpointError: It is one part of several.
        UnknownModelError: It does not belong to a known family.
        WeightsError: Weights are missing, or tensors belong to no component.
        ExportError: A stated feature is impossible.
        EngineBuildError: A builder was asked for that cannot be used here.
    """
    if part := part_of_several(options.checkpoint):
        raise CheckpointError(options.checkpoint, part)
    chosen = chosen_config(options.checkpoint, options.config)
    toolchain = choose_toolchain(options.engines)
    if isinstance(toolchain, str) and options.engines.builder == "auto":
        _LOGGER.warning("%s", toolchain)
    detect_again = partial(
        detect,
        checkpoint.tensors,
        config=None if chosen is None else chosen.config,
        overrides=options.overrides,
        metadata=checkpoint.metadata,
        stated=checkpoint.stated,
    )
    detection = detect_again()
    if hashed and not _averages_hold(checkpoint, detection):
        stated = replace(checkpoint.stated, weights="model")
        detect_again = partial(detect_again, stated=stated)
        detection = detect_again()
    return Source(
        options=options,
        checkpoint=checkpoint,
        detection=detection,
        sha256=checkpoint_sha256(checkpoint) if hashed else "",
        toolchain=None if isinstance(toolchain, str) else toolchain,
        detect_again=detect_again,
    )


def _averages_hold(checkpoint: Checkpoint, detection: Detection) -> bool:
    """Return whether the averages in use are to stay so, with a warning if they look wrong."""
    if detection.has_doubtful_averages:
        return are_averages_of(checkpoint.tensors, detection.weights)
    warn_of_averages(checkpoint.tensors, detection.weights)
    return True


def open_checkpoint_of(options: ExportOptions) -> Checkpoint:
    """Open the checkpoint of an export, with the components that have files of their own.

    Raises:
        CheckpointError: A file cannot be read.
        UnknownModelError: It is a folder with a pipeline that is not exported.
    """
    return open_model(
        options.checkpoint,
        vae=options.vae,
        text_encoder=options.text_encoder,
        text_encoder_2=options.text_encoder_2,
        tiny_decoder=options.tiny_decoder,
        image_normalizer=options.image_normalizer,
    )


def checkpoint_sha256(checkpoint: Checkpoint) -> str:
    """Return the hash of a checkpoint's only file, or of the names and hashes of all of them."""
    files = dict(checkpoint.files)
    for each in checkpoint.components:
        files |= {f"{each.component}: {name}": path for name, path in each.files.items()}
    return _sha256_of_all(files)


def build_record(source: Source, seconds: float) -> BuildRecord:
    """Return the provenance of a bundle that took `seconds` to build."""
    components = tuple(
        SourceRecord(
            component=each.component,
            file=each.path.resolve().name,
            sha256=_sha256_of_all(each.files),
        )
        for each in source.checkpoint.components
    )
    return BuildRecord(
        checkpoint=source.options.checkpoint.resolve().name,
        checkpoint_sha256=source.sha256,
        components=components,
        versions=versions(),
        seconds=round(seconds, 1),
    )


def _sha256_of_all(files: Mapping[str, Path]) -> str:
    if len(files) == 1:
        return sha256_of(*files.values())
    hashes = sorted((name, sha256_of(path)) for name, path in files.items())
    return hashlib.sha256(msgspec.json.encode(hashes)).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of every package that an export's files depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
