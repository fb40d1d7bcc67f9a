"""One file of weights that every graph of a component points into.

Tensors lie one after another, each at a multiple of 4096 bytes, so that a runtime can map the
file and any of its pages straight into memory.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from ldm_runtime.manifest import WeightsDType

ALIGNMENT = 4096
#: Tensors up to this many bytes stay inside the graphs.
INLINE_BYTES = 256

_DTYPES = {
    "float16": (np.dtype(np.float16), ir.DataType.FLOAT16),
    "float32": (np.dtype(np.float32), ir.DataType.FLOAT),
}


def store_weights(model: ir.Model, path: Path, dtype: WeightsDType) -> None:
    """Write the floating initializers of `model` to `path` and make the model refer to them.

    Args:
        model: Changed in place: its large floating initializers become external, of type `dtype`.
            The nodes that use them are not adapted, see `onnx_passes.AssignPrecision`.
        path: The file to write. The model refers to it by its bare name.
        dtype: What to store.
    """
    array_dtype, ir_dtype = _DTYPES[dtype]
    with path.open("wb") as file:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None  # an initializer has a value
            if tensor.dtype != ir.DataType.FLOAT or tensor.nbytes <= INLINE_BYTES:
                continue
            offset = _align(file)
            length = file.write(np.ascontiguousarray(tensor.numpy(), dtype=array_dtype))
            value.const_value = ir.ExternalTensor(
                path.name,
                offset,
                length,
                ir_dtype,
                shape=ir.Shape(tensor.shape),
                name=name,
                base_dir=path.parent,
            )
            value.dtype = ir_dtype


def _align(file: BinaryIO) -> int:
    file.write(bytes(-file.tell() % ALIGNMENT))
    return file.tell()
