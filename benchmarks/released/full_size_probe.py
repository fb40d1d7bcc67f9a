"""Look at one bundle of random weights: its golden outputs, and its fp16 graphs at full size.

    python -m released.full_size_probe engines/    # from benchmarks/

Prints one line of JSON. `full_size.py` runs it in its own process.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.graphs.fp16_range import FP16_MAX, largest_value, watched_graph
from ldm_export.memory import give_back_memory
from ldm_runtime import Generator
from ldm_runtime.backends.denormals import flushed_denormals
from ldm_runtime.benchmark.process import forget_peak, peak_bytes
from ldm_runtime.bundle.manifest import Manifest, load_manifest
from ldm_runtime.diagnostics.verify import verify
from ldm_runtime.specs.model import ModelSpec, axis_sizes, components_of, value_counts
from ldm_runtime.specs.networks import TextEncoderSpec

_MAX_PIXELS = 256  # per side, where a network works on pixels
#: Factors of the latents and the timestep that goes with it: pure noise as the UNet gets
#: it, and clean latents four times as large as they should be.
_EXTREMES = ((1.0, 999.0), (4.0, 0.0))

Array = npt.NDArray[Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    (bundle,) = sys.argv[1:] if argv is None else argv
    manifest = load_manifest(Path(bundle))
    found = {
        # Other models decode with one of the autoencoders that have their own row.
        "decode_bytes": decode_bytes(Path(bundle), manifest)
        if manifest.spec.unet is None
        else None,
        "golden": golden(Path(bundle)),
        "fp16_at_size": fp16_at_size(Path(bundle), manifest),
    }
    print(json.dumps(found))
    return 0


def decode_bytes(bundle: Path, manifest: Manifest) -> int:
    """Return the bytes that decoding one image takes beyond the loaded networks, on the CPU.

    The image has the model's size, at most 256 pixels per side. Of a VQ autoencoder the comparison
    with all of its codes is part of it.
    """
    spec = manifest.spec
    height, width = (
        min(side, _MAX_PIXELS) // spec.autoencoder.factor
        for side in (spec.defaults.height, spec.defaults.width)
    )
    shape = (1, spec.autoencoder.embed_dim, height, width)
    latents = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    with Generator(bundle, backend="onnxruntime") as generator:
        return bytes_of_decoding(generator, latents)


def bytes_of_decoding(generator: Generator, latents: Array, tile_size: int = 0) -> int:
    """Return the bytes that `Generator.decode` takes for latents beyond the loaded decoder."""
    generator.decode(latents[..., :1, :1])  # loads the decoder
    give_back_memory()  # or what loading has freed would be used again and not be seen
    before = forget_peak()
    generator.decode(latents, tile_size=tile_size)
    return peak_bytes() - before


def golden(bundle: Path) -> dict[str, Any]:
    """Generate the golden requests again with ONNX Runtime on the CPU."""
    started = time.monotonic()
    checks = list(verify(bundle, backend="onnxruntime"))
    return {
        "seconds": time.monotonic() - started,
        "checks": len(checks),
        "failed": [f"{each.subject} {each.measure}" for each in checks if not each.passed],
        "worst_psnr": min(min(each.value, 999.0) for each in checks if each.measure == "psnr"),
    }


def fp16_at_size(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    """Run the fp16 graph of every component on inputs of the model's own size."""
    found = {}
    for component in manifest.components:
        (file,) = (graph.file for graph in component.graphs if graph.variant == "fp16")
        found[component.name] = _run(bundle / file, component.name, manifest.spec)
    return found


def _run(graph: Path, name: str, spec: ModelSpec) -> dict[str, Any]:
    """Run a graph, and look inside: a CPU computes in fp32 what a GPU would overflow at."""
    started = time.monotonic()
    shape, finite, inside = [0], True, ("nothing", 0.0)
    with watched_graph(graph) as watched, flushed_denormals():
        session = _session(watched)
        names = [each.name for each in session.get_outputs()]
        for inputs in _inputs(name, spec):
            outputs = dict(zip(names, session.run(None, dict(inputs)), strict=True))
            inside = max(inside, largest_value(outputs), key=lambda each: each[1])
            finite &= bool(np.isfinite(outputs[names[0]]).all())
            shape = list(outputs[names[0]].shape)
    return {
        "seconds": time.monotonic() - started,
        "finite": finite and inside[1] <= FP16_MAX,
        "largest": min(inside[1], 1e30),
        "at": inside[0],
        "shape": shape,
    }


def _session(graph: Path) -> Any:  # noqa: ANN401  (a class without types)
    from ldm_runtime.backends.onnxruntime.library import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _inputs(name: str, spec: ModelSpec) -> Iterator[Mapping[str, Array]]:
    """Yield random inputs of the model's own size, of noise and of latents beyond all bounds."""
    rng, counts = np.random.default_rng(0), value_counts(spec, name)
    height, width = (
        min(side, _MAX_PIXELS) if name.startswith("vae_") else side
        for side in (spec.defaults.height, spec.defaults.width)
    )
    factor = spec.autoencoder.factor
    encoder = spec.find(TextEncoderSpec)
    tokens = 1 if encoder is None else encoder.max_tokens
    lengths = {"batch": 1, "height": height // factor, "width": width // factor}
    lengths |= {"image_height": height, "image_width": width, "context_tokens": tokens}
    lengths |= axis_sizes(spec, name)
    for scale, timestep in _EXTREMES:
        arrays: dict[str, Array] = {}
        for tensor in components_of(spec)[name].inputs:
            shape = tuple(lengths[axis] for axis in tensor.axes)
            if tensor.name in counts:
                arrays[tensor.name] = rng.integers(counts[tensor.name], size=shape)
            elif tensor.name == "timesteps":
                arrays[tensor.name] = np.full(shape, timestep, dtype=np.float32)
            elif tensor.name == "image":
                arrays[tensor.name] = rng.uniform(-1, 1, shape).astype(np.float32)
            else:
                arrays[tensor.name] = rng.standard_normal(shape, dtype=np.float32)
                if tensor.name == "latents":
                    arrays[tensor.name] *= np.float32(scale)
        yield arrays


if __name__ == "__main__":
    sys.exit(main())
