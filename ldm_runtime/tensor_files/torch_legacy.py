"""Files in torch's legacy format: five pickles one after another, then the storages.

torch 0.1.10 to 1.5 wrote it, and later ones do with `_use_new_zipfile_serialization=False`. The
pickles are a magic number, the version of the format, the sizes of the writer's types, the object,
and the keys of the storages in their order. Then follow, for each of these, the number of its
elements as an int64 and the elements. No table says where a storage begins, so all are walked
over, by their sizes alone.

Source: `_legacy_save` and `_legacy_load` in torch/serialization.py and
torch/csrc/serialization.cpp of torch 2.13.
"""

import re
from collections.abc import Mapping

from ldm_runtime.tensor_files.errors import CutOffError, FormatError
from ldm_runtime.tensor_files.pickle_machine import Limits
from ldm_runtime.tensor_files.pickle_reader import PickleContents
from ldm_runtime.tensor_files.tensor_extent import DTYPE_BYTES, TensorExtent
from ldm_runtime.tensor_files.torch_records import StorageRecord, TensorRecord
from ldm_runtime.tensor_files.torch_state_dict import (
    FindTensor,
    StoragePlace,
    TorchContents,
    read_untrusted_pickle,
    state_dict_of,
)

_NUMBER = 0x1950A86A20F9469CFC6C
#: The number as a pickle of protocol 1, of 2 or 3, and of 4 or 5, which begins with a frame.
_MAGIC = re.compile(
    b"(?:L%dL\n|\x80(?:[\2\3]|[\4\5]\x95.{8})\x8a\x0a%b)[.]"
    % (_NUMBER, re.escape(_NUMBER.to_bytes(10, "little"))),
    re.DOTALL,
)
_VERSION = 1001
_COUNT_BYTES = 8
_LIMITS = Limits()
_SMALL = Limits(max_bytes=1 << 12, max_opcodes=200)
_KEYS = Limits(max_bytes=8 << 20, max_opcodes=4 * _LIMITS.max_tensors)


def is_torch_legacy(head: bytes) -> bool:
    """Return whether a file that begins with `head` is in the legacy format."""
    return _MAGIC.match(head) is not None


def read_torch_legacy(data: memoryview) -> TorchContents:
    """Find the state dict in the file `data`, and the tensors in the file.

    Raises:
        FormatError: A pickle, a storage or a tensor is not what torch writes, or is cut off, or
            there is no state dict.
    """
    return state_dict_of(*open_torch_legacy(data))


def open_torch_legacy(data: memoryview) -> tuple[PickleContents, FindTensor]:
    """Read the pickle of the object in the file `data`, and find the tensors that it names.

    Raises:
        FormatError: A pickle or a storage is not what torch writes, or is cut off.
    """
    position = _skip_header(data)
    pickled = _read_pickle(data, position, "its pickle", _LIMITS)
    position += pickled.size
    keys = _read_pickle(data, position, "its list of storages", _KEYS)
    places = _places(data, position + keys.size, _order(keys.root, pickled.storages))

    def extent_of(record: TensorRecord) -> TensorExtent:
        storage = record.storage
        if storage.key not in places:
            raise FormatError(f"the file has no storage {storage.key!a}; get the file again")
        _check_same(pickled.storages[storage.key], storage)
        return places[storage.key].extent_of(record)

    return pickled, extent_of


def _skip_header(data: memoryview) -> int:
    """Check the three pickles before that of the object, and return where they end."""
    magic = _MAGIC.match(data)
    if magic is None:
        raise FormatError("does not begin as torch's legacy format does; get the file again")
    position = magic.end()
    version = _read_pickle(data, position, "the version of its format", _SMALL)
    if version.root != _VERSION:
        raise FormatError(
            f"is in torch's legacy format, but not of version {_VERSION}, the only one there is; "
            "get the file again"
        )
    position += version.size
    written_by = _read_pickle(data, position, "its description of the writer", _SMALL)
    system = written_by.root
    little_endian = system.get("little_endian") if isinstance(system, dict) else None
    if little_endian is not True:
        raise FormatError(
            "does not say that a little-endian machine wrote it; load it with torch and save it "
            "on one"
        )
    return position + written_by.size


def _read_pickle(data: memoryview, start: int, what: str, limits: Limits) -> PickleContents:
    """Read the pickle at byte `start`, whose end only reading it tells."""
    window = bytes(data[start : start + limits.max_bytes])
    try:
        return read_untrusted_pickle(window, what, limits)
    except CutOffError as error:
        if len(window) == limits.max_bytes:
            raise FormatError(f"{what} has more than the {len(window)} bytes allowed") from error
        raise FormatError(f"ends inside {what}: it is incomplete; download it again") from error


def _order(keys: object, declared: Mapping[str, StorageRecord]) -> list[StorageRecord]:
    """Return the storages in the order in which the file has them."""
    if not isinstance(keys, list):
        raise FormatError(f"its list of storages is a {type(keys).__name__}; get the file again")
    records = [declared.get(key) for key in keys if isinstance(key, str)]
    found = [record for record in records if record is not None]
    if len(found) != len(keys) or len({record.key for record in found}) != len(keys):
        raise FormatError(
            "its list of storages has one twice, or one that no tensor refers to; the file is "
            "damaged, get it again"
        )
    return found


def _places(
    data: memoryview, position: int, storages: list[StorageRecord]
) -> Mapping[str, StoragePlace]:
    """Walk over the storages, of which the first begins at byte `position` with its length.

    Raises:
        FormatError: One has another length than its pickle says or a type of unknown size, or they
            do not end where the file does.
    """
    places = {}
    for storage in storages:
        if storage.dtype is None:
            raise FormatError(
                f"storage {storage.key!a} has a type that is not read, as of quantised tensors; "
                "save the weights in float16 or float32"
            )
        start = position + _COUNT_BYTES
        numel = int.from_bytes(data[position:start], "little", signed=True)
        size = storage.numel * DTYPE_BYTES[storage.dtype]
        if start + size > len(data):
            raise FormatError(
                f"ends at byte {len(data)}, and its storage {storage.key!a} at byte "
                f"{start + size}: it is incomplete; download it again"
            )
        if numel != storage.numel:
            raise FormatError(
                f"storage {storage.key!a} should have {storage.numel} elements and has {numel}; "
                "get the file again"
            )
        places[storage.key] = StoragePlace(start=start, size=size, file_size=len(data))
        position = start + size
    if position != len(data):
        raise FormatError(
            f"ends at byte {len(data)}, and its last storage at byte {position}: it is damaged, or "
            "two files in one; get it again"
        )
    return places


def _check_same(first: StorageRecord, other: StorageRecord) -> None:
    """Check that two references to a storage agree; torch reads it as the first one says.

    Tensors without elements may share a storage whatever their types.
    """
    if (first.dtype, first.numel) != (other.dtype, other.numel) and (first.numel or other.numel):
        raise FormatError(
            f"storage {other.key!a} has {other.numel} elements of {other.dtype} here and "
            f"{first.numel} of {first.dtype} elsewhere; get the file again"
        )
