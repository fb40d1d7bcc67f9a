"""TensorRT engines as stages of an export, built from the graphs that other stages wrote."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from ldm_export.workspace import Stage, StageRecord
from ldm_runtime.bundle.manifest import ComponentRecord
from ldm_runtime.engines.profiles import SizeRange
from ldm_runtime.engines.recipes import ComponentFiles, Toolchain, make_recipes
from ldm_runtime.engines.records import EngineRecipe, engine_key
from ldm_runtime.engines.store import component_files, engine_stage, write_engine
from ldm_runtime.progress import Progress
from ldm_runtime.specs.model import ModelSpec, components_of


def engine_stages(
    toolchain: Toolchain,
    sizes: SizeRange,
    spec: ModelSpec,
    records: Iterable[StageRecord],
    progress: Progress,
) -> list[Stage]:
    """Return one stage for every engine that can be built from finished stages.

    Args:
        toolchain: What to build with and for.
        sizes: What the engines should serve.
        spec: What the checkpoint is.
        records: Finished stages; those of components are built from.
        progress: Told how far the builder is.

    Raises:
        EngineBuildError: The sizes are not possible for this model.
    """
    records = [record for record in records if record.component]
    components = [record.component for record in records if record.component]
    files = component_files(components, (file for record in records for file in record.files))
    graphs = _graphs(components)
    return [
        Stage(
            name=engine_stage(recipe),
            key=engine_key(recipe),
            paths=(recipe.plan_path, recipe.record_path),
            build=partial(_build, recipe, toolchain, graphs[recipe.component], progress),
        )
        for recipe in make_recipes(toolchain, sizes, spec, files)
    ]


def planned_engines(toolchain: Toolchain, sizes: SizeRange, spec: ModelSpec) -> dict[str, str]:
    """Return the component of every engine stage to come, by stage name.

    Raises:
        EngineBuildError: The sizes are not possible for this model.
    """
    unknown = ComponentFiles(graph_sha256="", weights_sha256="")
    recipes = make_recipes(toolchain, sizes, spec, dict.fromkeys(components_of(spec), unknown))
    return {engine_stage(recipe): recipe.component for recipe in recipes}


def _graphs(components: Iterable[ComponentRecord]) -> Mapping[str, str]:
    return {
        component.name: graph.file
        for component in components
        for graph in component.graphs
        if graph.variant == "fp16"
    }


def _build(
    recipe: EngineRecipe, toolchain: Toolchain, graph: str, progress: Progress, folder: Path
) -> None:
    place = folder / recipe.folder
    place.mkdir(parents=True, exist_ok=True)
    write_engine(folder / graph, recipe, toolchain, place, on_progress=progress.advance)
