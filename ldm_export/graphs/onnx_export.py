"""One component from torch to ONNX: traced once, written as two graphs over one weight file.

The parts are separate functions, so that torch's copy of the weights can be gone before a graph is
loaded for checking: `sample_inputs` → torch's outputs → `write_graphs` → `parity.measure`.
"""

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import rewrite
from torch import nn

from ldm_export.errors import ExportError, PrecisionError
from ldm_export.graphs.parity import SampleSize
from ldm_export.graphs.passes import (
    AssignPrecision,
    LayOutWeights,
    ShareConstants,
    name_dynamic_axes,
)
from ldm_export.graphs.precision import FP32_WEIGHTS, NodePrecision, all_fp32, fp16_with_islands
from ldm_export.graphs.weights_file import INLINE_BYTES, store_weights
from ldm_runtime.backends.contract import Tensors
from ldm_runtime.bundle.manifest import GraphRecord, GraphVariant, WeightsDType
from ldm_runtime.latents.codec import from_unet_scale
from ldm_runtime.specs.components import COMPONENTS, DYNAMIC_AXES, Component, TensorSignature
from ldm_runtime.specs.model import (
    ModelSpec,
    axis_sizes,
    components_of,
    latent_step,
    timestep_range,
    value_counts,
)
from ldm_runtime.specs.networks import AutoencoderSpec, TextEncoderSpec

#: InstanceNormalization and plain attention: the forms every engine has kernels for.
OPSET = 20
WEIGHTS_FILE = "weights.bin"

_FILES: Mapping[GraphVariant, str] = MappingProxyType(
    {"fp32": "model.cpu.onnx", "fp16": "model.onnx"}
)
#: Every variant of a graph; the one for the CPU engine comes first.
VARIANTS: tuple[GraphVariant, ...] = tuple(_FILES)
_IMAGE_STEP = 32  # pixels
# Without torchvision, which nothing here needs, every export begins with four warnings.
_TALKATIVE = "torch.onnx._internal.exporter._registration"


def sample_inputs(name: str, spec: ModelSpec) -> list[tuple[SampleSize, Tensors]]:
    """Return two sets of inputs of component `name`, small and fixed, of different lengths.

    The first has batch size 1 and a context of one chunk (of a text encoder, else of one token),
    the second batch size 3, another width and a context of two chunks. The UNet gets the fewest
    pixels that its downsampling steps allow; the autoencoder, whose first level has all of an
    image's pixels, gets 64x64 and 64x96 of those. The decoder's latents are as large as those of an
    image are: in the UNet's scale of variance 1, or of that of EDM. Of a text encoder's tokens, the
    second is a learned embedding where it takes one.

    Returns:
        Lengths of the dynamic axes, and arrays by input name.
    """
    step, component = latent_step(spec), components_of(spec)[name]
    if isinstance(spec.networks[component.network], AutoencoderSpec):
        step = max(1, _IMAGE_STEP // spec.autoencoder.factor)
    encoder = spec.find(TextEncoderSpec)
    tokens = 1 if encoder is None else encoder.max_tokens
    axes = _axes(component)
    samples: list[tuple[SampleSize, Tensors]] = []
    for batch, height, width, chunks in ((1, 2 * step, 2 * step, 1), (3, 2 * step, 3 * step, 2)):
        rng = np.random.default_rng(batch)
        lengths = {"batch": batch, "height": height, "width": width}
        lengths["context_tokens"] = chunks * tokens
        sizes, counts = _sizes(name, spec, lengths), value_counts(spec, name)
        arrays = {
            tensor.name: _sample(tensor, sizes, counts, spec, rng) for tensor in component.inputs
        }
        if name == "vae_decoder":
            latents = np.float32(spec.sigma_data) * arrays["latents"].astype(np.float32)
            arrays["latents"] = from_unet_scale(latents, spec.autoencoder)
        if "learned_embeddings" in arrays:
            arrays["tokens"][:, 1] = counts["tokens"]
        size = SampleSize(**{axis: length * (axis in axes) for axis, length in lengths.items()})
        samples.append((size, arrays))
    return samples


def round_stored(network: nn.Module, dtype: WeightsDType) -> bool:
    """Round a network's weights to the stored type, in place; return whether any changed.

    Raises:
        PrecisionError: A weight is beyond the range of `dtype`; those before it are rounded.
    """
    changed = False
    if dtype == "float16":
        for name, parameter in network.named_parameters():
            if parameter.nbytes > INLINE_BYTES and name not in FP32_WEIGHTS:
                rounded = parameter.data.half()
                if rounded.isinf().any():
                    raise PrecisionError(
                        f"weight {name!r} reaches {parameter.data.abs().max():.3g}, beyond the "
                        "range of float16"
                    )
                changed |= bool((rounded != parameter.data).any())
                parameter.data.copy_(rounded)
    return changed


def write_graphs(
    name: str,
    network: nn.Module,
    spec: ModelSpec,
    folder: Path,
    dtype: WeightsDType,
    variants: Sequence[GraphVariant] = VARIANTS,
) -> tuple[GraphRecord, ...]:
    """Trace a network and write its graphs and weights.

    Args:
        name: Component, also the name of `folder` in the bundle.
        network: In float32 on the CPU, with real weights.
        spec: The model.
        folder: Existing folder for the files.
        dtype: How weights are stored.
        variants: Graphs to write.

    Raises:
        ExportError: Torch cannot trace the network, or a graph is not valid ONNX.
    """
    weights = frozenset(parameter for parameter, _ in network.named_parameters())
    model = _trace(name, network, spec)
    _tidy(model, weights)
    store_weights(model, folder / WEIGHTS_FILE, dtype, weights, exact=FP32_WEIGHTS)
    light = ir.to_proto(model)
    del model  # and with it the last reference to torch's tensors but the caller's
    records = []
    for variant in variants:
        file = _FILES[variant]
        graph = ir.from_proto(light)
        AssignPrecision(_precision_policy(variant, graph.graph, spec))(graph)
        RemoveUnusedNodesPass()(graph)
        ir.save(graph, folder / file)
        try:
            onnx.checker.check_model(str(folder / file), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(
                f"the {variant} graph of {name} is not valid ONNX: {error}"
            ) from error
        records.append(GraphRecord(variant=variant, file=f"{name}/{file}"))
    return tuple(records)


def _precision_policy(variant: GraphVariant, graph: ir.Graph, spec: ModelSpec) -> NodePrecision:
    """Return the precision of each node of a graph, which has the name of its component."""
    if variant == "fp32":
        return all_fp32(graph)
    network = spec.networks[COMPONENTS[str(graph.name)].network]
    is_bert = isinstance(network, TextEncoderSpec) and network.kind == "bert"
    return fp16_with_islands(graph, residual_stream=is_bert)


def _trace(name: str, network: nn.Module, spec: ModelSpec) -> ir.Model:
    component = components_of(spec)[name]
    _, arrays = sample_inputs(name, spec)[1]
    arguments = tuple(
        None if tensor is None else torch.from_numpy(arrays[tensor.name])
        for tensor in _arguments(component)
    )
    try:
        with _quiet():
            program = torch.onnx.export(
                network,
                arguments,
                input_names=[tensor.name for tensor in component.inputs],
                output_names=[tensor.name for tensor in component.outputs],
                dynamic_shapes=_dynamic_shapes(component, spec),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,  # it would copy every matrix to transpose it, see _tidy
                verbose=False,
            )
    except Exception as error:  # torch.export raises many unrelated classes
        raise ExportError(f"torch cannot trace the {name}: {error}") from error
    assert program is not None  # only `f=` makes it None
    model = program.model
    model.graph.name = name
    tensors = (*component.inputs, *component.outputs)
    name_dynamic_axes(model, {tensor.name: tensor.axes for tensor in tensors})
    return model


def _tidy(model: ir.Model, weights: Collection[str]) -> None:
    """Simplify a traced graph, with every weight still itself: one tensor, under its own name."""

    def should_fold(node: ir.Node) -> bool | None:
        touched = any(value is not None and value.name in weights for value in node.inputs)
        return False if touched else None

    for _ in range(2):  # what one round removes makes more nodes constant in the next
        fold_constants_ir(model, should_fold=should_fold)
        LayOutWeights(weights)(model)
        rewrite(model)
        ShapeInferencePass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ShareConstants(weights)(model)
    CommonSubexpressionEliminationPass()(model)
    IdentityEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    ClearMetadataAndDocStringPass()(model)


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger(_TALKATIVE)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _arguments(component: Component) -> list[TensorSignature | None]:
    """Return the inputs that a network takes, None for one it lacks between others."""
    present = {tensor.name: tensor for tensor in component.inputs}
    names = [tensor.name for tensor in COMPONENTS[component.name].inputs]
    while names[-1] not in present:
        names.pop()
    return [present.get(name) for name in names]


def _dynamic_shapes(
    component: Component, spec: ModelSpec
) -> tuple[dict[int, torch.export.Dim] | None, ...]:
    """Return torch.export's description of each argument: which axes may change, and how.

    Sizes are multiples: of the UNet's latent step, and of the autoencoder's factor in pixels.
    """
    step = latent_step(spec) if component.name == "unet" else 1
    factor = spec.autoencoder.factor
    height, width = torch.export.Dim("height_", min=1), torch.export.Dim("width_", min=1)
    dims = {
        "batch": torch.export.Dim("batch", min=1),
        "height": step * height if step > 1 else height,
        "width": step * width if step > 1 else width,
        "image_height": factor * height if factor > 1 else height,
        "image_width": factor * width if factor > 1 else width,
        "context_tokens": torch.export.Dim("context_tokens", min=1),
    }
    return tuple(
        None
        if tensor is None
        else {index: dims[axis] for index, axis in enumerate(tensor.axes) if axis in DYNAMIC_AXES}
        for tensor in _arguments(component)
    )


def _axes(component: Component) -> set[str]:
    return {axis for tensor in (*component.inputs, *component.outputs) for axis in tensor.axes}


def _sizes(name: str, spec: ModelSpec, dynamic: Mapping[str, int]) -> Mapping[str, int]:
    factor = spec.autoencoder.factor
    return {
        **axis_sizes(spec, name),
        **dynamic,
        "image_height": dynamic["height"] * factor,
        "image_width": dynamic["width"] * factor,
    }


def _sample(
    tensor: TensorSignature,
    sizes: Mapping[str, int],
    counts: Mapping[str, int],
    spec: ModelSpec,
    rng: np.random.Generator,
) -> npt.NDArray[np.generic]:
    shape = [sizes[axis] for axis in tensor.axes]
    if tensor.name in counts:
        return rng.integers(counts[tensor.name], size=shape)
    if tensor.name == "timesteps":
        return rng.uniform(*timestep_range(spec), size=shape).astype(np.float32)
    if tensor.name == "image":
        return rng.uniform(-1, 1, size=shape).astype(np.float32)
    return rng.standard_normal(shape, dtype=np.float32)
