"""One component from torch to ONNX: traced once, written as two graphs over one weight file.

The steps are separate functions, so that torch's copy of the weights can be gone before a graph is
loaded for checking: `sample_inputs` → torch's outputs → `write_graphs` → `measure`.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from torch import nn

from ldm_export.errors import ExportError
from ldm_export.onnx_passes import AssignPrecision, name_dynamic_axes
from ldm_export.precision import NodePrecision, all_fp32, fp16_with_islands
from ldm_export.weights_file import INLINE_BYTES, store_weights
from ldm_runtime.backends import Runner, Tensors
from ldm_runtime.components import COMPONENTS, DYNAMIC_AXES, Component, TensorSignature
from ldm_runtime.manifest import (
    GraphRecord,
    GraphVariant,
    ModelSpec,
    ParityRecord,
    WeightsDType,
    axis_sizes,
)
from ldm_runtime.verify import max_relative_error, relative_l2

#: InstanceNormalization and plain attention: the forms every engine has kernels for.
OPSET = 20
WEIGHTS_FILE = "weights.bin"

_PLANS: Mapping[GraphVariant, tuple[str, Callable[[ir.Graph], NodePrecision]]] = MappingProxyType(
    {"fp16": ("model.onnx", fp16_with_islands), "fp32": ("model.cpu.onnx", all_fp32)}
)

#: Highest error of a graph against torch: (measure, bound). A graph over the bundle's own weights
#: that computes in fp32 must agree closely; rounding weights or arithmetic to fp16 costs more.
MAX_RELATIVE_ERROR = 1e-4
MAX_RELATIVE_L2 = 5e-3


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One set of inputs and torch's outputs for it.

    Attributes:
        batch: Batch size.
        height: Latent height, 0 where the component has none.
        width: Latent width, likewise.
        inputs: Arrays by input name.
        expected: Torch's output over the checkpoint's own weights.
        stored: Torch's output over the weights as the bundle stores them.
    """

    batch: int
    height: int
    width: int
    inputs: Tensors
    expected: Tensors
    stored: Tensors


def sample_inputs(name: str, spec: ModelSpec) -> list[tuple[tuple[int, int, int], Tensors]]:
    """Return inputs of component `name` at two sizes and two batch sizes, small and fixed.

    Returns:
        Pairs of (batch, latent height, latent width) and arrays by input name.
    """
    step = 2 ** (len(spec.unet.channel_mult) - 1)
    samples = []
    for batch, height, width in ((1, 2 * step, 2 * step), (3, 2 * step, 3 * step)):
        rng = np.random.default_rng(batch)
        sizes = _sizes(spec, {"batch": batch, "height": height, "width": width})
        arrays = {
            tensor.name: _sample(tensor, sizes, spec, rng) for tensor in COMPONENTS[name].inputs
        }
        has_size = "height" in _axes(COMPONENTS[name])
        samples.append(((batch, height * has_size, width * has_size), arrays))
    return samples


def round_stored(network: nn.Module, dtype: WeightsDType) -> bool:
    """Round a network's weights to what a bundle stores, in place; tell whether any changed."""
    changed = False
    if dtype == "float16":
        for parameter in network.parameters():
            if parameter.nbytes > INLINE_BYTES:
                rounded = parameter.data.half().float()
                changed |= not torch.equal(rounded, parameter.data)
                parameter.data = rounded
    return changed


def write_graphs(
    name: str, network: nn.Module, spec: ModelSpec, folder: Path, dtype: WeightsDType
) -> tuple[GraphRecord, ...]:
    """Trace a network and write its graphs and weights.

    Args:
        name: Component, also the name of `folder` in the bundle.
        network: In float32 on the CPU, with real weights.
        spec: What the checkpoint is.
        folder: Existing folder for the files.
        dtype: How weights are stored.

    Raises:
        ExportError: Torch cannot trace the network, or a graph is not valid ONNX.
    """
    model = _trace(name, network, spec)
    store_weights(model, folder / WEIGHTS_FILE, dtype)
    model.graph.name = name
    light = ir.to_proto(model)
    del model
    records = []
    for variant, (file, plan) in _PLANS.items():
        graph = ir.from_proto(light)
        AssignPrecision(plan(graph.graph))(graph)
        RemoveUnusedNodesPass()(graph)
        ir.save(graph, folder / file)
        try:
            onnx.checker.check_model(str(folder / file), full_check=True)
        except onnx.checker.ValidationError as error:
            raise ExportError(f"the {variant} graph of {name} is not valid ONNX: {error}") from error
        records.append(GraphRecord(variant=variant, file=f"{name}/{file}"))
    return tuple(records)


def measure(
    name: str, graph: GraphRecord, folder: Path, samples: Sequence[Sample]
) -> tuple[ParityRecord, ...]:
    """Run a graph in ONNX Runtime on samples and return how far it is from torch.

    Raises:
        ExportError: The graph does not load, or an error is above its bound.
    """
    engine = _open_lean(folder / Path(graph.file).name)
    records = []
    for sample in samples:
        outputs = engine.run(sample.inputs)
        references = {"checkpoint": sample.expected}
        if graph.variant == "fp32":
            references["stored"] = sample.stored
        for reference, expected in references.items():
            record = _parity(graph.variant, reference, sample, outputs, expected)
            _check_bound(name, record)
            records.append(record)
    return tuple(records)


def _check_bound(name: str, record: ParityRecord) -> None:
    if record.reference == "stored":
        measure, value, bound = "relative error", record.max_relative_error, MAX_RELATIVE_ERROR
    else:
        measure, value, bound = "relative L2 error", record.relative_l2, MAX_RELATIVE_L2
    if not value <= bound:
        raise ExportError(
            f"the {record.variant} graph of {name} differs from torch: {measure} {value:.2e} at "
            f"batch {record.batch}, latents {record.height}x{record.width}, more than {bound:.0e}; "
            "nothing was written. Try --weights-dtype fp32"
        )


def _parity(
    variant: GraphVariant, reference: str, sample: Sample, outputs: Tensors, expected: Tensors
) -> ParityRecord:
    return ParityRecord(
        variant=variant,
        reference="stored" if reference == "stored" else "checkpoint",
        batch=sample.batch,
        height=sample.height,
        width=sample.width,
        max_relative_error=max(max_relative_error(outputs[k], expected[k]) for k in expected),
        relative_l2=max(relative_l2(outputs[k], expected[k]) for k in expected),
    )


class _LeanSession:
    """ONNX Runtime with as little memory as it can be had: no arena, no repacked weights."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, inputs: Tensors) -> Tensors:
        outputs = self._session.run(self._outputs, dict(inputs))
        return dict(zip(self._outputs, outputs, strict=True))


def _open_lean(path: Path) -> Runner:
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return _LeanSession(
            onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        )
    except Exception as error:  # noqa: BLE001  (ONNX Runtime raises classes it does not export)
        raise ExportError(f"ONNX Runtime cannot load {path.name}: {error}") from error


def _trace(name: str, network: nn.Module, spec: ModelSpec) -> ir.Model:
    component = COMPONENTS[name]
    _, arrays = sample_inputs(name, spec)[1]
    # Without torchvision, which nothing here needs, every export begins with four warnings.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    arguments = tuple(torch.from_numpy(arrays[tensor.name]) for tensor in component.inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                arguments,
                input_names=[tensor.name for tensor in component.inputs],
                output_names=[tensor.name for tensor in component.outputs],
                dynamic_shapes=_dynamic_shapes(component, spec),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # noqa: BLE001  (torch.export raises many unrelated classes)
        raise ExportError(f"torch cannot trace the {name}: {error}") from error
    assert program is not None  # only `f=` makes it None
    model = program.model
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ClearMetadataAndDocStringPass()(model)
    tensors = (*component.inputs, *component.outputs)
    name_dynamic_axes(model, {tensor.name: tensor.axes for tensor in tensors})
    return model


def _dynamic_shapes(
    component: Component, spec: ModelSpec
) -> tuple[dict[int, torch.export.Dim], ...]:
    """Return torch.export's description of each input: which axes may change, and how.

    Sizes are multiples: of what the UNet halves, and of the autoencoder's factor in pixels.
    """
    step = 2 ** (len(spec.unet.channel_mult) - 1) if component.name == "unet" else 1
    factor = spec.autoencoder.factor
    height, width = torch.export.Dim("height_", min=1), torch.export.Dim("width_", min=1)
    dims = {
        "batch": torch.export.Dim("batch", min=1),
        "height": step * height if step > 1 else height,
        "width": step * width if step > 1 else width,
        "image_height": factor * height if factor > 1 else height,
        "image_width": factor * width if factor > 1 else width,
    }
    return tuple(
        {index: dims[axis] for index, axis in enumerate(tensor.axes) if axis in DYNAMIC_AXES}
        for tensor in component.inputs
    )


def _axes(component: Component) -> set[str]:
    return {axis for tensor in (*component.inputs, *component.outputs) for axis in tensor.axes}


def _sizes(spec: ModelSpec, dynamic: Mapping[str, int]) -> Mapping[str, int]:
    factor = spec.autoencoder.factor
    return {
        **axis_sizes(spec),
        **dynamic,
        "image_height": dynamic["height"] * factor,
        "image_width": dynamic["width"] * factor,
    }


def _sample(
    tensor: TensorSignature, sizes: Mapping[str, int], spec: ModelSpec, rng: np.random.Generator
) -> npt.NDArray[np.generic]:
    shape = [sizes[axis] for axis in tensor.axes]
    match tensor.name:
        case "tokens":
            return rng.integers(spec.text_encoder.vocab_size, size=shape)
        case "timesteps":
            return rng.uniform(0, len(spec.alphas_cumprod) - 1, size=shape).astype(np.float32)
        case "image":
            return rng.uniform(-1, 1, size=shape).astype(np.float32)
        case _:
            return rng.standard_normal(shape, dtype=np.float32)
