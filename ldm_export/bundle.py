"""Runs the steps of an export: one checkpoint in, one bundle out, or nothing."""

import time
from collections.abc import Callable, Sequence

from ldm_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ldm_export.engine_stages import engine_stages, planned_engines
from ldm_export.errors import CheckpointError
from ldm_export.memory import give_back_memory
from ldm_export.networks.loading import check_weights
from ldm_export.plan import Plan, make_plan
from ldm_export.source import ExportOptions, Source, open_source, versions
from ldm_export.stages import make_stages
from ldm_export.workspace import Stage, StageRecord, Workspace
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import SCHEMA_VERSION, BuildRecord, Manifest
from ldm_runtime.engines.records import ENGINES_FOLDER
from ldm_runtime.progress import Progress, Silent
from ldm_runtime.specs.model import components_of

__all__ = ["ExportOptions", "export_bundle", "plan_export"]


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
        stages = make_stages(source)
        with workspace.locked():
            records = _run_stages(source, stages.stages, workspace, progress or Silent())
            _check_unchanged(source)
            manifest = Manifest(
                schema_version=SCHEMA_VERSION,
                spec=source.spec,
                weights_dtype=options.weights_dtype,
                components=tuple(each.component for each in records if each.component),
                tokenizer_file=stages.tokenizer_file,
                golden=stages.golden,
                golden_key=stages.golden_key,
                preview=stages.fit.preview,
                engines=_engine_paths(records),
                files=workspace.files,
                build=BuildRecord(
                    checkpoint=options.checkpoint.name,
                    checkpoint_sha256=source.sha256,
                    versions=versions(),
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


def _open_source(options: ExportOptions, checkpoint: Checkpoint, *, hashed: bool = True) -> Source:
    """Open a checkpoint, and complain of all that can be known before anything is built."""
    source = open_source(options, checkpoint, hashed=hashed)
    for component in components_of(source.spec):
        check_weights(component, source.spec, source.weights(component))
    _planned_engines(source)  # of impossible sizes
    return source


def _run_stages(
    source: Source, stages: Sequence[Stage], workspace: Workspace, progress: Progress
) -> list[StageRecord]:
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


def _engine_stages(
    source: Source, records: Sequence[StageRecord], progress: Progress
) -> list[Stage]:
    if source.toolchain is None:
        return []
    sizes = source.options.engines.sizes
    return engine_stages(source.toolchain, sizes, source.spec, records, progress)


def _engine_paths(records: Sequence[StageRecord]) -> tuple[str, ...]:
    paths = (file.path for record in records for file in record.files)
    return tuple(
        path for path in paths if path.startswith(f"{ENGINES_FOLDER}/") and path.endswith(".json")
    )


def _check_unchanged(source: Source) -> None:
    path = source.options.checkpoint
    if sha256_of(path) != source.sha256:  # free, unless somebody wrote to the file
        raise CheckpointError(path, "changed while it was being exported; export it again")


def _plan(source: Source) -> Plan:
    return make_plan(
        source.spec, source.parameters(), source.options.weights_dtype, _planned_engines(source)
    )


def _planned_engines(source: Source) -> dict[str, str]:
    if source.toolchain is None:
        return {}
    return planned_engines(source.toolchain, source.options.engines.sizes, source.spec)
