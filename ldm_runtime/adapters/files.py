"""Files of adapters, such as LoRA: their layers by component and name, read when they are used.

Both formats of torch and safetensors are read; a pickle is interpreted and runs nothing, see
`tensor_files.pickle_reader`.
"""

import hashlib
import os
import re
import stat
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ldm_runtime.adapters.layers import AdapterLayer
from ldm_runtime.adapters.peft_header import (
    Settings,
    alpha_of,
    is_rank_stabilised,
    peft_settings,
    settings_next_to,
)
from ldm_runtime.adapters.spellings import (
    LayerName,
    Spelled,
    is_checkpoint,
    is_textual_inversion,
    understood,
    unsupported,
)
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.tensor_files.errors import FormatError
from ldm_runtime.tensor_files.lazy_tensors import LazyTensor, open_tensors
from ldm_runtime.tensor_files.pickle_reader import PickleContents
from ldm_runtime.tensor_files.safetensors_header import is_safetensors
from ldm_runtime.tensor_files.tensor_extent import TensorExtent
from ldm_runtime.tensor_files.torch_state_dict import FindTensor, state_dict_of

__all__ = ["AdapterFile", "LayerName", "adapter_sha256", "read_adapter"]

_WANTED = "give an adapter as .safetensors, .pt, .bin or .ckpt"
_SUPPORTED = "LoRA, LoCon, LoHa, LoKr, DoRA and full differences are read"
_SHA256 = re.compile("[0-9a-f]{64}")
_EMBEDDING = "is a textual inversion and not an adapter; give it as `textual_inversions`"

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """An adapter.

    Attributes:
        name: The path of the file in messages, which have the beginning of a long one.
        file_name: Name of the file without its folders, whole, as results record it.
        sha256: Of the file, in hexadecimal digits; of one that PEFT saved, of the settings next to
            it as well.
        web_ui_sha256: What AUTOMATIC1111's web UI and galleries know it by: of safetensors, what
            its metadata says, or the hash of all behind the header; of others that of the file.
        layers: Its layers; a name is the component ("unet", "text_encoder" or "text_encoder_2") and
            the path of the layer, joined with "_".
        metadata: The file's own metadata: untrusted text, to be escaped before it is shown.
    """

    name: str
    file_name: str
    sha256: str
    web_ui_sha256: str
    layers: Mapping[LayerName, AdapterLayer]
    metadata: Mapping[str, str]


def read_adapter(file: str | os.PathLike[str] | bytes) -> AdapterFile:
    """Read the names of an adapter's tensors; values are read when a layer is applied.

    Args:
        file: A path or the bytes of a file. A path is mapped into memory, and must neither shrink
            nor be overwritten while the adapter is in use.

    Raises:
        ValueError: In one sentence, why it cannot be read, or that it is not an adapter or of a
            kind that is not supported.
    """
    name, data = _opened(file)
    try:
        tensors, metadata = open_tensors(data, _state_dict, _WANTED)
        settings = {} if isinstance(file, bytes) else settings_next_to(Path(file))[0]
        layers = _layers(tensors, settings or peft_settings(metadata))
    except FormatError as error:
        raise ValueError(f"{name} {error}") from error
    return AdapterFile(
        name=name,
        file_name=name if isinstance(file, bytes) else _recordable(Path(file).name),
        sha256=hashlib.sha256(file).hexdigest()
        if isinstance(file, bytes)
        else adapter_sha256(file),
        web_ui_sha256=_web_ui_sha256(data, metadata),
        layers=MappingProxyType(layers),
        metadata=metadata,
    )


def adapter_sha256(file: str | os.PathLike[str]) -> str:
    """Return the `sha256` of the adapter in a file; repeated calls on an unchanged one are free.

    Raises:
        OSError: The file cannot be read.
        ValueError: PEFT saved it, and its settings are not next to it.
    """
    path = Path(file)
    _, settings = settings_next_to(path)
    if not settings:
        return sha256_of(path)
    digest = hashlib.sha256(path.read_bytes())
    digest.update(settings)
    return digest.hexdigest()


def _web_ui_sha256(data: npt.NDArray[np.uint8], metadata: Mapping[str, str]) -> str:
    """Return the hash of the tensors of a file.

    Source: `NetworkOnDisk` in `extensions-builtin/Lora/network.py` and `addnet_hash_safetensors` in
    `modules/hashes.py` of AUTOMATIC1111/stable-diffusion-webui 1.10, which kohya's sd-scripts
    write into the metadata.
    """
    stated = metadata.get("sshs_model_hash", "")
    if _SHA256.fullmatch(stated):
        return stated
    start = 0
    if is_safetensors(bytes(data[:16])):
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    return hashlib.sha256(data[start:].data).hexdigest()


def _opened(file: str | os.PathLike[str] | bytes) -> tuple[str, npt.NDArray[np.uint8]]:
    """Return the name of a file in messages, and its bytes."""
    if isinstance(file, bytes):
        name, data = "the data", np.frombuffer(file, dtype=np.uint8)
    elif not isinstance(file, str | os.PathLike):
        raise ValueError(f"an adapter is a {type(file).__name__}; give a path or bytes of a file")
    else:
        name, data = str(file)[:255], _mapped(Path(file))
    if not data.size:
        raise ValueError(f"{name} is empty; get the file again")
    return name, data


def _recordable(name: str) -> str:
    """Return a file name as UTF-8 can have it: on Linux it is any bytes, of any encoding."""
    return os.fsencode(name).decode(errors="replace")


def _mapped(path: Path) -> npt.NDArray[np.uint8]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a file")
        if status.st_size == 0:
            return np.empty(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{str(path)[:255]} cannot be read: {reason}") from error


def _state_dict(pickled: PickleContents, find: FindTensor) -> Mapping[str, TensorExtent]:
    if isinstance(pickled.root, dict) and "string_to_param" in pickled.root:
        raise FormatError(_EMBEDDING)
    return state_dict_of(pickled, find).tensors


def _layers(tensors: Tensors, settings: Settings) -> dict[LayerName, AdapterLayer]:
    """Return the layers that the tensors of a file make up.

    Raises:
        FormatError: The file is not an adapter, or a tensor of it is not understood.
    """
    names = {key: understood(key) for key in tensors}
    known = {key: name for key, name in names.items() if name is not None}
    _check_kind(names.keys() - known.keys(), tensors)
    groups: dict[LayerName, dict[str, str]] = {}
    for key, name in known.items():
        first = groups.setdefault(name.layer, {}).setdefault(name.tensor, key)
        if first != key:
            raise FormatError(
                f"has both {first} and {key}, which are two spellings of one tensor; delete one"
            )
    return {
        layer: _layer([known[key] for key in keys.values()], keys, tensors, settings)
        for layer, keys in groups.items()
    }


def _check_kind(unknown: Set[str], tensors: Tensors) -> None:
    """Check that every tensor is of a known kind of layer, or say what the file is."""
    left = [key for key in tensors if key in unknown]
    if left and is_textual_inversion(tensors):
        raise FormatError(_EMBEDDING)
    if len(left) == len(tensors) and is_checkpoint(left):
        raise FormatError(
            "is a model's own weights and not an adapter; export a checkpoint with `ldm-export`"
        )
    if found := unsupported(tensors):
        raise FormatError(
            f"holds {found[1]} (tensor {found[0]!r}), which is not supported: {_SUPPORTED}; merge "
            "it into the checkpoint with the program that trained it, and export that"
        )
    if left:
        shown = ", ".join(left[:3]) + (", …" if len(left) > 3 else "")
        raise FormatError(
            f"holds {len(left)} tensors of {len(tensors)} that are of no known kind of adapter "
            f"({shown}): {_SUPPORTED}; give such a file"
        )


def _layer(
    names: list[Spelled], keys: Mapping[str, str], tensors: Tensors, settings: Settings
) -> AdapterLayer:
    """Return one layer.

    Args:
        names: The names of its tensors, of which the first names the layer.
        keys: Its tensors' names in the file by those in the layer.
        tensors: All tensors of the file.
        settings: PEFT's.
    """
    component = names[0].layer[0]
    try:
        return AdapterLayer(
            name=names[0].shown,
            tensors=MappingProxyType({tensor: tensors[key] for tensor, key in keys.items()}),
            header_alpha=alpha_of(settings, component, names[0].path),
            rank_stabilised=is_rank_stabilised(settings, component),
        )
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"is not a valid adapter: {error}") from error
