"""The globals in pickles that `torch.save` writes for tensors alone.

A pickle with any other name is not for that reason a bad one: training frameworks pickle their own
classes. But `torch.load` with `weights_only=False` imports and calls what is named, and no list can
have all names that do harm. So the report on a file lists all that are not among these.

Source: torch/_tensor.py, torch/_utils.py and torch/serialization.py of torch 2.13.
"""

from collections.abc import Iterable

from ldm_runtime.tensor_files.torch_records import Name

_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_TYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    *("complex64", "complex128"),
)
_USUAL = frozenset(
    {
        "__builtin__.set",  # of protocol 2, for Python 2
        "_codecs.encode",
        "builtins.set",
        "collections.OrderedDict",
        "torch.ComplexDoubleStorage",
        "torch.ComplexFloatStorage",
        "torch.Size",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.storage.UntypedStorage",
        *(f"torch.{kind}Storage" for kind in _STORAGES),
        *(f"torch.{kind}" for kind in _TYPES),
    }
)


def unusual_globals(names: Iterable[Name]) -> tuple[str, ...]:
    """Return the names that torch does not write of its own accord, in alphabetical order."""
    return tuple(sorted({str(name) for name in names} - _USUAL))
