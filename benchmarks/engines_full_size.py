"""Measure the build of a bundle's TensorRT-RTX engines: seconds and memory, one process each.

    python benchmarks/engines_full_size.py --bundle engines/
    python benchmarks/engines_full_size.py            # makes one of Stable Diffusion 1.5's size
    python benchmarks/engines_full_size.py --tiny     # the same layers, narrow

Prints a table and appends one line of JSON to `results/engines_full_size.jsonl` (not for `--tiny`).
Plans go to a temporary folder and are removed; the bundle stays as it is. Needs no GPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measuring.rows import ROOT, append_line, as_line, commit, machine
from measuring.watched_export import ask, run_apart

RESULTS = Path(__file__).parent / "results/engines_full_size.jsonl"
#: Promises of the README: all engines one after the other, and the largest process.
MAX_SECONDS, MAX_BYTES = 90.0, 8_000_000_000


@dataclass(frozen=True, kw_only=True)
class Build:
    """One engine.

    Attributes:
        component: The network.
        targets: Compute capabilities.
        seconds: From start to end of the process, imports included.
        build_seconds: Of that, the build itself.
        peak_bytes: Highest resident memory of the process.
        plan_bytes: Size of the plan.
    """

    component: str
    targets: tuple[str, ...]
    seconds: float
    build_seconds: float
    peak_bytes: int
    plan_bytes: int


def options(arguments: argparse.Namespace) -> Any:  # noqa: ANN401  (ours, but imported late)
    """Return which engines to build."""
    from ldm_runtime.engines.build_specs import EngineOptions
    from ldm_runtime.engines.profiles import SizeRange

    return EngineOptions(
        builder="tensorrt_rtx",
        sizes=SizeRange(static=arguments.static),
        targets=tuple(arguments.target.split(",")) if arguments.target else (),
    )


def build_one(arguments: argparse.Namespace) -> None:
    """Build engine number `--one` and write its plan below `--out`: the measured process."""
    from ldm_runtime.bundle.manifest import load_manifest
    from ldm_runtime.engines.build_specs import choose_toolchain
    from ldm_runtime.engines.store import write_engine

    wanted = options(arguments)
    toolchain = choose_toolchain(wanted)
    assert not isinstance(toolchain, str)  # only "auto" and "none" answer with a sentence
    build_spec = build_specs(arguments)[arguments.one]
    component = load_manifest(arguments.bundle).component(build_spec.component)
    (graph,) = (each.file for each in component.graphs if each.variant == "fp16")
    record = write_engine(arguments.bundle / graph, build_spec, toolchain, arguments.out)
    print(json.dumps({"build_seconds": record.seconds, "plan_bytes": record.size_bytes}))


def build_specs(arguments: argparse.Namespace) -> list[Any]:
    """Return the specification of each engine that can be built."""
    from ldm_runtime.bundle.manifest import load_manifest
    from ldm_runtime.engines.build_specs import choose_toolchain, make_build_specs
    from ldm_runtime.engines.store import component_files

    manifest = load_manifest(arguments.bundle)
    wanted = options(arguments)
    toolchain = choose_toolchain(wanted)
    assert not isinstance(toolchain, str)  # as above
    files = component_files(manifest.components, manifest.files)
    return list(make_build_specs(toolchain, wanted.sizes, manifest.spec, files))


def measure(arguments: argparse.Namespace, number: int, build_spec: Any) -> Build:  # noqa: ANN401
    """Build one engine in its own process and watch it.

    Raises:
        RuntimeError: It failed; the sentence it ended with.
    """
    with tempfile.TemporaryDirectory(prefix="ldm-engine-", dir=arguments.folder) as out:
        words = ["--bundle", str(arguments.bundle), "--one", str(number), "--out", out]
        words += ["--target", arguments.target, *(["--static"] if arguments.static else [])]
        answer = ask(Path(__file__), *words)
    return Build(
        component=build_spec.component,
        targets=build_spec.targets,
        seconds=answer.seconds,
        build_seconds=answer.value["build_seconds"],
        peak_bytes=answer.peak_bytes,
        plan_bytes=answer.value["plan_bytes"],
    )


def as_record(builds: Sequence[Build], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row to keep."""
    return {
        "name": "engines_full_size",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": machine(),
        "settings": dict(settings),
        "builds": [asdict(build) for build in builds],
        "seconds": [sum(build.seconds for build in builds)],
        "peak_bytes": max(build.peak_bytes for build in builds),
    }


def table(record: Mapping[str, Any]) -> list[str]:
    """Return a record as lines for a person."""
    (total,) = record["seconds"]
    lines = [f"machine            {record['device']}"]
    lines += [f"{name:<19}{value}" for name, value in record["settings"].items()]
    for build in record["builds"]:
        lines.append(
            f"  {build['component']:<14} {build['seconds']:7.1f} s "
            f"(build {build['build_seconds']:.1f} s), peak {build['peak_bytes'] / 1e9:.2f} GB, "
            f"plan {build['plan_bytes'] / 1e6:,.0f} MB"
        )
    kept = {True: "kept", False: "MISSED"}
    peak = record["peak_bytes"]
    return [
        *lines,
        f"  {'all':<14} {total:7.1f} s (promised: {MAX_SECONDS:.0f} s, "
        f"{kept[total <= MAX_SECONDS]}), peak {peak / 1e9:.2f} GB "
        f"(promised: {MAX_BYTES / 1e9:.0f} GB, {kept[peak <= MAX_BYTES]})",
    ]


def make_bundle(folder: Path, *, is_tiny: bool) -> Path:
    """Export a random checkpoint of Stable Diffusion 1.5's size; needs 6 GB of disk.

    Raises:
        RuntimeError: The export failed; its reason went to stderr.
    """
    import export_full_size as full_size

    model = full_size.stable_diffusion_1()
    model = full_size.tiny(model) if is_tiny else model
    checkpoint, out = folder / "random.ckpt", folder / "engines"
    print(f"exporting a random checkpoint to {folder}", file=sys.stderr, flush=True)
    run_apart(full_size.write_checkpoint, "writing the checkpoint", checkpoint, model)
    command = [sys.executable, "-m", "ldm_export.cli", "--engines", "none"]
    done = subprocess.run([*command, "--ckpt", str(checkpoint), "--out", str(out)], cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"the export ended with {done.returncode}")
    checkpoint.unlink()
    return out


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="a bundle (default: a random full-size one)")
    parser.add_argument("--tiny", action="store_true", help="without --bundle: narrow layers")
    parser.add_argument("--static", action="store_true", help="one shape")
    parser.add_argument("--target", default="", help="such as sm86,sm89 (default: all from sm80)")
    parser.add_argument("--folder", type=Path, help="where to put files (default: temporary)")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 on success, 1 if a build failed."""
    from ldm_runtime.errors import LdmError

    arguments = build_parser().parse_args(argv)
    try:
        if arguments.one is not None:
            build_one(arguments)
            return 0
        record = _run(arguments)
    except (LdmError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(table(record)))
    print(as_line(record))
    if not arguments.tiny:
        append_line(RESULTS, record)
    return 0


def measure_bundle(bundle: Path, folder: Path) -> tuple[list[Build], dict[str, str]]:
    """Build every engine of a bundle, for default sizes and targets, each in its own process.

    Args:
        bundle: The bundle to build from; it stays as it is.
        folder: Where plans go until they are removed.

    Returns:
        The builds, and the reasons for the components without one.

    Raises:
        LdmError: There is nothing to build with, or the sizes are impossible.
    """
    arguments = build_parser().parse_args(["--bundle", str(bundle), "--folder", str(folder)])
    builds, reasons = [], {}
    for number, build_spec in enumerate(build_specs(arguments)):
        try:
            builds.append(measure(arguments, number, build_spec))
        except RuntimeError as error:
            reasons[build_spec.component] = str(error)
    return builds, reasons


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        model = "custom" if arguments.bundle else "stable-diffusion-1.5"
        if arguments.bundle is None:
            folder = tempfile.TemporaryDirectory(prefix="ldm-engines-", dir=arguments.folder)
            path = Path(stack.enter_context(folder))
            arguments.bundle = make_bundle(path, is_tiny=arguments.tiny)
        wanted = build_specs(arguments)
        weights = [arguments.bundle / each.component / "weights.bin" for each in wanted]
        weights_bytes = sum(path.stat().st_size for path in weights)
        builds = []
        for number, build_spec in enumerate(wanted):
            print(f"building the {build_spec.component} …", file=sys.stderr, flush=True)
            builds.append(measure(arguments, number, build_spec))
    settings = {
        "model": "tiny" if arguments.tiny else model,
        "builder": f"{wanted[0].builder} {wanted[0].builder_version}",
        "weights_bytes": weights_bytes,
        "static": arguments.static,
        "latents": {end: getattr(wanted[-1].profiles[0], end) for end in ("min", "opt", "max")},
    }
    return as_record(builds, settings)


if __name__ == "__main__":
    sys.exit(main())
