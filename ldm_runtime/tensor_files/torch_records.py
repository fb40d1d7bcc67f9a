"""The tensors in a pickle of torch, as inert records.

torch pickles a tensor as a call: `torch._utils._rebuild_tensor_v2(storage, offset, shape, stride,
…)`, with the storage as a reference to a member of the archive around the pickle. The few such
calls are understood here and become a `TensorRecord`; every other call becomes a `Stub`.

Source: torch/_utils.py and torch/serialization.py of torch 2.13 (the calls have not changed since
the archive format appeared in 1.6).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ldm_runtime.tensor_files.errors import FormatError
from ldm_runtime.tensor_files.tensor_extent import DTYPE_BYTES, MAX_DIMS, is_size

_MAX_ARGUMENTS = 8
_MAX_KEY_LENGTH = 64  # torch numbers the storages of a file

_STORAGE_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "torch.DoubleStorage": "float64",
        "torch.FloatStorage": "float32",
        "torch.HalfStorage": "float16",
        "torch.BFloat16Storage": "bfloat16",
        "torch.LongStorage": "int64",
        "torch.IntStorage": "int32",
        "torch.ShortStorage": "int16",
        "torch.CharStorage": "int8",
        "torch.ByteStorage": "uint8",
        "torch.BoolStorage": "bool",
        "torch.ComplexFloatStorage": "complex64",
        "torch.ComplexDoubleStorage": "complex128",
        "torch.storage.UntypedStorage": "uint8",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Name:
    """A global that the pickle asked for. It was not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stub:
    """An object that unpickling would have made by calling `name`. It was not made."""

    name: Name


@dataclass(kw_only=True, slots=True, eq=False)
class ParameterDictRecord:
    """A `torch.nn.ParameterDict`, of whose attributes its parameters are kept. It was not made.

    Attributes:
        parameters: They by name, as the pickle has them; None where it has no dict of them.
    """

    parameters: Mapping[object, object] | None = None

    @property
    def name(self) -> Name:
        """The class, as of a `Stub`."""
        return PARAMETER_DICT

    def take_state(self, state: object) -> None:
        """Keep the parameters in the attributes that a pickle sets, whatever those are.

        They are in `_parameters`, as of every module, in each version of torch. That dict is
        referred to and not copied: a pickle may set it as often as it likes.
        """
        parameters = state.get("_parameters") if isinstance(state, dict) else None
        if isinstance(parameters, dict):
            self.parameters = parameters


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StorageRecord:
    """A run of elements kept outside the pickle.

    Attributes:
        key: Its name in the archive.
        dtype: Type of its elements, uint8 if it holds bytes, or None if the type is unknown here.
        numel: Number of elements it declares.
    """

    key: str
    dtype: str | None
    numel: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TensorRecord:
    """A view of a storage, as declared: nothing was compared with the storage itself.

    Attributes:
        storage: Storage of its elements.
        dtype: Type of an element, torch's name for it.
        offset: Elements of `dtype` to skip at the start of the storage.
        shape: Length of each axis.
        stride: Elements from one index to the next along each axis.
    """

    storage: StorageRecord
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


SET = Name(module="builtins", name="set")
ORDERED_DICT = Name(module="collections", name="OrderedDict")
PARAMETER_DICT = Name(module="torch.nn.modules.container", name="ParameterDict")


def record_of_reference(reference: object) -> StorageRecord | Name:
    """Understand a reference that torch lets out of a pickle.

    It is to a storage. The legacy format also has views of storages, and refers so to classes of
    modules, with the text of their source, which is not looked at.

    Raises:
        FormatError: It is anything else, or to a view.
    """
    match reference:
        case ("storage", Name() as kind, str() as key, str(), numel, *view):
            if view not in ([], [None]):
                raise FormatError(
                    "a storage is a view of another one, as only the oldest versions of torch "
                    "wrote it; load the file with torch and save its tensors again"
                )
            (numel,) = _sizes((numel,), "number of elements")
            if len(key) > _MAX_KEY_LENGTH:
                raise FormatError(f"a storage has a name of {len(key)} characters")
            return StorageRecord(key=key, dtype=_STORAGE_DTYPES.get(str(kind)), numel=numel)
        case ("module", Name() as module, _, _):
            return module
        case _:
            raise FormatError("a reference out of the pickle is not to a storage")


def record_of_call(callee: Name, arguments: tuple[object, ...]) -> object:
    """Return the record of what a call would have made, without making it.

    Returns:
        A `TensorRecord`, an empty dict, or a `Stub` for whatever is not understood: unknown names,
        quantised tensors, lazily conjugated ones.

    Raises:
        FormatError: A call that rebuilds a tensor has arguments that torch would not have written.
    """
    if callee == ORDERED_DICT and not arguments:
        return {}
    rebuild = _REBUILDERS.get(str(callee))
    if rebuild and len(arguments) > _MAX_ARGUMENTS:
        raise FormatError(f"{callee} is called with {len(arguments)} arguments")
    record = rebuild(arguments) if rebuild else None
    return record or Stub(name=callee)


def _rebuild_tensor(arguments: tuple[object, ...]) -> TensorRecord | None:
    match arguments:
        case (StorageRecord() as storage, offset, shape, stride):
            return _view(storage, storage.dtype, (offset, shape, stride))
        case _:
            raise FormatError("_rebuild_tensor is called with arguments that torch does not write")


def _rebuild_tensor_v2(arguments: tuple[object, ...]) -> TensorRecord | None:
    match arguments:
        case (StorageRecord() as storage, offset, shape, stride, _, _, *metadata):
            dtype = None if any(metadata) else storage.dtype
            return _view(storage, dtype, (offset, shape, stride))
        case _:
            raise FormatError("_rebuild_tensor_v2 is called with arguments torch does not write")


def _rebuild_tensor_v3(arguments: tuple[object, ...]) -> TensorRecord | None:
    match arguments:
        case (StorageRecord() as storage, offset, shape, stride, _, _, Name() as kind, *metadata):
            known = kind.module == "torch" and kind.name in DTYPE_BYTES and not any(metadata)
            return _view(storage, kind.name if known else None, (offset, shape, stride))
        case _:
            raise FormatError("_rebuild_tensor_v3 is called with arguments torch does not write")


def _rebuild_parameter(arguments: tuple[object, ...]) -> TensorRecord | None:
    match arguments:
        case (TensorRecord() as tensor, *_):
            return tensor
        case _:
            return None


def _rebuild_subclass(arguments: tuple[object, ...]) -> TensorRecord | None:
    match arguments:
        case (Name() as rebuild, Name(), tuple() as inner, *_) if str(rebuild) in _VIEWS:
            record = record_of_call(rebuild, inner)
            return record if isinstance(record, TensorRecord) else None
        case _:
            return None


_Rebuild = Callable[[tuple[object, ...]], TensorRecord | None]

_VIEWS: Mapping[str, _Rebuild] = MappingProxyType(
    {
        "torch._utils._rebuild_tensor": _rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
        "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    }
)
_REBUILDERS: Mapping[str, _Rebuild] = MappingProxyType(
    {
        **_VIEWS,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
        "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
        "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
    }
)


def _view(
    storage: StorageRecord, dtype: str | None, layout: tuple[object, object, object]
) -> TensorRecord | None:
    if dtype is None:
        return None
    (offset,) = _sizes((layout[0],), "storage offset")
    shape, stride = _sizes(layout[1], "shape"), _sizes(layout[2], "stride")
    if len(shape) != len(stride):
        raise FormatError(f"a tensor has {len(shape)} axes and {len(stride)} strides")
    return TensorRecord(storage=storage, dtype=dtype, offset=offset, shape=shape, stride=stride)


def _sizes(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_DIMS:
        raise FormatError(f"a tensor's {what} is not a tuple of at most {MAX_DIMS} integers")
    sizes = tuple(size for size in value if is_size(size))
    if len(sizes) != len(value):
        raise FormatError(f"a tensor's {what} holds something other than an int64 of 0 or more")
    return sizes
