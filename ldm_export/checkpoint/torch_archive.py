"""Checkpoints in torch's archive format: a zip of one pickle and the storages it refers to.

Source: torch/serialization.py and caffe2/serialize/inline_container.cc of torch 2.13.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from ldm_export.checkpoint.pickle_machine import Limits
from ldm_export.checkpoint.pickle_reader import PickleContents, read_pickle_contents
from ldm_export.checkpoint.tensor_extent import (
    DTYPE_BYTES,
    TensorExtent,
    check_inside,
    check_name,
    is_size,
)
from ldm_export.checkpoint.torch_records import Name, Stub, TensorRecord
from ldm_export.checkpoint.zip_directory import Member, read_zip_directory
from ldm_export.errors import FormatError

#: torch does not look at the case of a member's name.
_PICKLE = re.compile(r"([^/]+)/data\.pkl", re.IGNORECASE)
_MAX_LEVELS = 8
#: The bluntest of the modules and names with which pickles attack the process that runs them.
#: There is no complete list of such names; `usual_globals` goes the other way.
_REFUSED = frozenset(
    {
        *("os", "posix", "nt", "subprocess", "pty", "socket", "shutil", "runpy"),
        *("importlib", "ctypes", "webbrowser"),
        *(
            f"{module}.{name}"
            for module in ("builtins", "__builtin__")
            for name in ("eval", "exec", "execfile", "compile", "open", "__import__", "breakpoint")
        ),
    }
)
_LIMITS = Limits()


@dataclass(frozen=True, kw_only=True)
class TorchContents:
    """The contents of a torch archive.

    Attributes:
        tensors: The tensors of the state dict, by name.
        skipped: Names of the other entries next to them.
        global_step: Training step, if the file says so.
        globals: Every global that its pickle names.
    """

    tensors: Mapping[str, TensorExtent]
    skipped: tuple[str, ...]
    global_step: int | None
    globals: frozenset[Name]


def read_torch_archive(data: memoryview) -> TorchContents:
    """Find the state dict in the archive `data`, and its tensors in the file.

    Raises:
        FormatError: The archive, its pickle or one of its tensors is not what torch writes, or
            there is no state dict in it.
    """
    members = read_zip_directory(data)
    root = _root_folder(members)
    _check_byte_order(data, members.get(f"{root}/byteorder"))
    contents = _read_pickle(data, members[f"{root}/data.pkl"])
    state_dict, global_step = _find_state_dict(contents.root)
    storages = _Storages(members=members, folder=f"{root}/data/", file_size=len(data))
    tensors = {
        check_name(name): storages.extent_of(name, value)
        for name, value in state_dict.items()
        if isinstance(value, TensorRecord)
    }
    if not tensors:
        if "string_to_param" in state_dict:
            raise FormatError(
                "is a textual inversion embedding and not a model; give the model's checkpoint"
            )
        raise FormatError(
            f"holds no tensors; its entries are {_listing(state_dict)}. Save a state dict "
            "with `torch.save(model.state_dict(), path)`"
        )
    skipped = (name for name, value in state_dict.items() if not isinstance(value, TensorRecord))
    return TorchContents(
        tensors=tensors,
        skipped=tuple(map(_shown, skipped)),
        global_step=global_step,
        globals=contents.globals,
    )


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
    try:
        return read_pickle_contents(pickle, _LIMITS, _REFUSED)
    except FormatError as error:
        raise FormatError(
            f"data.pkl: {error}; a file that torch.save did not write so may be meant to do harm: "
            "do not load it with torch either"
        ) from error


def _find_state_dict(root: object) -> tuple[Mapping[object, object], int | None]:
    """Descend through `state_dict`, or else `model`, entries to the dict that holds the tensors.

    A dict that has parameters itself is the state dict, whatever is inside it.
    """
    level, global_step = root, None
    for _ in range(_MAX_LEVELS):
        if not isinstance(level, dict):
            raise FormatError(f"holds {_kind(level)} and no dict of tensors; save a state dict")
        step = level.get("global_step")
        if global_step is None and is_size(step):
            global_step = step
        inner = None if _has_parameters(level) else _inner_dict(level)
        if inner is None:
            return level, global_step
        level = inner
    raise FormatError(f"state_dict is nested more than {_MAX_LEVELS} deep")


def _inner_dict(level: Mapping[object, object]) -> Mapping[object, object] | None:
    """Return the dict inside a dict that may hold the tensors; an empty one does not count."""
    keys = ("state_dict",) if _has_tensors(level) else ("state_dict", "model")
    found = (level.get(key) for key in keys)
    return next((inner for inner in found if isinstance(inner, dict) and inner), None)


def _has_parameters(level: Mapping[object, object]) -> bool:
    """Return whether a dict has tensors under paths into a module, not only a loss or a step."""
    return any(
        isinstance(value, TensorRecord) and isinstance(name, str) and "." in name
        for name, value in level.items()
    )


def _has_tensors(level: Mapping[object, object]) -> bool:
    return any(isinstance(value, TensorRecord) for value in level.values())


def _kind(value: object) -> str:
    name = str(value.name) if isinstance(value, Stub) else type(value).__name__
    return f"an object of type {name[:200]!a}"


def _shown(name: object) -> str:
    return ascii(name[:80])[1:-1] if isinstance(name, str) else f"<{type(name).__name__}>"


def _listing(names: Mapping[object, object]) -> str:
    shown = [_shown(name) for _, name in zip(range(10), names, strict=False)]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "") or "none"


@dataclass(frozen=True, kw_only=True)
class _Storages:
    """The members of an archive in which the elements of its tensors are."""

    members: Mapping[str, Member]
    folder: str
    file_size: int

    def extent_of(self, name: object, record: TensorRecord) -> TensorExtent:
        """Prove that a tensor lies inside its storage, and say where in the file that is."""
        try:
            return self._extent_of(record)
        except FormatError as error:
            raise FormatError(f"tensor {check_name(name)!r}: {error}") from error

    def _extent_of(self, record: TensorRecord) -> TensorExtent:
        storage = record.storage
        member = self.members.get(self.folder + storage.key)
        if member is None:
            raise FormatError(f"the archive has no storage {storage.key!a}; get the file again")
        size = storage.numel * (DTYPE_BYTES[storage.dtype] if storage.dtype else 1)
        if size > member.size:
            raise FormatError(
                f"storage {storage.key!a} should have {size} bytes and has {member.size}; "
                "get the file again"
            )
        skipped = record.offset * DTYPE_BYTES[record.dtype]
        extent = TensorExtent(
            dtype=record.dtype,
            shape=record.shape,
            stride=record.stride,
            start=member.start + skipped,
        )
        check_inside(extent, size - skipped, self.file_size)
        return extent
