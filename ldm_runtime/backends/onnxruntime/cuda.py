"""ONNX Runtime's CUDA provider: runs on every NVIDIA GPU, without an engine build."""

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from ldm_runtime.backends.contract import Abilities, EngineSource, RunOptions, lacks_graph
from ldm_runtime.backends.onnxruntime.device import DeviceEngine
from ldm_runtime.backends.onnxruntime.library import onnxruntime
from ldm_runtime.backends.onnxruntime.packages import installed_packages
from ldm_runtime.backends.onnxruntime.providers import (
    Provider,
    gpu_fault,
    has_provider,
    open_on,
    provider_fault,
)
from ldm_runtime.bundle.manifest import Manifest

_NAME = "cuda"
_PROVIDER = "CUDAExecutionProvider"

#: Attention kernels by name, as the bits of the option `sdpa_kernel`.
ATTENTION_KERNELS = MappingProxyType(
    {"default": 0, "flash": 1, "efficient": 2, "cudnn": 8, "math": 16}
)


@dataclass(frozen=True, kw_only=True)
class CudaOptions:
    """Options of the CUDA provider; which are faster depends on the GPU, so measure.

    Attributes:
        device: Number of the GPU.
        conv_search: How a convolution's algorithm is chosen. "EXHAUSTIVE" tries them all for
            every new shape, which takes seconds.
        prefer_nhwc: Whether convolutions run in channels-last order.
        attention: Which fused attention kernel is allowed; "default" leaves the choice open.
        use_tf32: Whether fp32 islands may be multiplied in TF32.
        memory_limit: Bytes that the provider may allocate; None is no limit.
    """

    device: int = 0
    conv_search: Literal["HEURISTIC", "EXHAUSTIVE", "DEFAULT"] = "HEURISTIC"
    prefer_nhwc: bool = False
    attention: Literal["default", "flash", "efficient", "cudnn", "math"] = "default"
    use_tf32: bool = True
    memory_limit: int | None = None


def _is_prepared(_manifest: Manifest | None) -> bool:
    """Say whether the packages of this backend are installed, so that it is expected to run."""
    return "onnxruntime-gpu" in installed_packages() or has_provider(_PROVIDER)


ABILITIES = Abilities(
    variant="fp16",
    limited_shapes=False,
    min_shared_samples=1,
    is_prepared=_is_prepared,
    takes_weights=True,
)


def cuda_provider(options: CudaOptions) -> Provider:
    """Return the provider with options in ONNX Runtime's spelling."""
    spelled = {
        "device_id": str(options.device),
        "cudnn_conv_algo_search": options.conv_search,
        "prefer_nhwc": str(int(options.prefer_nhwc)),
        "use_tf32": str(int(options.use_tf32)),
    }
    if options.attention != "default":
        spelled["sdpa_kernel"] = str(ATTENTION_KERNELS[options.attention])
    if options.memory_limit is not None:
        spelled["gpu_mem_limit"] = str(options.memory_limit)
    return Provider(
        name=_PROVIDER,
        options=MappingProxyType(spelled),
        graph_option="enable_cuda_graph",
        device=options.device,
    )


def open_engine(source: EngineSource, options: CudaOptions | None = None) -> DeviceEngine:
    """Open one component of a bundle; see `ldm_runtime.backends.Backend`."""
    return open_on(cuda_provider(options or CudaOptions()), source)


def why_not(
    manifest: Manifest | None, _bundle: Path | None = None, _options: RunOptions | None = None
) -> str | None:
    """Say why a bundle cannot run: no fp16 graph, no GPU, or another package of ONNX Runtime."""
    return (
        lacks_graph(_NAME, "fp16", manifest) or gpu_fault(_NAME) or provider_fault(_NAME, _PROVIDER)
    )


def version() -> str:
    """Return ONNX Runtime's version."""
    return str(onnxruntime.__version__)
