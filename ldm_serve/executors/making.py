"""The executor that settings ask for, of which no other is imported."""

from collections.abc import Mapping
from pathlib import Path

from ldm_serve.executors.contract import Executor
from ldm_serve.settings import EngineSettings, WorkerSettings


def make_executor(
    bundles: Mapping[str, Path],
    engine: EngineSettings,
    workers: WorkerSettings,
    *,
    reports_steps: bool,
) -> Executor:
    """Return the executor that settings ask for, which is yet to be started.

    Args:
        bundles: Folder of every model; each worker opens the first at its start.
        engine: How they are opened.
        workers: Where, and by how many workers.
        reports_steps: Whether the caller wants the steps of jobs; on a cluster each is a message.

    Raises:
        RequestError: The address is not that of a Ray cluster, or there is no token for it.
        ClusterError: No Ray cluster answers there.
    """
    match workers.executor:
        case "inline":
            from ldm_serve.executors.inline import InlineExecutor

            return InlineExecutor(bundles, engine)
        case "process":
            from ldm_serve.executors.process import ProcessExecutor

            return ProcessExecutor(
                bundles,
                engine,
                workers=workers.count,
                stall_seconds=workers.stall_seconds,
                logs=workers.logs,
            )
        case "ray":
            from ldm_serve.executors.ray import RayExecutor

            assert workers.address is not None, "its flags are checked"
            return RayExecutor(
                bundles,
                engine,
                address=workers.address,
                workers=workers.count,
                gpus=workers.gpus,
                stall_seconds=workers.stall_seconds,
                reports_steps=reports_steps,
                logs=workers.logs,
            )
