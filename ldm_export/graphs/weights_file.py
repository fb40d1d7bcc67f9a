"""The weight file of a component, which all its graphs refer to.

Tensors lie one after another, each at a multiple of 4096 bytes, so that a runtime can map the
file and any of its pages straight into memory.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from ldm_runtime.bundle.manifest import WeightsDType

ALIGNMENT = 4096
#: Weights up to this many bytes stay inside the graphs.
INLINE_BYTES = 256

_DTYPES: Mapping[WeightsDType, tuple[np.dtype[Any], ir.DataType]] = {
    "float16": (np.dtype("<f2"), ir.DataType.FLOAT16),
    "float32": (np.dtype("<f4"), ir.DataType.FLOAT),
}


def store_weights(
    model: ir.Model,
    path: Path,
    dtype: WeightsDType,
    weights: Collection[str],
    exact: Collection[str] = (),
) -> None:
    """Write the weights of `model` to `path` and make the model refer to them.

    Constants that are not weights, such as the frequencies of timestep features, stay inside the
    graphs in float32: rounding them would cost accuracy and save nothing.

    Args:
        model: Changed in place: its large weights become external, of type `dtype`. The nodes that
            use them are not adapted, see `passes.AssignPrecision`.
        path: The file to write. The model refers to it by its bare name.
        dtype: Type to store weights in.
        weights: Names of the initializers that are weights, in float32.
        exact: Names of weights that are stored in float32 whatever `dtype` is.
    """
    with path.open("wb") as file:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None  # an initializer has a value
            if name not in weights or tensor.nbytes <= INLINE_BYTES:
                continue
            array_dtype, ir_dtype = _DTYPES["float32" if name in exact else dtype]
            offset = _align(file)
            array = np.ascontiguousarray(tensor.numpy(), dtype=array_dtype)
            length = file.write(array.data)
            value.const_value = ir.ExternalTensor(
                path.name,
                offset,
                length,
                ir_dtype,
                shape=ir.Shape(array.shape),
                name=name,
                base_dir=path.parent,
            )
            value.dtype = ir_dtype


def _align(file: BinaryIO) -> int:
    file.write(bytes(-file.tell() % ALIGNMENT))
    return file.tell()
