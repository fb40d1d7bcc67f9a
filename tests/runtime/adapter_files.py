"""Files of adapters as bytes, written by hand in the safetensors format."""

import json

import numpy as np

_TYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64"}


def safetensors(tensors, metadata=None, types=None):
    """The bytes of a file of tensors by name; `types` names the format's type of some."""
    header, data = {}, b""
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": (types or {}).get(name) or _TYPES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def array(*rows, dtype=np.float32):
    return np.array(rows, dtype=dtype)
