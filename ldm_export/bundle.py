"""Runs the steps of an export: one checkpoint in, one bundle out, or nothing."""

import hashlib
import importlib.metadata
import logging
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np

from ldm_export.checkpoint import Checkpoint, LazyTensor, open_checkpoint
from ldm_export.compvis_config import read_config
from ldm_export.engine_stages import engine_stages, planned_engines
from ldm_export.errors import CheckpointError, ExportError
from ldm_export.families import Detection, Overrides, detect
from ldm_export.golden import golden_requests, write_golden
from ldm_export.memory import give_back_memory
from ldm_export.networks.loading import load_network
from ldm_export.onnx_export import WEIGHTS_FILE, round_stored, sample_inputs, write_graphs
from ldm_export.parity import Sample, measure
from ldm_export.plan import Plan, make_plan
from ldm_export.precision import FP32_ISLANDS
from ldm_export.preview import PAIRS_FILE, fit_preview, write_pairs
from ldm_export.progress import Progress, Silent
from ldm_export.reference import TorchEngine
from ldm_export.workspace import Stage, StageRecord, Workspace
from ldm_runtime.backends import Tensors
from ldm_runtime.components import COMPONENTS
from ldm_runtime.engine_recipes import EngineOptions, Toolchain, choose_toolchain
from ldm_runtime.engines import ENGINES_FOLDER
from ldm_runtime.manifest import (
    SCHEMA_VERSION,
    BuildRecord,
    ComponentRecord,
    Manifest,
    ModelSpec,
    PreviewRecord,
    WeightsDType,
    sha256_of,
)
from ldm_runtime.request import GenerationRequest

_LOGGER = logging.getLogger(__name__)

VOCABULARY = Path(__file__).parent / "vocabularies/clip_bpe_simple_vocab_16e6.txt.gz"
TOKENIZER_FILE = f"tokenizer/{VOCABULARY.name}"

#: Raised whenever the same checkpoint would give another bundle, so that nothing stale is reused.
_RECIPE = 2
_ENCODER = "vae_encoder"
_SAMPLING_FACTS = ("defaults", "prediction_type")
_PACKAGES = ("ldm-deploy", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, where to, and what the checkpoint does not say.

    Attributes:
        checkpoint: The `.ckpt`, `.pt` or `.safetensors` file.
        out: Folder of the bundle.
        config: CompVis configuration; None takes `<checkpoint>.yaml` or `config.yaml` beside the
            checkpoint if there is one.
        overrides: Facts the user states.
        weights_dtype: How weights are stored.
        engines: Which TensorRT engines to build; none by default.
    """

    checkpoint: Path
    out: Path
    config: Path | None = None
    overrides: Overrides = field(default_factory=Overrides)
    weights_dtype: WeightsDType = "float16"
    engines: EngineOptions = field(default_factory=lambda: EngineOptions(builder="none"))

    def __post_init__(self) -> None:
        if self.weights_dtype not in get_args(WeightsDType):
            raise ExportError(
                f"weights_dtype is {self.weights_dtype!r}; use "
                f"{' or '.join(map(repr, get_args(WeightsDType)))}"
            )


@dataclass(frozen=True, kw_only=True)
class _Source:
    """An opened checkpoint and what is known of it."""

    options: ExportOptions
    checkpoint: Checkpoint
    detection: Detection
    sha256: str
    toolchain: Toolchain | None

    @property
    def spec(self) -> ModelSpec:
        return self.detection.spec

    def weights(self, component: str) -> Mapping[str, LazyTensor]:
        names = self.detection.weights[component]
        return {name: self.checkpoint.tensors[stored] for name, stored in names.items()}

    def parameters(self, component: str) -> int:
        return sum(int(np.prod(each.shape)) for each in self.weights(component).values())

    def key(self, stage: str) -> str:
        """Return the hash of everything a stage is made from.

        Networks do not depend on how they are sampled: another default size does not rebuild them.
        """
        spec = msgspec.to_builtins(self.spec)
        for name in ("assumptions", *(_SAMPLING_FACTS if stage in COMPONENTS else ())):
            del spec[name]
        requests = [asdict(each) for each in _requests(self)] if stage == "golden" else []
        facts = [_RECIPE, stage, self.sha256, spec, self.options.weights_dtype, _versions()]
        facts += requests
        return hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest()


class _Fit:
    """The preview's map, which a stage without files fits anew to what the encoder left."""

    def __init__(self) -> None:
        self.preview: PreviewRecord | None = None

    def build(self, folder: Path) -> None:
        self.preview = fit_preview(folder / _ENCODER / PAIRS_FILE)


def export_bundle(
    options: ExportOptions,
    *,
    progress: Progress | None = None,
    on_write: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Export a checkpoint to a bundle at `options.out`.

    A bundle that is there is replaced in one step, and what of it is still true is reused. An
    interrupted export leaves the old bundle, and what it had finished for the next one.

    Args:
        options: What to export.
        progress: Told when stages begin and end.
        on_write: Called with a label before every change on disk; tests interrupt here.

    Raises:
        CheckpointError: The file cannot be read.
        UnknownModelError: It is of no known family.
        WeightsError: Weights are missing or left over.
        ExportError: A graph is wrong, or the bundle cannot go where it should.
        EngineBuildError: An engine cannot be built as it was asked for.
    """
    started = time.monotonic()
    workspace = Workspace(options.out, on_write)
    with open_checkpoint(options.checkpoint) as checkpoint:
        source = _open_source(options, checkpoint)
        with workspace.locked():
            fit = _Fit()
            records = _run_stages(source, fit, workspace, progress or Silent())
            _check_unchanged(source)
            manifest = Manifest(
                schema_version=SCHEMA_VERSION,
                spec=source.spec,
                weights_dtype=options.weights_dtype,
                components=tuple(each.component for each in records if each.component),
                tokenizer_file=TOKENIZER_FILE,
                golden=_golden_folders(source),
                golden_key=source.key("golden"),
                preview=fit.preview,
                engines=_engine_paths(records),
                files=workspace.files,
                build=BuildRecord(
                    checkpoint=options.checkpoint.name,
                    checkpoint_sha256=source.sha256,
                    versions=_versions(),
                    seconds=round(time.monotonic() - started, 1),
                ),
            )
            workspace.publish(manifest)
    return manifest


def plan_export(options: ExportOptions) -> Plan:
    """Say what `export_bundle` would do, and write nothing.

    Raises:
        CheckpointError: The file cannot be read.
        UnknownModelError: It is of no known family.
        WeightsError: Weights are missing or left over.
        ExportError: The bundle cannot go where it should.
    """
    Workspace(options.out)  # checks the destination
    with open_checkpoint(options.checkpoint) as checkpoint:
        return _plan(_open_source(options, checkpoint, hashed=False))


def _run_stages(
    source: _Source, fit: _Fit, workspace: Workspace, progress: Progress
) -> list[StageRecord]:
    stages = _stages(source, fit)
    found = [record for stage in stages if (record := workspace.find(stage))]
    known = [*stages, *_engine_stages(source, found, progress)]
    seconds = dict(_plan(source).stage_seconds)
    seconds |= {stage.name: 0.0 for stage in known if workspace.can_reuse(stage)}
    progress.plan(seconds)
    records = [_run_stage(stage, workspace, progress) for stage in stages]
    engines = _engine_stages(source, records, progress)
    return records + [_run_stage(stage, workspace, progress) for stage in engines]


def _run_stage(stage: Stage, workspace: Workspace, progress: Progress) -> StageRecord:
    progress.begin(stage.name)
    record, outcome = workspace.run(stage)
    give_back_memory()
    progress.end(stage.name, outcome)
    return record


def _engine_stages(source: _Source, records: list[StageRecord], progress: Progress) -> list[Stage]:
    if source.toolchain is None:
        return []
    sizes = source.options.engines.sizes
    return engine_stages(source.toolchain, sizes, source.spec, records, progress)


def _engine_paths(records: list[StageRecord]) -> tuple[str, ...]:
    paths = (file.path for record in records for file in record.files)
    return tuple(
        path for path in paths if path.startswith(f"{ENGINES_FOLDER}/") and path.endswith(".json")
    )


def _check_unchanged(source: _Source) -> None:
    path = source.options.checkpoint
    if sha256_of(path) != source.sha256:  # free, unless somebody wrote to the file
        raise CheckpointError(path, "changed while it was being exported; export it again")


def _plan(source: _Source) -> Plan:
    return make_plan(
        source.spec,
        {name: source.parameters(name) for name in COMPONENTS},
        source.options.weights_dtype,
        _planned_engines(source),
    )


def _planned_engines(source: _Source) -> dict[str, str]:
    if source.toolchain is None:
        return {}
    return planned_engines(source.toolchain, source.options.engines.sizes, source.spec)


def _open_source(options: ExportOptions, checkpoint: Checkpoint, *, hashed: bool = True) -> _Source:
    path = options.config or _config_beside(options.checkpoint)
    if path and not options.config:
        _LOGGER.info("reading %s, which lies beside the checkpoint", path)
    config = read_config(path) if path else None
    toolchain = choose_toolchain(options.engines)
    if isinstance(toolchain, str) and options.engines.builder == "auto":
        _LOGGER.warning("%s", toolchain)
    source = _Source(
        options=options,
        checkpoint=checkpoint,
        detection=detect(checkpoint.tensors, config=config, overrides=options.overrides),
        sha256=sha256_of(options.checkpoint) if hashed else "",
        toolchain=None if isinstance(toolchain, str) else toolchain,
    )
    _planned_engines(source)  # complains of impossible sizes before anything is built
    return source


def _config_beside(checkpoint: Path) -> Path | None:
    candidates = (checkpoint.with_suffix(".yaml"), checkpoint.with_name("config.yaml"))
    return next((path for path in candidates if path.is_file()), None)


def _requests(source: _Source) -> tuple[GenerationRequest, ...]:
    return golden_requests(source.spec, source.parameters("unet"))


def _golden_folders(source: _Source) -> tuple[str, ...]:
    return tuple(f"golden/{index}" for index in range(len(_requests(source))))


def _stages(source: _Source, fit: _Fit) -> list[Stage]:
    tokenizer = Stage(
        name="tokenizer",
        key=source.key("tokenizer"),
        paths=(TOKENIZER_FILE,),
        build=_copy_tokenizer,
    )
    components = [
        Stage(
            name=name,
            key=source.key(name),
            paths=(name, f"golden/components/{name}.npz"),
            build=partial(_build_component, source, name),
        )
        for name in COMPONENTS
    ]
    preview = Stage(name="preview", key=source.key("preview"), paths=(), build=fit.build)
    golden = Stage(
        name="golden",
        key=source.key("golden"),
        paths=_golden_folders(source),
        build=partial(_build_golden, source),
    )
    return [tokenizer, *components, preview, golden]


def _copy_tokenizer(folder: Path) -> None:
    target = folder / TOKENIZER_FILE
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(VOCABULARY, target)


def _build_golden(source: _Source, folder: Path) -> None:
    write_golden(
        folder,
        _requests(source),
        source.spec,
        VOCABULARY,
        lambda name: TorchEngine(name, load_network(name, source.spec, source.weights(name))),
    )


def _build_component(source: _Source, name: str, folder: Path) -> ComponentRecord:
    place = folder / name
    place.mkdir()
    network = load_network(name, source.spec, source.weights(name))
    engine = TorchEngine(name, network)
    inputs = sample_inputs(name, source.spec)
    expected = [engine.run(arrays) for _, arrays in inputs]
    _write_golden_component(folder / f"golden/components/{name}.npz", inputs[0][1], expected[0])
    if name == _ENCODER:
        write_pairs(place / PAIRS_FILE, engine, source.spec)
    changed = round_stored(network, source.options.weights_dtype)
    stored = [engine.run(arrays) for _, arrays in inputs] if changed else expected
    graphs = write_graphs(name, network, source.spec, place, source.options.weights_dtype)
    del network, engine
    give_back_memory()  # torch's copy of the weights goes before ONNX Runtime reads its own
    samples = [
        Sample(size=size, inputs=arrays, expected=wanted, stored=rounded)
        for (size, arrays), wanted, rounded in zip(inputs, expected, stored, strict=True)
    ]
    parity = [record for graph in graphs for record in measure(name, graph, place, samples)]
    component = COMPONENTS[name]
    return ComponentRecord(
        name=name,
        inputs=component.inputs,
        outputs=component.outputs,
        graphs=graphs,
        weights_file=f"{name}/{WEIGHTS_FILE}",
        fp32_islands=FP32_ISLANDS,
        parity=tuple(parity),
        key=source.key(name),
    )


def _write_golden_component(path: Path, inputs: Tensors, outputs: Tensors) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"in.{name}": array for name, array in inputs.items()}
    arrays |= {f"out.{name}": array for name, array in outputs.items()}
    np.savez(path, allow_pickle=False, **arrays)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
