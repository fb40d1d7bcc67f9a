"""The report of `ldm inspect` on a checkpoint, made without torch."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm_export.checkpoint.checkpoint import Checkpoint, MappedFile
from ldm_export.checkpoint.mistaken_files import HEAD_BYTES, part_of_several
from ldm_export.detection.chosen_config import chosen_config
from ldm_export.detection.detect import Detection, detect
from ldm_export.detection.features import Tensors
from ldm_export.detection.weight_assignment import has_ema
from ldm_export.errors import ExportError, UnknownModelError, WeightsError
from ldm_export.intake.folder import is_diffusers_folder
from ldm_export.intake.opening import open_model
from ldm_runtime.escaping import shortened
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.tensor_files.errors import FormatError
from ldm_runtime.tensor_files.torch_archive import ZIP_MAGIC
from ldm_runtime.tensor_files.torch_legacy import is_torch_legacy
from ldm_runtime.tensor_files.zip_directory import read_zip_directory

_SAFETENSORS_LENGTH_BYTES = 8
_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".safetensors", ".gguf"})


def inspect_checkpoint(path: Path) -> dict[str, Any] | None:
    """Describe a checkpoint, or return None if it is not one by its content or its name.

    A configuration next to it is read as an export would. The result has `family` None and a
    `problem` if the tensors are sound but of no exported family, or contradict the configuration.

    Args:
        path: A file, or a folder, which is a checkpoint if it is one of diffusers.

    Raises:
        CheckpointError: The file is a checkpoint by its content or its name, but cannot be read.
        UnknownModelError: The folder holds a pipeline that is not exported.
    """
    if not is_diffusers_folder(path) and not (
        path.is_file() and (_is_named_so(path) or _looks_like_checkpoint(path))
    ):
        return None
    with open_model(path) as checkpoint:
        tensors = checkpoint.tensors
        report: dict[str, Any] = {
            "kind": "checkpoint",
            "file": str(path),
            "format": checkpoint.format,
            "global_step": checkpoint.global_step,
            "tensors": len(tensors),
            "dtypes": _dtypes(tensors, tensors),
            "ema_present": has_ema(tensors),
            "unusual_globals": list(checkpoint.unusual_globals),
            "metadata": shortened(checkpoint.metadata),
        }
        return report | _describe(checkpoint)


def _is_named_so(path: Path) -> bool:
    """Return whether the name is that of a checkpoint: then people want to know why it is none."""
    return path.suffix.lower() in _SUFFIXES


def _looks_like_checkpoint(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(ZIP_MAGIC):
        return _holds_pickle(path)
    return is_torch_legacy(head) or _is_safetensors(head)


def _is_safetensors(head: bytes) -> bool:
    """Return whether a JSON object follows eight bytes of length that need not all be used."""
    length = int.from_bytes(head[:_SAFETENSORS_LENGTH_BYTES], "little")
    return head[_SAFETENSORS_LENGTH_BYTES:].startswith(b"{") and 1 < length < 1 << 32


def _holds_pickle(path: Path) -> bool:
    file = MappedFile(path)
    try:
        members = read_zip_directory(file.bytes.data)
        return any(name.rpartition("/")[2].lower() == "data.pkl" for name in members)
    except FormatError:
        # A torch file cut short has no directory of members; its first member's name remains.
        return b"data.pkl" in bytes(file.bytes[:256].data).lower()
    finally:
        file.close()


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe what an export would make of a checkpoint and the configuration next to it."""
    known: dict[str, Any] = {"config": None}
    if part := part_of_several(checkpoint.path):
        return known | {"family": None, "problem": part}
    try:
        chosen = chosen_config(checkpoint.path)
        known["config"] = None if chosen is None else str(chosen.path)
        config = None if chosen is None else chosen.config
        detection = detect(
            checkpoint.tensors,
            config=config,
            metadata=checkpoint.metadata,
            stated=checkpoint.stated,
        )
    except (UnknownModelError, WeightsError, ExportError) as error:
        return known | {"family": None, "problem": str(error)}
    spec = detection.spec
    return known | {
        "family": spec.family,
        "task": spec.task,
        "weights": spec.weights,
        "prediction_type": spec.prediction_type,
        "components": _components(checkpoint.tensors, detection),
        **_records(spec),
        "num_train_timesteps": len(spec.alphas_cumprod) or None,
        "edm": None if spec.edm is None else asdict(spec.edm),
        "defaults": asdict(spec.defaults),
        "label_names": list(spec.label_names) or None,
        "assumptions": [asdict(assumption) for assumption in spec.assumptions],
        "unused": _counts(detection.unused.values()),
    }


def _records(spec: ModelSpec) -> dict[str, Any]:
    """Return the hyperparameters of the networks that the model has."""
    parts = {name: asdict(record) for name, record in spec.networks.items()}
    parts["autoencoder"]["factor"] = spec.autoencoder.factor
    return parts


def _components(tensors: Tensors, detection: Detection) -> dict[str, Any]:
    return {
        component: {
            "parameters": sum(math.prod(tensors[name].shape) for name in names.values()),
            "dtypes": _dtypes(tensors, names.values()),
        }
        for component, names in detection.weights.items()
    }


def _dtypes(tensors: Tensors, names: Iterable[str]) -> Mapping[str, int]:
    return _counts(tensors[name].dtype for name in names)


def _counts(values: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts
