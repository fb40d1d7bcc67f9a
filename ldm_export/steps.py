"""The steps of an export: the files that each writes, and their sources."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from torch import nn

from ldm_export.errors import PrecisionError
from ldm_export.golden.outputs import golden_folders, write_golden
from ldm_export.golden.prediction import measure_prediction
from ldm_export.golden.preview import PAIRS_FILE, fit_preview, write_pairs
from ldm_export.golden.requests import golden_requests
from ldm_export.graphs.measured import measured_graphs, whole_in_fp32
from ldm_export.graphs.onnx_export import (
    VARIANTS,
    WEIGHTS_FILE,
    round_stored,
    sample_inputs,
    write_graphs,
)
from ldm_export.graphs.parity import Sample, check_rounding
from ldm_export.graphs.torch_engine import TorchEngine
from ldm_export.memory import give_back_memory
from ldm_export.networks.loading import load_network, restore_weights
from ldm_export.source import Source
from ldm_export.workspace import ExportStep
from ldm_runtime.backends.contract import Tensors
from ldm_runtime.bundle.manifest import (
    ComponentRecord,
    GraphVariant,
    PredictionRecord,
    PreviewRecord,
    WeightsDType,
)
from ldm_runtime.diagnostics.dependence import warn_of_ignored_inputs
from ldm_runtime.diagnostics.golden_requests import SHEET_FILE
from ldm_runtime.requests.request_json import request_to_json
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.specs.model import ModelSpec, components_of
from ldm_runtime.specs.networks import TextEncoderSpec
from ldm_runtime.specs.tasks import takes_prompts

_VOCABULARIES = Path(__file__).parent / "vocabularies"
#: The vocabulary of each kind of text encoder.
_VOCABULARY_FILES: Mapping[str, str] = MappingProxyType(
    {
        "clip": "clip_bpe_simple_vocab_16e6.txt.gz",
        "openclip": "clip_bpe_simple_vocab_16e6.txt.gz",
        "bert": "bert_base_uncased_vocab.txt",
    }
)
_ENCODER = "vae_encoder"

_LOGGER = logging.getLogger(__name__)


class Fit:
    """The preview's map, which a step without files fits again to the encoder's pairs."""

    def __init__(self) -> None:
        self.preview: PreviewRecord | None = None

    def build(self, folder: Path) -> None:
        """Fit it to the encoder's pairs in a bundle."""
        self.preview = fit_preview(folder / _ENCODER / PAIRS_FILE)


@dataclass(frozen=True, kw_only=True)
class ExportSteps:
    """The steps of an export before engines, and what the manifest records of them.

    Attributes:
        steps: The steps in order.
        tokenizer_file: Path of the vocabulary inside the bundle, or None without prompts.
        golden: Folders of the golden outputs.
        golden_key: Key of the step that generates them.
        fit: The preview, once its step is done.
    """

    steps: tuple[ExportStep, ...]
    tokenizer_file: str | None
    golden: tuple[str, ...]
    golden_key: str
    fit: Fit


def make_steps(source: Source) -> ExportSteps:
    """Return the steps that turn a checkpoint into a bundle."""
    requests = golden_requests(source.spec, source.parameters().get("unet", 0))
    encoded = [request_to_json(request.as_request()) for request in requests]
    vocabulary, fit = vocabulary_of(source.spec), Fit()
    file = None if vocabulary is None else f"tokenizer/{vocabulary.name}"
    steps = [
        ExportStep(
            name=name,
            key=source.key(name),
            paths=(name, f"golden/components/{name}.npz"),
            build=partial(_build_component, source, name),
        )
        for name in components_of(source.spec)
    ]
    if vocabulary is not None and file is not None:
        copy = partial(_copy_vocabulary, vocabulary, file)
        key = source.key("tokenizer")
        steps.insert(0, ExportStep(name="tokenizer", key=key, paths=(file,), build=copy))
    preview = ExportStep(name="preview", key=source.key("preview"), paths=(), build=fit.build)
    golden = ExportStep(
        name="golden",
        key=source.key("golden", *encoded),
        paths=(*golden_folders(requests), SHEET_FILE),
        build=partial(_build_golden, source, requests),
    )
    return ExportSteps(
        steps=(*steps, preview, golden),
        tokenizer_file=file,
        golden=golden_folders(requests),
        golden_key=golden.key,
        fit=fit,
    )


def vocabulary_of(spec: ModelSpec) -> Path | None:
    """Return the vocabulary of a model's prompts, or None if it takes none."""
    encoder = spec.find(TextEncoderSpec)
    if not takes_prompts(spec) or encoder is None:
        return None
    return _VOCABULARIES / _VOCABULARY_FILES[encoder.kind]


def measured_prediction(source: Source, key: str) -> PredictionRecord | None:
    """Measure what a checkpoint's UNet predicts; see `golden.prediction`."""
    open_reference = partial(_open_reference, source)
    return measure_prediction(source.spec, vocabulary_of(source.spec), open_reference, key)


def _copy_vocabulary(vocabulary: Path, file: str, folder: Path) -> None:
    target = folder / file
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(vocabulary, target)


def _build_golden(source: Source, requests: tuple[ResolvedRequest, ...], folder: Path) -> None:
    write_golden(
        folder,
        requests,
        source.spec,
        vocabulary_of(source.spec),
        partial(_open_reference, source),
    )


def _open_reference(source: Source, name: str) -> TorchEngine:
    return TorchEngine(name, load_network(name, source.spec, source.weights(name)))


def _build_component(source: Source, name: str, folder: Path) -> ComponentRecord:
    place = folder / name
    place.mkdir()
    network = load_network(name, source.spec, source.weights(name))
    engine = TorchEngine(name, network)
    inputs = sample_inputs(name, source.spec)
    expected = [engine.run(arrays) for _, arrays in inputs]
    warn_of_ignored_inputs(name, engine, inputs[0][1], expected[0], source.spec)
    _write_golden_component(folder / f"golden/components/{name}.npz", inputs[0][1], expected[0])
    if name == _ENCODER:
        write_pairs(place / PAIRS_FILE, engine, source.spec)
    arrays_only = [arrays for _, arrays in inputs]
    dtype, stored = _as_stored(name, source, network, arrays_only, expected)
    graphs = write_graphs(name, network, source.spec, place, dtype, _variants(source, name))
    del network, engine
    give_back_memory()  # torch's copy of the weights goes before ONNX Runtime reads its own
    samples = [
        Sample(size=size, inputs=arrays, expected=wanted, stored=rounded)
        for (size, arrays), wanted, rounded in zip(inputs, expected, stored, strict=True)
    ]
    measured = measured_graphs(name, graphs, place, samples)
    if source.options.fp16 and len(measured.graphs) == 1:
        measured = whole_in_fp32(measured)
    component = components_of(source.spec)[name]
    return ComponentRecord(
        name=name,
        inputs=component.inputs,
        outputs=component.outputs,
        graphs=measured.graphs,
        weights_file=f"{name}/{WEIGHTS_FILE}",
        fp32_islands=measured.fp32_islands,
        parity=measured.parity,
        key=source.key(name),
    )


def _variants(source: Source, name: str) -> tuple[GraphVariant, ...]:
    """Return the graphs to write of a component, with a warning where it should have one more."""
    if not source.options.fp16:
        return VARIANTS[:1]
    if name not in source.detection.fp32_components:
        return VARIANTS
    _LOGGER.warning(
        "the %s of released models of %s overflows half precision on some images, so that all of "
        "it stays in fp32 on GPUs too, which is slower there; for an autoencoder that does not, as "
        "sdxl-vae-fp16-fix, give --vae with its folder, whose config.json has force_upcast: false",
        name,
        source.spec.family,
    )
    return VARIANTS[:1]


def _as_stored(
    name: str,
    source: Source,
    network: nn.Module,
    inputs: Sequence[Tensors],
    expected: Sequence[Tensors],
) -> tuple[WeightsDType, Sequence[Tensors]]:
    """Make a network what the bundle stores; return the type of its weights, and its outputs.

    Its weights are rounded in place; where fp16 cannot hold them, all of them are fp32 again.

    Args:
        name: The component.
        source: The checkpoint.
        network: The component with the checkpoint's own weights.
        inputs: Sets of inputs …
        expected: … and the network's outputs for them.
    """
    dtype = source.options.weights_dtype
    try:
        changed = round_stored(network, dtype)
        outputs = expected
        if changed:
            engine = TorchEngine(name, network)
            outputs = [engine.run(arrays) for arrays in inputs]
            check_rounding(name, expected, outputs)
    except PrecisionError as error:
        _LOGGER.warning("%s; the weights of the %s are stored in fp32", error, name)
        restore_weights(name, network, source.weights(name))
        return "float32", expected
    return dtype, outputs


def _write_golden_component(path: Path, inputs: Tensors, outputs: Tensors) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"in.{name}": array for name, array in inputs.items()}
    arrays |= {f"out.{name}": array for name, array in outputs.items()}
    np.savez(path, allow_pickle=False, **arrays)
