"""TensorRT engines as steps of an export, built from the graphs that earlier steps wrote."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from ldm_export.workspace import ExportStep, StepRecord
from ldm_runtime.bundle.manifest import ComponentRecord
from ldm_runtime.engines.build_specs import ComponentFiles, Toolchain, make_build_specs
from ldm_runtime.engines.profiles import SizeRange
from ldm_runtime.engines.records import EngineBuildSpec, engine_key
from ldm_runtime.engines.store import component_files, engine_step, write_engine
from ldm_runtime.progress import Progress
from ldm_runtime.specs.model import ModelSpec, components_of


def engine_steps(
    toolchain: Toolchain,
    sizes: SizeRange,
    spec: ModelSpec,
    records: Iterable[StepRecord],
    progress: Progress,
) -> list[ExportStep]:
    """Return one step per engine that can be built from finished steps.

    Args:
        toolchain: Builder and targets.
        sizes: Image sizes that the engines should serve.
        spec: The model.
        records: Finished steps; engines are built from those of components.
        progress: Told how far the builder has come.

    Raises:
        EngineBuildError: The sizes are not possible for this model.
    """
    records = [record for record in records if record.component]
    components = [record.component for record in records if record.component]
    files = component_files(components, (file for record in records for file in record.files))
    graphs = _graphs(components)
    return [
        ExportStep(
            name=engine_step(build_spec),
            key=engine_key(build_spec),
            paths=(build_spec.engine_path, build_spec.record_path),
            build=partial(_build, build_spec, toolchain, graphs[build_spec.component], progress),
        )
        for build_spec in make_build_specs(toolchain, sizes, spec, files)
    ]


def expected_engines(toolchain: Toolchain, sizes: SizeRange, spec: ModelSpec) -> dict[str, str]:
    """Return the component of every engine step to come, by step name.

    Raises:
        EngineBuildError: The sizes are not possible for this model.
    """
    unknown = ComponentFiles(graph_sha256="", weights_sha256="")
    build_specs = make_build_specs(
        toolchain, sizes, spec, dict.fromkeys(components_of(spec), unknown)
    )
    return {engine_step(build_spec): build_spec.component for build_spec in build_specs}


def _graphs(components: Iterable[ComponentRecord]) -> Mapping[str, str]:
    return {
        component.name: graph.file
        for component in components
        for graph in component.graphs
        if graph.variant == "fp16"
    }


def _build(
    build_spec: EngineBuildSpec, toolchain: Toolchain, graph: str, progress: Progress, folder: Path
) -> None:
    place = folder / build_spec.folder
    place.mkdir(parents=True, exist_ok=True)
    write_engine(folder / graph, build_spec, toolchain, place, on_progress=progress.advance)
