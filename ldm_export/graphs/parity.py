"""The parity of a graph with torch: measured on fixed inputs, recorded, and bounded."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ldm_export.errors import ExportError, PrecisionError
from ldm_export.graphs.fp16_range import FP16_MAX, largest_value, watched_graph
from ldm_runtime.backends.contract import Tensors
from ldm_runtime.backends.onnxruntime.library import onnxruntime
from ldm_runtime.bundle.manifest import GraphRecord, GraphVariant, ParityRecord
from ldm_runtime.diagnostics.measures import max_relative_error, relative_l2

#: Highest error of a graph that computes in fp32 against torch over the same stored weights, and of
#: any graph against torch over the checkpoint's own weights: rounding to fp16 costs more.
MAX_RELATIVE_ERROR = 1e-4
MAX_RELATIVE_L2 = 5e-3


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """Lengths of the dynamic axes of one set of inputs, 0 where the component has no such axis.

    Attributes:
        batch: Batch size.
        height: Latent height.
        width: Latent width.
        context_tokens: Tokens of the context.
    """

    batch: int
    height: int
    width: int
    context_tokens: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One set of inputs and torch's outputs for it.

    Attributes:
        size: Lengths of its dynamic axes.
        inputs: Arrays by input name.
        expected: Torch's output over the checkpoint's own weights.
        stored: Torch's output over the weights as the bundle stores them.
    """

    size: SampleSize
    inputs: Tensors
    expected: Tensors
    stored: Tensors


def measure(
    name: str, graph: GraphRecord, folder: Path, samples: Sequence[Sample]
) -> tuple[ParityRecord, ...]:
    """Run a graph in ONNX Runtime on samples and return its errors against torch.

    Args:
        name: The component.
        graph: The graph to run.
        folder: Folder of its file.
        samples: Inputs to run it on, and torch's outputs.

    Raises:
        ExportError: The graph does not load or run, or an error of the fp32 graph is above its
            bound.
        PrecisionError: A value of the fp16 graph is beyond the range of half precision, or its
            error is above its bound.
    """
    path = folder / Path(graph.file).name
    if graph.variant == "fp16":
        _check_range(name, path, samples)  # first: of infinities no error can be computed
    engine = _LeanSession(path)
    records = []
    for sample in samples:
        outputs = engine.run(sample.inputs)
        if graph.variant == "fp32":
            records.append(_parity(graph.variant, "stored", sample, outputs))
        records.append(_parity(graph.variant, "checkpoint", sample, outputs))
    for record in records:
        _check_bound(name, record)
    return tuple(records)


def check_rounding(name: str, expected: Sequence[Tensors], stored: Sequence[Tensors]) -> None:
    """Check that a network's outputs survive the rounding of its weights.

    Args:
        name: The component.
        expected: Torch's outputs over the checkpoint's own weights, for every set of inputs.
        stored: Those over the rounded weights.

    Raises:
        PrecisionError: They differ by so much that no graph over these weights could pass.
    """
    worst = max(
        relative_l2(rounded[output], array)
        for wanted, rounded in zip(expected, stored, strict=True)
        for output, array in wanted.items()
    )
    bound = MAX_RELATIVE_L2 - MAX_RELATIVE_ERROR  # a graph has an error of its own
    if not worst <= bound:  # NaN is above every bound
        raise PrecisionError(
            f"rounding the weights of {name} to fp16 changes what it computes: relative L2 error "
            f"{worst:.2e}, more than {bound:.0e}"
        )


def _parity(
    variant: GraphVariant, reference: str, sample: Sample, outputs: Tensors
) -> ParityRecord:
    """Return the largest errors of any output; those of a NaN are NaN."""
    expected = sample.stored if reference == "stored" else sample.expected
    pairs = [(outputs[name], array) for name, array in expected.items()]
    return ParityRecord(
        variant=variant,
        reference="stored" if reference == "stored" else "checkpoint",
        **asdict(sample.size),
        max_relative_error=float(np.max([max_relative_error(*pair) for pair in pairs])),
        relative_l2=float(np.max([relative_l2(*pair) for pair in pairs])),
    )


def _check_bound(name: str, record: ParityRecord) -> None:
    if record.reference == "stored":
        measured, value, bound = "relative error", record.max_relative_error, MAX_RELATIVE_ERROR
        advice = "the graph computes something else; this is a bug of ldm-export, please report it"
    else:
        measured, value, bound = "relative L2 error", record.relative_l2, MAX_RELATIVE_L2
        advice = "these weights lose too much in fp16"
    if value <= bound:  # NaN is above every bound
        return
    kind = PrecisionError if record.variant == "fp16" else ExportError
    raise kind(
        f"the {record.variant} graph of {name} differs from torch: {measured} {value:.2e} at "
        f"batch {record.batch}, latents {record.height}x{record.width}, context of "
        f"{record.context_tokens} tokens, more than {bound:.0e}; {advice}"
    )


def _check_range(name: str, path: Path, samples: Sequence[Sample]) -> None:
    with watched_graph(path) as watched:
        engine = _LeanSession(watched)
        for sample in samples:
            value, size = largest_value(engine.run(sample.inputs))
            if size > FP16_MAX:
                raise PrecisionError(
                    f"the fp16 graph of {name} overflows: {value} reaches {size:.3g}, and half "
                    f"precision ends at {FP16_MAX:.0f}"
                )


class _LeanSession:
    """ONNX Runtime with as little memory as possible: weights stay in their mapped file.

    Without optimisation no constant is folded, so that a weight is widened where it is used and
    the result freed at once, instead of all of them being widened when the graph is loaded.
    """

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_prepacking", "1")
        self._path = path
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its classes are not exported
            raise ExportError(f"ONNX Runtime cannot load {path}: {error}") from error

    def run(self, inputs: Tensors) -> Tensors:
        names = [output.name for output in self._session.get_outputs()]
        try:
            outputs = self._session.run(names, dict(inputs))
        except Exception as error:  # its classes are not exported
            raise ExportError(f"ONNX Runtime cannot run {self._path}: {error}") from error
        return dict(zip(names, outputs, strict=True))
