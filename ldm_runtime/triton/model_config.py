"""`config.pbtxt` of a Triton model, in the text format of protocol buffers.

Source: protobuf/model_config.proto of github.com/triton-inference-server/common.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ldm_runtime.bundle.manifest import ComponentRecord
from ldm_runtime.specs.components import TensorSignature
from ldm_runtime.specs.model import ModelSpec, axis_sizes
from ldm_runtime.specs.tasks import task_record
from ldm_runtime.triton.calls import FIELDS_INPUT

#: Device of the instances of a model.
Kind = Literal["gpu", "cpu"]
_DTYPES = MappingProxyType({"float32": "TYPE_FP32", "int64": "TYPE_INT64"})
#: Fields of a request with an input of their own, where the model takes them. A guidance scale of
#: 64 bits is the number that a client writes, so that its image is the one of the Python API.
_FIELD_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "prompt": "TYPE_STRING",
        "negative_prompt": "TYPE_STRING",
        "class_label": "TYPE_INT64",
        "seed": "TYPE_UINT64",
        "num_inference_steps": "TYPE_INT32",
        "guidance_scale": "TYPE_FP64",
        FIELDS_INPUT: "TYPE_STRING",
    }
)


@dataclass(frozen=True, kw_only=True)
class Instances:
    """The instances of a Triton model, each a process or session of its own.

    Attributes:
        kind: Their device.
        count: How many there are, on every GPU or in all.
    """

    kind: Kind = "gpu"
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    name: str
    dtype: str
    dims: tuple[int, ...]
    is_optional: bool = False


def generator_config(
    name: str,
    spec: ModelSpec,
    instances: Instances,
    *,
    max_batch: int,
    options: Mapping[str, str],
) -> str:
    """Return the configuration of the model that answers requests with images.

    Args:
        name: Name of the model.
        spec: The model of the bundle, whose task decides which inputs there are.
        instances: Its instances.
        max_batch: Most images that share a call of the UNet.
        options: Arguments of `Generator`, as text; "true" is a flag that is set.
    """
    takes, needed = task_record(spec).takes, task_record(spec).needs
    inputs = [
        _Tensor(name=field, dtype=dtype, dims=(1,), is_optional=(field,) not in needed)
        for field, dtype in _FIELD_DTYPES.items()
        if field in takes or field == FIELDS_INPUT
    ]
    outputs = [
        _Tensor(name="image", dtype="TYPE_UINT8", dims=(-1, -1, 3)),
        _Tensor(name="image_seed", dtype="TYPE_UINT64", dims=(1,)),
    ]
    lines = _lines(name, "python", inputs, outputs, instances, max_batch=max_batch)
    parameters = (
        f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}"
        for key, value in options.items()
    )
    return "\n".join((*lines, "dynamic_batching { }", *parameters, ""))


def network_config(
    name: str, component: ComponentRecord, spec: ModelSpec, instances: Instances
) -> str:
    """Return the configuration of a network in the ONNX Runtime backend.

    Inputs and outputs have their whole shapes, as in the graph, and no batch dimension that Triton
    knows of: the batch of a UNet holds both halves of guidance.
    """
    sizes = axis_sizes(spec, component.name)

    def tensors(signatures: Sequence[TensorSignature]) -> list[_Tensor]:
        return [
            _Tensor(
                name=each.name,
                dtype=_DTYPES[each.dtype],
                dims=tuple(sizes.get(axis, -1) for axis in each.axes),
            )
            for each in signatures
        ]

    inputs, outputs = tensors(component.inputs), tensors(component.outputs)
    return "\n".join((*_lines(name, "onnxruntime", inputs, outputs, instances, max_batch=0), ""))


def _lines(
    name: str,
    backend: str,
    inputs: Sequence[_Tensor],
    outputs: Sequence[_Tensor],
    instances: Instances,
    *,
    max_batch: int,
) -> Iterator[str]:
    yield f"name: {_text(name)}"
    yield f"backend: {_text(backend)}"
    yield f"max_batch_size: {max_batch}"
    for place, tensors in (("input", inputs), ("output", outputs)):
        for each in tensors:
            dims = ", ".join(map(str, each.dims))
            more = " optional: true" if each.is_optional else ""
            named = f"name: {_text(each.name)} data_type: {each.dtype} dims: [ {dims} ]{more}"
            yield f"{place} {{ {named} }}"
    yield f"instance_group {{ kind: KIND_{instances.kind.upper()} count: {instances.count} }}"


def _text(value: str) -> str:
    """Return a string of the text format, which escapes as JSON does within ASCII."""
    return json.dumps(value)
