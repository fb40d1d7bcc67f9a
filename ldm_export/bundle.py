"""The steps of an export in order: one checkpoint in, one bundle out, or nothing."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from ldm_export.checkpoint.checkpoint import Checkpoint
from ldm_export.detection.ignored_tensors import check_not_needed
from ldm_export.disk_space import full_disk_named
from ldm_export.engine_steps import engine_steps, expected_engines
from ldm_export.errors import CheckpointError, ExportError
from ldm_export.estimate import Estimate, make_estimate
from ldm_export.golden.prediction import confirmed, warn_of_hint, warn_of_siblings
from ldm_export.memory import give_back_memory
from ldm_export.networks.loading import check_weights, parameter_names
from ldm_export.replacement import check_replacement, origin_of
from ldm_export.source import (
    ExportOptions,
    Source,
    build_record,
    checkpoint_sha256,
    open_checkpoint_of,
    open_source,
)
from ldm_export.steps import make_steps, measured_prediction
from ldm_export.workspace import ExportStep, StepRecord, Workspace
from ldm_runtime.bundle.manifest import (
    SCHEMA_VERSION,
    Manifest,
    PredictionRecord,
    load_manifest,
)
from ldm_runtime.engines.records import ENGINES_FOLDER
from ldm_runtime.errors import LdmError, ManifestError
from ldm_runtime.progress import Progress, Silent
from ldm_runtime.quantization.quantize import QuantizationOptions, quantize_bundle
from ldm_runtime.specs.model import components_of

_LOGGER = logging.getLogger(__name__)

__all__ = ["ExportOptions", "estimate_export", "export_bundle"]


def export_bundle(
    options: ExportOptions,
    *,
    progress: Progress | None = None,
    on_write: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Export a checkpoint to a bundle at `options.out`.

    An existing bundle of the same checkpoint (or of another, if `options.replace`) is replaced in
    one step, and what of it is still valid is reused. An
    interrupted export leaves the old bundle, and its finished steps for the next export.

    Args:
        options: Options of the export.
        progress: Told when steps begin and end.
        on_write: Called with a label before every change on disk; tests interrupt here.

    Raises:
        CheckpointError: The file cannot be read.
        UnknownModelError: It does not belong to a known family.
        WeightsError: Weights are missing, or tensors belong to no component.
        ExportError: A graph is wrong, the bundle cannot go where it should, or the UNet predicts
            something else than it is said to.
        EngineBuildError: An engine cannot be built as it was asked for.
    """
    started = time.monotonic()
    workspace = Workspace(options.out, on_write)
    with open_checkpoint_of(options) as checkpoint:
        opened, listener = _open_source(options, checkpoint), progress or Silent()
        if not options.replace:
            check_replacement(options.out, options.checkpoint.name, opened.sha256)
        prediction = _prediction(opened, listener)
        source = with_known_prediction(opened, prediction)
        steps = make_steps(source)
        with workspace.locked(), full_disk_named(options.out, _estimate(source).bundle_bytes):
            records = _run_steps(source, steps.steps, workspace, listener)
            _check_unchanged(source)
            manifest = Manifest(
                schema_version=SCHEMA_VERSION,
                spec=source.spec,
                weights_dtype=options.weights_dtype,
                components=tuple(each.component for each in records if each.component),
                tokenizer_file=steps.tokenizer_file,
                golden=steps.golden,
                golden_key=steps.golden_key,
                preview=steps.fit.preview,
                prediction=prediction,
                quantization=None,
                engines=_engine_paths(records),
                files=workspace.files,
                build=build_record(source, time.monotonic() - started),
            )
            drops_int8 = workspace.drops_int8
            workspace.publish(manifest, replace=options.replace)
            if drops_int8 and not options.quantize:
                _LOGGER.warning(
                    "the bundle before had graphs in 8 bits; `ldm quantize %s` makes new ones",
                    options.out,
                )
    return _quantized(options, listener) if options.quantize else manifest


def _quantized(options: ExportOptions, progress: Progress) -> Manifest:
    try:
        return quantize_bundle(options.out, QuantizationOptions(), progress=progress)
    except LdmError as error:
        raise ExportError(f"{options.out} is complete but for graphs in 8 bits: {error}") from error


def estimate_export(options: ExportOptions) -> Estimate:
    """Estimate what `export_bundle` would do and cost but for graphs in 8 bits, and write nothing.

    Where a bundle is already, the checkpoint is read whole, to tell whether it is of this one.

    Raises:
        CheckpointError: The file cannot be read.
        UnknownModelError: It does not belong to a known family.
        WeightsError: Weights are missing, or tensors belong to no component.
        ExportError: The bundle cannot go where it should.
    """
    workspace = Workspace(options.out)  # checks the destination
    origin = origin_of(options.out)
    with open_checkpoint_of(options) as checkpoint:
        source = _open_source(options, checkpoint, hashed=origin is not None)
        estimate = _estimate(source)
        if origin is None:
            return estimate
        if origin.checkpoint_sha256 != source.sha256:
            return estimate.replacing(origin.checkpoint)
        workspace.look()
        return estimate.reusing(_reusable(source, make_steps(source).steps, workspace))


def with_known_prediction(source: Source, record: PredictionRecord | None) -> Source:
    """Return a source whose prediction type the measurement confirms.

    A measurement outweighs every hint, and decides where only the family says what its UNet
    predicts and has models of both kinds; if it is undecided there, a warning says that the model
    may be one of the other kind.

    Raises:
        ExportError: The measurement contradicts a preset, the configuration or the file, or a
            family that has models of one kind.
    """
    siblings = source.detection.siblings
    if record is None or record.measured is None:
        warn_of_siblings(source.spec, siblings)
    elif record.measured != source.spec.prediction_type and (
        source.detection.is_hinted or record.measured in siblings
    ):
        warn_of_hint(source.spec, record)
        return source.measured_as(record.measured)
    return source.with_spec(confirmed(source.spec, record))


def _open_source(options: ExportOptions, checkpoint: Checkpoint, *, hashed: bool = True) -> Source:
    """Open a checkpoint, and check all that can be checked before anything is built."""
    source = open_source(options, checkpoint, hashed=hashed)
    if options.quantize and source.spec.unet is None:
        raise ExportError(
            f"a model of the task {source.spec.task!r} has no UNet to be in 8 bits; leave out "
            "--quantize"
        )
    detection = source.detection
    for component in components_of(source.spec):
        if detection.ignored:
            parameters = parameter_names(component, source.spec)
            weights = detection.weights[component]
            check_not_needed(component, weights, parameters, detection.ignored)
        check_weights(component, source.spec, source.weights(component))
    _expected_engines(source)  # raises for impossible sizes
    return source


def _prediction(source: Source, progress: Progress) -> PredictionRecord | None:
    """Measure what the UNet predicts, or take what was measured for the bundle in its place."""
    if source.spec.unet is None:
        return None
    key, known = source.key("prediction"), None
    with suppress(ManifestError):
        known = load_manifest(source.options.out).prediction
    progress.begin("prediction")
    if known is not None and known.key == key:
        progress.end("prediction", "reused")
        return known
    record = measured_prediction(source, key)
    give_back_memory()
    progress.end("prediction", "built")
    return record


def _run_steps(
    source: Source, steps: Sequence[ExportStep], workspace: Workspace, progress: Progress
) -> list[StepRecord]:
    seconds = dict(_estimate(source).step_seconds)
    seconds.pop("prediction", None)  # measured already
    progress.plan(seconds | dict.fromkeys(_reusable(source, steps, workspace), 0.0))
    records = [_run_step(step, workspace, progress) for step in steps]
    engines = _engine_steps(source, records, progress)
    return records + [_run_step(step, workspace, progress) for step in engines]


def _reusable(source: Source, steps: Sequence[ExportStep], workspace: Workspace) -> list[str]:
    """Return the names of the steps, those of engines included, that are done already."""
    found = [record for step in steps if (record := workspace.find(step))]
    known = [*steps, *_engine_steps(source, found, Silent())]
    return [step.name for step in known if workspace.can_reuse(step)]


def _run_step(step: ExportStep, workspace: Workspace, progress: Progress) -> StepRecord:
    progress.begin(step.name)
    record, outcome = workspace.run(step)
    give_back_memory()
    progress.end(step.name, outcome)
    return record


def _engine_steps(
    source: Source, records: Sequence[StepRecord], progress: Progress
) -> list[ExportStep]:
    if source.toolchain is None:
        return []
    sizes = source.options.engines.sizes
    return engine_steps(source.toolchain, sizes, source.spec, records, progress)


def _engine_paths(records: Sequence[StepRecord]) -> tuple[str, ...]:
    paths = (file.path for record in records for file in record.files)
    return tuple(
        path for path in paths if path.startswith(f"{ENGINES_FOLDER}/") and path.endswith(".json")
    )


def _check_unchanged(source: Source) -> None:
    # The hash of every file is cached, unless it was written to.
    if checkpoint_sha256(source.checkpoint) != source.sha256:
        raise CheckpointError(
            source.options.checkpoint, "changed while it was being exported; export it again"
        )


def _estimate(source: Source) -> Estimate:
    return make_estimate(
        source.spec, source.parameters(), source.options.weights_dtype, _expected_engines(source)
    )


def _expected_engines(source: Source) -> dict[str, str]:
    if source.toolchain is None:
        return {}
    return expected_engines(source.toolchain, source.options.engines.sizes, source.spec)
