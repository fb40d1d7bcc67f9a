"""Build specs of engines: the builder, the target GPUs, the shapes and the source files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ldm_runtime.engines.build import HARDWARE_COMPATIBLE
from ldm_runtime.engines.gpu import Gpu, find_gpu
from ldm_runtime.engines.library import EXTRAS, import_builder, why_not
from ldm_runtime.engines.profiles import (
    SizeRange,
    component_profiles,
    resolve_shapes,
)
from ldm_runtime.engines.records import BuilderName, EngineBuildSpec
from ldm_runtime.errors import EngineBuildError
from ldm_runtime.specs.components import COMPONENTS
from ldm_runtime.specs.model import ModelSpec

BuilderChoice = Literal["auto", "none", "tensorrt", "tensorrt_rtx"]

#: Compute capabilities that TensorRT-RTX builds for.
TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
#: Turing needs separate engines; one engine serves all the others.
_TURING = "sm75"


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of the engines to build.

    Attributes:
        builder: The library; "auto" is TensorRT if it and a GPU are available, else TensorRT-RTX,
            else nothing.
        sizes: Image and batch sizes that they should serve.
        targets: Compute capabilities for TensorRT-RTX; empty is sm75 on a machine with such a GPU,
            all later ones elsewhere.
        hardware_compatible: Whether TensorRT should build for every GPU of the same compute
            capability, and not for this model of GPU.
        refittable: Whether weights can be replaced later.
    """

    builder: BuilderChoice = "auto"
    sizes: SizeRange = field(default_factory=SizeRange)
    targets: tuple[str, ...] = ()
    hardware_compatible: bool = False
    refittable: bool = False


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """Builder, targets and flags of engines, independent of the model.

    Attributes:
        builder: The library.
        version: Its version.
        target_groups: Compute capabilities, one engine per group and component.
        flags: Flags of the builder, by the vendor's names.
        gpu: The GPU that TensorRT times kernels on; None for TensorRT-RTX.
    """

    builder: BuilderName
    version: str
    target_groups: tuple[tuple[str, ...], ...]
    flags: tuple[str, ...]
    gpu: Gpu | None


@dataclass(frozen=True, kw_only=True)
class ComponentFiles:
    """Hashes of the files that an engine is built from."""

    graph_sha256: str
    weights_sha256: str


def choose_toolchain(
    options: EngineOptions,
    *,
    look_for_gpu: Callable[[], Gpu | None] = find_gpu,
    why_not: Callable[[BuilderName], str | None] = why_not,
) -> Toolchain | str:
    """Return the toolchain, or the reason why "auto" or "none" builds nothing.

    Args:
        options: The requested engines.
        look_for_gpu: Finds this machine's GPU.
        why_not: Says why a library cannot be used.

    Raises:
        EngineBuildError: A builder was asked for by name that cannot be used here, or the options
            contradict each other.
    """
    if options.builder == "none":
        return "no TensorRT engines were asked for"
    _check_targets(options.targets)
    if options.targets and options.hardware_compatible:
        raise EngineBuildError(
            "hardware-compatible engines are for TensorRT and targets for TensorRT-RTX; "
            "ask for one of the two"
        )
    gpu = look_for_gpu()
    if options.builder == "auto":
        chosen = _auto(options, gpu, why_not)
        if chosen not in ("tensorrt", "tensorrt_rtx"):
            return chosen
        return _toolchain("tensorrt" if chosen == "tensorrt" else "tensorrt_rtx", options, gpu)
    if reason := why_not(options.builder):
        raise EngineBuildError(reason)
    return _toolchain(options.builder, options, gpu)


def make_build_specs(
    toolchain: Toolchain,
    sizes: SizeRange,
    spec: ModelSpec,
    files: Mapping[str, ComponentFiles],
) -> list[EngineBuildSpec]:
    """Return the build spec of every engine to build.

    Args:
        toolchain: The builder and the targets.
        sizes: Image and batch sizes that the engines should serve.
        spec: The model.
        files: Source files by component; components without them are left out.

    Raises:
        EngineBuildError: The sizes are not possible for this model.
    """
    shapes = resolve_shapes(spec, sizes)
    return [
        EngineBuildSpec(
            component=name,
            builder=toolchain.builder,
            builder_version=toolchain.version,
            graph_sha256=files[name].graph_sha256,
            weights_sha256=files[name].weights_sha256,
            flags=toolchain.flags,
            profiles=component_profiles(name, spec, shapes),
            targets=targets,
            gpu_name=toolchain.gpu.name if toolchain.gpu else None,
        )
        for targets in toolchain.target_groups
        for name in COMPONENTS
        if name in files
    ]


def _auto(
    options: EngineOptions, gpu: Gpu | None, why_not: Callable[[BuilderName], str | None]
) -> str:
    """Return the name of a builder, or why there is none."""
    reasons = []
    if not options.targets:
        if gpu is not None and why_not("tensorrt") is None:
            return "tensorrt"
        reasons.append(
            f"{EXTRAS['tensorrt']} on a machine with an NVIDIA GPU"
            if gpu is None
            else f"{EXTRAS['tensorrt']} for this {gpu.name}"
        )
    if not options.hardware_compatible:
        if gpu is not None and gpu.target not in TARGETS and not options.targets:
            reasons.append(
                f"targets for other GPUs, because TensorRT-RTX does not run on {gpu.target}"
            )
        elif why_not("tensorrt_rtx") is None:
            return "tensorrt_rtx"
        else:
            reasons.append(f"{EXTRAS['tensorrt_rtx']} on any machine")
    return f"no TensorRT engines are built; they need {', or '.join(reasons)}"


def _toolchain(builder: BuilderName, options: EngineOptions, gpu: Gpu | None) -> Toolchain:
    version = str(import_builder(builder).__version__)
    refit = ("REFIT",) if options.refittable else ()
    if builder == "tensorrt":
        if gpu is None:
            raise EngineBuildError(
                "TensorRT builds on the GPU that it builds for, and there is none here; "
                "TensorRT-RTX builds anywhere"
            )
        if options.targets:
            raise EngineBuildError(
                f"TensorRT builds for the GPU of this machine only ({gpu.target}), not for "
                f"{', '.join(options.targets)}; leave targets out or use TensorRT-RTX"
            )
        compatible = (HARDWARE_COMPATIBLE,) if options.hardware_compatible else ()
        return Toolchain(
            builder=builder,
            version=version,
            target_groups=((gpu.target,),),
            flags=(*compatible, *refit),
            gpu=gpu,
        )
    if options.hardware_compatible:
        raise EngineBuildError(
            "hardware-compatible is a level of TensorRT; for TensorRT-RTX name the targets, "
            f"any of {', '.join(TARGETS)}"
        )
    if options.refittable and gpu is None:
        raise EngineBuildError(
            "TensorRT-RTX builds refittable engines only on a machine with a GPU, and there is "
            "none here; leave refittable out or build there"
        )
    return Toolchain(
        builder=builder,
        version=version,
        target_groups=_grouped(options.targets or _default_targets(gpu)),
        # User allocation: no memory is taken while running, so that CUDA graphs can be captured.
        flags=("REQUIRE_USER_ALLOCATION", *refit),
        gpu=None,
    )


def _check_targets(targets: Sequence[str]) -> None:
    for target in targets:
        if target not in TARGETS:
            raise EngineBuildError(
                f"TensorRT-RTX has no target {target!r}; choose from {', '.join(TARGETS)}"
            )


def _default_targets(gpu: Gpu | None) -> tuple[str, ...]:
    if gpu is not None and gpu.target == _TURING:
        return (_TURING,)
    return tuple(target for target in TARGETS if target != _TURING)


def _grouped(targets: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    rest = tuple(target for target in TARGETS if target in targets and target != _TURING)
    groups = ((_TURING,) if _TURING in targets else (), rest)
    return tuple(group for group in groups if group)
