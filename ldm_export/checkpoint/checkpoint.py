"""Checkpoints as named, lazy, memory-mapped tensors: nothing in them is trusted, nothing is run.

All three formats are read by this package's own parsers, which only compare numbers: no
`torch.load`, no `pickle`, no fallback to either. Opening a file touches its directory, not its
tensors.
"""

import mmap
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ldm_export.checkpoint.file_fields import FileFields
from ldm_export.checkpoint.mistaken_files import HEAD_BYTES, unreadable
from ldm_export.checkpoint.not_a_file import why_not_a_file, why_not_opened
from ldm_export.checkpoint.stored_tensors import StoredTensor
from ldm_export.checkpoint.usual_globals import unusual_globals
from ldm_export.errors import CheckpointError
from ldm_runtime.closing import Closing
from ldm_runtime.tensor_files.errors import FormatError
from ldm_runtime.tensor_files.safetensors_header import is_safetensors, read_safetensors_header
from ldm_runtime.tensor_files.tensor_extent import TensorExtent
from ldm_runtime.tensor_files.tensor_values import tensor_values
from ldm_runtime.tensor_files.torch_archive import ZIP_MAGIC, read_torch_archive
from ldm_runtime.tensor_files.torch_legacy import is_torch_legacy, read_torch_legacy
from ldm_runtime.tensor_files.torch_state_dict import TorchContents

#: What DataParallel and DistributedDataParallel, torch.compile, and Lightning's Fabric put before
#: the name of every tensor of the module that they wrap.
_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")


class MappedFile:
    """One file, mapped read-only. It is unmapped when it is closed and no array uses it any more.

    The file must not shrink while it is mapped: touching what is gone kills the process, as with
    every mapping.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise CheckpointError(path, why_not_a_file(path))
            if path.stat().st_size == 0:
                raise CheckpointError(path, "is empty; get the file again")
            with path.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(path, why_not_opened(path, error)) from error
        self._bytes: npt.NDArray[np.uint8] | None = np.frombuffer(mapping, dtype=np.uint8)

    @property
    def bytes(self) -> npt.NDArray[np.uint8]:
        """The whole file; arrays made from it keep the mapping alive."""
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed; read its tensors before closing it")
        return self._bytes

    def close(self) -> None:
        """Give up the mapping. Arrays made from it stay valid."""
        self._bytes = None


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor that stays in its file until it is read.

    Attributes:
        name: Its name in the state dict.
        extent: Its place in the file.
        file: The file.
    """

    name: str
    extent: TensorExtent
    file: MappedFile = field(repr=False)

    @property
    def dtype(self) -> str:
        """Type of an element as torch names it, such as "float32" or "bfloat16"."""
        return self.extent.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        return self.extent.shape

    @property
    def stride(self) -> tuple[int, ...]:
        """Elements from one index to the next along each axis."""
        return self.extent.stride

    @property
    def nbytes(self) -> int:
        """Bytes that its elements take, as stored, when they are laid out one after another."""
        return self.extent.nbytes

    def numpy(self) -> npt.NDArray[Any]:
        """Return its values.

        The array is a read-only view of the mapped file, which it keeps mapped, and may be
        unaligned there. Only bfloat16 and types of 8 bits, which NumPy lacks, are widened into a
        fresh float32 array.

        Raises:
            ValueError: The checkpoint is closed.
        """
        return tensor_values(self.extent, self.file.bytes)


@dataclass(frozen=True, kw_only=True)
class ComponentFiles:
    """The files that a component is read from in place of the checkpoint's.

    Attributes:
        component: Its name in messages, such as "autoencoder".
        path: The file or folder that the user gave.
        files: Every file that was read, by its name within `path`.
    """

    component: str
    path: Path
    files: Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Closing):
    """An open checkpoint. Close it, or use it in a `with` statement.

    Attributes:
        path: The file, or the folder.
        format: How it is written; "torch-legacy" is the format of torch before 1.6.
        tensors: Its tensors, by their names in the state dict; those of a diffusers folder by the
            names that a single file has for them.
        skipped: Names of entries next to the tensors that were not read.
        global_step: Training step, if the file says so.
        metadata: The file's own metadata: untrusted text, to be escaped before it is shown.
        unusual_globals: Names in its pickle that torch does not write of its own accord: untrusted
            text as well. Nothing here looks them up, but `torch.load` may.
        files: Every file that it was read from, by its name within the checkpoint.
        components: Components that were read from files of their own.
        stated: What its configuration files say of the model.
        opened: What `close` gives up.
    """

    path: Path
    format: Literal["torch", "torch-legacy", "safetensors", "diffusers"]
    tensors: Mapping[str, StoredTensor]
    skipped: tuple[str, ...]
    global_step: int | None
    metadata: Mapping[str, str]
    unusual_globals: tuple[str, ...] = ()
    files: Mapping[str, Path]
    components: tuple[ComponentFiles, ...] = ()
    stated: FileFields = field(default_factory=FileFields)
    opened: tuple[Closing | MappedFile, ...] = field(repr=False)

    def close(self) -> None:
        """Give up its files. Arrays that were read stay valid; further reading is an error."""
        for each in self.opened:
            each.close()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint in one of torch's two formats (.ckpt, .pt, .pth, .bin) or in safetensors.

    The format is told by the content, not by the name. State dicts inside state dicts are entered,
    and what a wrapper of the whole model put before every name is left out.

    Raises:
        CheckpointError: The file is not a checkpoint, is damaged, or has unexpected contents.
    """
    file = MappedFile(path)
    try:
        return _read(file)
    except FormatError as error:
        file.close()
        raise CheckpointError(path, str(error)) from error


def _read(file: MappedFile) -> Checkpoint:
    data = file.bytes.data
    head = bytes(data[:HEAD_BYTES])
    if head.startswith(ZIP_MAGIC):
        return _of_torch("torch", read_torch_archive(data), file)
    if is_torch_legacy(head):
        return _of_torch("torch-legacy", read_torch_legacy(data), file)
    if is_safetensors(head):
        extents, metadata = read_safetensors_header(data)
        return Checkpoint(
            path=file.path,
            format="safetensors",
            tensors=_lazy(extents, file),
            skipped=(),
            global_step=None,
            metadata=metadata,
            files=MappingProxyType({file.path.name: file.path}),
            opened=(file,),
        )
    raise FormatError(unreadable(head))


def _of_torch(
    format_: Literal["torch", "torch-legacy"], contents: TorchContents, file: MappedFile
) -> Checkpoint:
    return Checkpoint(
        path=file.path,
        format=format_,
        tensors=_lazy(contents.tensors, file),
        skipped=contents.skipped,
        global_step=contents.global_step,
        metadata=MappingProxyType({}),
        unusual_globals=unusual_globals(contents.globals),
        files=MappingProxyType({file.path.name: file.path}),
        stated=FileFields(global_step=contents.global_step),
        opened=(file,),
    )


def _lazy(extents: Mapping[str, TensorExtent], file: MappedFile) -> Mapping[str, LazyTensor]:
    wrappers = _wrappers_of(extents)
    named = {name.removeprefix(wrappers): extent for name, extent in extents.items()}
    return MappingProxyType(
        {name: LazyTensor(name=name, extent=extent, file=file) for name, extent in named.items()}
    )


def _wrappers_of(names: Iterable[str]) -> str:
    """Return the beginning that wrappers of a whole model gave to every one of `names`, or ""."""
    prefix, rests = "", list(names)
    while wrapper := next(
        (each for each in _WRAPPERS if all(name.startswith(each) for name in rests)), ""
    ):
        prefix, rests = prefix + wrapper, [name.removeprefix(wrapper) for name in rests]
    return prefix
