"""The tensors of a file in any of the three formats, each read when its values are asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_runtime.tensor_files.errors import FormatError
from ldm_runtime.tensor_files.pickle_reader import PickleContents
from ldm_runtime.tensor_files.safetensors_header import is_safetensors, read_safetensors_header
from ldm_runtime.tensor_files.tensor_extent import TensorExtent
from ldm_runtime.tensor_files.tensor_values import tensor_values
from ldm_runtime.tensor_files.torch_archive import ZIP_MAGIC, open_torch_archive
from ldm_runtime.tensor_files.torch_legacy import is_torch_legacy, open_torch_legacy
from ldm_runtime.tensor_files.torch_state_dict import FindTensor

_HEAD_BYTES = 512

#: Finds the tensors in the contents of a pickle, or raises a `FormatError`.
TensorsOfPickle = Callable[[PickleContents, FindTensor], Mapping[str, TensorExtent]]


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor that stays in its file until it is read.

    Attributes:
        name: Its name in the file.
        extent: Its place in the file.
        data: The whole file.
    """

    name: str
    extent: TensorExtent
    data: npt.NDArray[np.uint8] = field(repr=False)

    @property
    def dtype(self) -> str:
        """Type of an element as torch names it, such as "float32" or "bfloat16"."""
        return self.extent.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        return self.extent.shape

    def numpy(self) -> npt.NDArray[Any]:
        """Return its values: a view of the file where NumPy has the type; see `tensor_values`."""
        return tensor_values(self.extent, self.data)


def open_tensors(
    data: npt.NDArray[np.uint8], tensors_of: TensorsOfPickle, wanted: str
) -> tuple[Mapping[str, LazyTensor], Mapping[str, str]]:
    """Find the tensors of a file that torch or safetensors wrote; its content tells which.

    Args:
        data: The whole file.
        tensors_of: Finds the tensors in a pickle of torch.
        wanted: The end of the sentence that says that it is neither, such as "give a .pt file".

    Returns:
        The tensors by name, and the file's own metadata: untrusted text.

    Raises:
        FormatError: The file is of another format, or is damaged.
    """
    extents, metadata = _extents(data.data, tensors_of, wanted)
    tensors = {
        name: LazyTensor(name=name, extent=extent, data=data) for name, extent in extents.items()
    }
    return MappingProxyType(tensors), metadata


def _extents(
    view: memoryview, tensors_of: TensorsOfPickle, wanted: str
) -> tuple[Mapping[str, TensorExtent], Mapping[str, str]]:
    head = bytes(view[:_HEAD_BYTES])
    if head.startswith(ZIP_MAGIC):
        return tensors_of(*open_torch_archive(view)), MappingProxyType({})
    if is_torch_legacy(head):
        return tensors_of(*open_torch_legacy(view)), MappingProxyType({})
    if is_safetensors(head):
        return read_safetensors_header(view)
    raise FormatError(f"is neither a torch nor a safetensors file; {wanted}")
