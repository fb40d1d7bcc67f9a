"""Files in torch's archive format: a zip of one pickle and the storages it refers to.

Source: torch/serialization.py and caffe2/serialize/inline_container.cc of torch 2.13.
"""

import re
import zlib
from collections.abc import Mapping

from ldm_runtime.tensor_files.errors import FormatError
from ldm_runtime.tensor_files.pickle_machine import Limits
from ldm_runtime.tensor_files.pickle_reader import PickleContents
from ldm_runtime.tensor_files.tensor_extent import TensorExtent
from ldm_runtime.tensor_files.torch_records import TensorRecord
from ldm_runtime.tensor_files.torch_state_dict import (
    FindTensor,
    StoragePlace,
    TorchContents,
    read_untrusted_pickle,
    state_dict_of,
)
from ldm_runtime.tensor_files.zip_directory import Member, read_zip_directory

#: The first bytes of an archive.
ZIP_MAGIC = b"PK\3\4"
#: torch does not look at the case of a member's name.
_PICKLE = re.compile(r"([^/]+)/data\.pkl", re.IGNORECASE)
_LIMITS = Limits()


def read_torch_archive(data: memoryview) -> TorchContents:
    """Find the state dict in the archive `data`, and its tensors in the file.

    Raises:
        FormatError: The archive, its pickle or one of its tensors is not what torch writes, or
            there is no state dict in it.
    """
    return state_dict_of(*open_torch_archive(data))


def open_torch_archive(data: memoryview) -> tuple[PickleContents, FindTensor]:
    """Read the pickle in the archive `data`, and find the tensors that it names.

    Raises:
        FormatError: The archive or its pickle is not what torch writes.
    """
    members = read_zip_directory(data)
    root = _root_folder(members)
    _check_byte_order(data, members.get(f"{root}/byteorder"))
    pickled = _read_pickle(data, members[f"{root}/data.pkl"])

    def extent_of(record: TensorRecord) -> TensorExtent:
        key = record.storage.key
        member = members.get(f"{root}/data/{key}")
        if member is None:
            raise FormatError(f"the archive has no storage {key!a}; get the file again")
        place = StoragePlace(start=member.start, size=member.size, file_size=len(data))
        return place.extent_of(record)

    return pickled, extent_of


def _root_folder(members: Mapping[str, Member]) -> str:
    roots = [match[1] for match in map(_PICKLE.fullmatch, members) if match]
    if len(roots) != 1 or f"{roots[0]}/data.pkl" not in members:
        raise FormatError(
            f"is a zip archive with {len(roots)} members named */data.pkl, and a file written by "
            "torch.save has one; is it a checkpoint?"
        )
    return roots[0]


def _check_byte_order(data: memoryview, member: Member | None) -> None:
    if member is None:  # torch before 2.1 does not say, and always wrote the machine's own
        return
    order = bytes(data[member.start : member.start + min(member.size, 16)])
    if order != b"little":
        raise FormatError(
            f"was written with byte order {order!a}; load it with torch on a little-endian "
            "machine and save it again"
        )


def _read_pickle(data: memoryview, member: Member) -> PickleContents:
    if member.size > _LIMITS.max_bytes:
        raise FormatError(
            f"data.pkl has {member.size} bytes, more than the {_LIMITS.max_bytes} allowed"
        )
    pickle = bytes(data[member.start : member.start + member.size])
    if zlib.crc32(pickle) != member.crc32:
        raise FormatError(
            "data.pkl does not have the CRC-32 that the archive gives: the file is damaged, get it "
            "again; or it was saved after `torch.serialization.set_crc32_options(False)`"
        )
    return read_untrusted_pickle(pickle, "data.pkl", _LIMITS)
