"""The state dict in a pickle of torch, with the place of every tensor in the file around it.

Both formats of torch pickle the same objects and keep the storages outside the pickle: the archive
of `torch_archive.py`, and the one before it, of `torch_legacy.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from ldm_runtime.tensor_files.errors import FormatError
from ldm_runtime.tensor_files.pickle_machine import Limits
from ldm_runtime.tensor_files.pickle_reader import PickleContents, read_pickle_contents
from ldm_runtime.tensor_files.tensor_extent import (
    DTYPE_BYTES,
    TensorExtent,
    check_inside,
    check_name,
    is_size,
)
from ldm_runtime.tensor_files.torch_records import (
    Name,
    ParameterDictRecord,
    Stub,
    TensorRecord,
)

#: Proves that a tensor lies inside its storage, and says where in the file; or a `FormatError`.
FindTensor = Callable[[TensorRecord], TensorExtent]

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


@dataclass(frozen=True, kw_only=True)
class TorchContents:
    """The contents of a file that torch wrote.

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


@dataclass(frozen=True, kw_only=True, slots=True)
class StoragePlace:
    """The bytes of a storage: `size` of them from byte `start` of a file of `file_size` bytes."""

    start: int
    size: int
    file_size: int

    def extent_of(self, record: TensorRecord) -> TensorExtent:
        """Prove that a tensor lies inside the storage, and say where in the file that is.

        Raises:
            FormatError: It does not, or the storage is shorter than its pickle says.
        """
        storage = record.storage
        size = storage.numel * (DTYPE_BYTES[storage.dtype] if storage.dtype else 1)
        if size > self.size:
            raise FormatError(
                f"storage {storage.key!a} should have {size} bytes and has {self.size}; "
                "get the file again"
            )
        skipped = record.offset * DTYPE_BYTES[record.dtype]
        extent = TensorExtent(
            dtype=record.dtype,
            shape=record.shape,
            stride=record.stride,
            start=self.start + skipped,
        )
        check_inside(extent, size - skipped, self.file_size)
        return extent


def read_untrusted_pickle(pickle: bytes, what: str, limits: Limits) -> PickleContents:
    """Read one pickle of a file from a stranger.

    Args:
        pickle: It, or bytes that begin with it.
        what: Its name in an error.
        limits: Limits of its cost.

    Raises:
        CutOffError: The bytes end before the pickle does.
        FormatError: It is not what torch writes.
    """
    try:
        return read_pickle_contents(pickle, limits, _REFUSED)
    except FormatError as error:
        raise type(error)(
            f"{what}: {error}; a file that torch.save did not write so may be meant to do harm: "
            "do not load it with torch either"
        ) from error


def state_dict_of(pickled: PickleContents, extent_of: FindTensor) -> TorchContents:
    """Find the state dict in the contents of a pickle, and its tensors in the file.

    Args:
        pickled: The contents of the pickle.
        extent_of: Proves that a tensor lies inside its storage, or raises a `FormatError`.

    Raises:
        FormatError: There is no state dict, or one of its tensors is not what torch writes.
    """
    state_dict, global_step = _find_state_dict(pickled.root)
    tensors = {
        check_name(name): _extent_of(name, value, extent_of)
        for name, value in state_dict.items()
        if isinstance(value, TensorRecord)
    }
    if not tensors:
        _refuse(state_dict)
    skipped = (name for name, value in state_dict.items() if not isinstance(value, TensorRecord))
    return TorchContents(
        tensors=tensors,
        skipped=tuple(map(_shown, skipped)),
        global_step=global_step,
        globals=pickled.globals,
    )


def _extent_of(name: object, record: TensorRecord, extent_of: FindTensor) -> TensorExtent:
    try:
        return extent_of(record)
    except FormatError as error:
        raise FormatError(f"tensor {check_name(name)!r}: {error}") from error


def _refuse(state_dict: Mapping[object, object]) -> NoReturn:
    if "string_to_param" in state_dict:
        raise FormatError(
            "is a textual inversion embedding and not a model; give the model's checkpoint"
        )
    raise FormatError(
        f"holds no tensors; its entries are {_listing(state_dict)}. Save a state dict "
        "with `torch.save(model.state_dict(), path)`"
    )


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
    if isinstance(value, (Stub, ParameterDictRecord)):
        name = str(value.name)
    else:
        name = type(value).__name__
    return f"an object of type {name[:200]!a}"


def _shown(name: object) -> str:
    return ascii(name[:80])[1:-1] if isinstance(name, str) else f"<{type(name).__name__}>"


def _listing(names: Mapping[object, object]) -> str:
    shown = [_shown(name) for _, name in zip(range(10), names, strict=False)]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "") or "none"
