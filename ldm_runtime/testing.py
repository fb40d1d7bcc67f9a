"""For tests of code that uses this package: a fake engine, and a whole bundle of a few kilobytes.

The tiny bundle is complete and opens in every backend that reads its fp32 graphs, but what it draws
are coloured patterns. Its networks exist twice, as ONNX graphs and as NumPy functions, and its
golden outputs come from the latter. Nothing here needs more than NumPy.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from ldm_runtime.backends import BoundInputs, Runner, Tensors
from ldm_runtime.components import COMPONENTS
from ldm_runtime.conditioning import encode_prompts
from ldm_runtime.errors import BackendError
from ldm_runtime.images import decode_latents
from ldm_runtime.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    AutoencoderSpec,
    BuildRecord,
    ComponentRecord,
    FileRecord,
    GraphRecord,
    Manifest,
    ModelSpec,
    PreviewRecord,
    SamplingDefaults,
    TextEncoderSpec,
    UNetSpec,
    encode_manifest,
)
from ldm_runtime.noise import TorchCpuGenerator
from ldm_runtime.onnx_bytes import Node, encode_model, pack_weights
from ldm_runtime.previews import explained_variance, preview_pixels
from ldm_runtime.request import GenerationRequest
from ldm_runtime.resolution import resolve
from ldm_runtime.sampling import sample_latents
from ldm_runtime.tokenizers import ClipTokenizer

Float32Array = npt.NDArray[np.float32]
Function = Callable[[Tensors], dict[str, npt.NDArray[Any]]]

_MERGES = ("r e", "re d</w>", "c i", "ci r", "cir c", "circ l", "circl e</w>")
_MAX_TOKENS, _WIDTH = 16, 8


class FakeEngine:
    """An engine over a Python function, for tests of whatever calls engines.

    Attributes:
        calls: The inputs of every `run` so far, constants of `bind` included.
    """

    def __init__(self, function: Function) -> None:
        self.calls: list[Tensors] = []
        self._function: Function | None = function

    def run(self, inputs: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Call the function."""
        if self._function is None:
            raise BackendError("the engine is closed")
        self.calls.append(dict(inputs))
        return self._function(inputs)

    def bind(self, constants: Tensors) -> Runner:
        """Fix some inputs."""
        return BoundInputs(runner=self, constants=constants)

    def close(self) -> None:
        """Make `run` raise from now on."""
        self._function = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


TINY_SPEC = ModelSpec(
    family="tiny",
    task="text-to-image",
    weights="model",
    unet=UNetSpec(
        in_channels=4,
        out_channels=4,
        model_channels=4,
        channel_mult=(1, 2),
        num_res_blocks=1,
        transformer_depth=(0, 1),
        middle_depth=1,
        num_heads=1,
        num_head_channels=None,
        context_dim=_WIDTH,
        linear_projection=False,
    ),
    autoencoder=AutoencoderSpec(
        kind="kl",
        image_channels=3,
        channels=4,
        channel_mult=(1, 1),
        num_res_blocks=1,
        attention_levels=(),
        z_channels=4,
        embed_dim=4,
        latent_scale_factor=0.5,
    ),
    text_encoder=TextEncoderSpec(
        kind="clip",
        width=_WIDTH,
        num_layers=1,
        num_heads=1,
        feed_forward_dim=_WIDTH,
        vocab_size=2 * 256 + len(_MERGES) + 2,
        max_tokens=_MAX_TOKENS,
        activation="quick_gelu",
        pad_token_id=2 * 256 + len(_MERGES) + 1,
    ),
    alphas_cumprod=tuple(
        float(value) for value in np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    ),
    prediction_type="v_prediction",  # bounded, whatever the network says
    defaults=SamplingDefaults(
        height=16, width=16, sampler="ddim", num_inference_steps=4, guidance_scale=3.0
    ),
    assumptions=(),
)

_GOLDEN = (
    GenerationRequest(prompt="a red circle", seed=7, num_images=2),
    GenerationRequest(
        prompt="a blue square",
        negative_prompt="red",
        height=24,
        sampler="euler_ancestral",
        guidance_scale=1.0,
        seed=0,
    ),
)


def tiny_networks() -> Mapping[str, Function]:
    """Return the networks of the tiny bundle as NumPy functions, by component."""
    weights = _tiny_weights()

    def text_encoder(inputs: Tensors) -> dict[str, npt.NDArray[Any]]:
        w = weights["text_encoder"]
        return {"context": np.tanh(w["embedding"][inputs["tokens"]] + w["positions"])}

    def unet(inputs: Tensors) -> dict[str, npt.NDArray[Any]]:
        w = weights["unet"]
        shift = inputs["context"].mean(axis=1) @ w["mix"]
        time = inputs["timesteps"][:, None, None, None] * w["time"]
        hidden = np.tanh(_convolve(inputs["latents"], w["kernel"]) + shift[:, :, None, None])
        return {"prediction": hidden + time}

    def vae_decoder(inputs: Tensors) -> dict[str, npt.NDArray[Any]]:
        mixed = _convolve(inputs["latents"], weights["vae_decoder"]["kernel"])
        batch, _, height, width = mixed.shape
        blocks = mixed.reshape(batch, 2, 2, 3, height, width).transpose(0, 3, 4, 1, 5, 2)
        return {"image": np.tanh(blocks.reshape(batch, 3, 2 * height, 2 * width))}

    def vae_encoder(inputs: Tensors) -> dict[str, npt.NDArray[Any]]:
        batch, _, height, width = inputs["image"].shape
        blocks = inputs["image"].reshape(batch, 3, height // 2, 2, width // 2, 2)
        deep = blocks.transpose(0, 3, 5, 1, 2, 4).reshape(batch, 12, height // 2, width // 2)
        return {"moments": _convolve(deep, weights["vae_encoder"]["kernel"])}

    return {
        "text_encoder": text_encoder,
        "unet": unet,
        "vae_decoder": vae_decoder,
        "vae_encoder": vae_encoder,
    }


def write_tiny_bundle(folder: Path) -> Manifest:
    """Write the tiny bundle into a folder, which is made if need be, and return its manifest."""
    weights, networks = _tiny_weights(), tiny_networks()
    files: dict[str, bytes] = {"tokenizer/merges.txt": _vocabulary()}
    for name, component in COMPONENTS.items():
        files[f"{name}/weights.bin"], _ = pack_weights(weights[name])
        files[f"{name}/model.cpu.onnx"] = encode_model(
            _TINY_NODES[name], component.inputs, component.outputs, weights[name], _TINY_AXES[name]
        )
    for path, data in files.items():
        _write(folder / path, data)
    _write_golden_components(folder / "golden/components", networks)
    golden = tuple(f"golden/{index}" for index in range(len(_GOLDEN)))
    for path, request in zip(golden, _GOLDEN, strict=True):
        _write_golden_request(folder / path, request, folder / "tokenizer/merges.txt", networks)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        spec=TINY_SPEC,
        weights_dtype="float32",
        components=tuple(_component_record(name) for name in COMPONENTS),
        tokenizer_file="tokenizer/merges.txt",
        golden=golden,
        golden_key="tiny",
        preview=_tiny_preview(networks["vae_decoder"]),
        engines=(),
        files=tuple(_file_records(folder)),
        build=BuildRecord(
            checkpoint="tiny",
            checkpoint_sha256=hashlib.sha256(b"tiny").hexdigest(),
            versions={"numpy": np.__version__},
            seconds=0.0,
        ),
    )
    _write(folder / MANIFEST_NAME, encode_manifest(manifest))
    return manifest


_TINY_NODES: Mapping[str, tuple[Node, ...]] = {
    "text_encoder": (
        Node(op="Gather", inputs=("embedding", "tokens"), output="embedded"),
        Node(op="Add", inputs=("embedded", "positions"), output="placed"),
        Node(op="Tanh", inputs=("placed",), output="context"),
    ),
    "unet": (
        Node(
            op="ReduceMean",
            inputs=("context",),
            output="pooled",
            attributes={"axes": (1,), "keepdims": 0},
        ),
        Node(op="MatMul", inputs=("pooled", "mix"), output="shift"),
        Node(op="Unsqueeze", inputs=("shift", "last_two"), output="broad_shift"),
        Node(op="Unsqueeze", inputs=("timesteps", "last_three"), output="broad_timesteps"),
        Node(op="Mul", inputs=("broad_timesteps", "time"), output="broad_time"),
        Node(
            op="Conv",
            inputs=("latents", "kernel"),
            output="convolved",
            attributes={"pads": (1, 1, 1, 1)},
        ),
        Node(op="Add", inputs=("convolved", "broad_shift"), output="shifted"),
        Node(op="Tanh", inputs=("shifted",), output="hidden"),
        Node(op="Add", inputs=("hidden", "broad_time"), output="prediction"),
    ),
    "vae_decoder": (
        Node(op="Conv", inputs=("latents", "kernel"), output="mixed"),
        Node(op="DepthToSpace", inputs=("mixed",), output="spread", attributes={"blocksize": 2}),
        Node(op="Tanh", inputs=("spread",), output="image"),
    ),
    "vae_encoder": (
        Node(op="SpaceToDepth", inputs=("image",), output="deep", attributes={"blocksize": 2}),
        Node(op="Conv", inputs=("deep", "kernel"), output="moments"),
    ),
}
_TINY_AXES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "text_encoder": {},
    "unet": {"last_two": (2, 3), "last_three": (1, 2, 3)},
    "vae_decoder": {},
    "vae_encoder": {},
}
_TINY_SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "text_encoder": {
        "embedding": (TINY_SPEC.text_encoder.vocab_size, _WIDTH),
        "positions": (_MAX_TOKENS, _WIDTH),
    },
    "unet": {"mix": (_WIDTH, 4), "kernel": (4, 4, 3, 3), "time": (1, 4, 1, 1)},
    "vae_decoder": {"kernel": (12, 4, 1, 1)},
    "vae_encoder": {"kernel": (8, 12, 1, 1)},
}


def _tiny_weights() -> dict[str, dict[str, Float32Array]]:
    generator = TorchCpuGenerator(0)
    weights = {
        component: {name: generator.randn(shape) * 0.2 for name, shape in shapes.items()}
        for component, shapes in _TINY_SHAPES.items()
    }
    weights["unet"]["time"] *= 0.001
    return weights


def _tiny_preview(decoder: Function) -> PreviewRecord:
    """Return the decoder's own weights as a map to colours, and how well that does on noise."""
    factor, scale = TINY_SPEC.autoencoder.factor, TINY_SPEC.autoencoder.latent_scale_factor
    kernel = _tiny_weights()["vae_decoder"]["kernel"].reshape(factor**2, 3, 4)
    red, green, blue = (tuple(row) for row in (kernel.mean(axis=0) / scale).tolist())
    record = PreviewRecord(matrix=(red, green, blue), bias=(0.0, 0.0, 0.0), r2=math.nan)
    latents = TorchCpuGenerator(2).randn((4, 4, 8, 8))
    image = decoder({"latents": latents / scale})["image"]
    colours = image.reshape(4, 3, 8, factor, 8, factor).mean(axis=(3, 5))
    return replace(record, r2=explained_variance(preview_pixels(latents, record), colours))


def _tiny_inputs(name: str) -> dict[str, npt.NDArray[Any]]:
    """Return one fixed input of a component."""
    generator = TorchCpuGenerator(1)
    if name == "text_encoder":
        tokens = ClipTokenizer(_merges()).encode("a red circle", _MAX_TOKENS).ids
        return {"tokens": np.array([tokens], dtype=np.int64)}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "unet": {"latents": (2, 4, 8, 8), "context": (2, _MAX_TOKENS, _WIDTH)},
        "vae_decoder": {"latents": (1, 4, 8, 8)},
        "vae_encoder": {"image": (1, 3, 16, 16)},
    }
    arrays: dict[str, npt.NDArray[Any]] = {
        key: generator.randn(shape) for key, shape in shapes[name].items()
    }
    if name == "unet":
        arrays["timesteps"] = np.array([0.0, 999.0], dtype=np.float32)
    return arrays


def _convolve(images: Float32Array, kernel: Float32Array) -> Float32Array:
    """Cross-correlate (B, C, H, W) with (D, C, k, k), zero-padded to the same size."""
    size = kernel.shape[-1]
    edge = size // 2
    padded = np.pad(images, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
    result: Float32Array = np.einsum("bchwij,dcij->bdhw", windows, kernel)
    return result


def _merges() -> list[tuple[str, str]]:
    pairs = (line.split(" ") for line in _MERGES)
    return [(first, second) for first, second in pairs]


def _vocabulary() -> bytes:
    return "\n".join(("#version: 0.2", *_MERGES, "")).encode()


def _component_record(name: str) -> ComponentRecord:
    component = COMPONENTS[name]
    return ComponentRecord(
        name=name,
        inputs=component.inputs,
        outputs=component.outputs,
        graphs=(GraphRecord(variant="fp32", file=f"{name}/model.cpu.onnx"),),
        weights_file=f"{name}/weights.bin",
        fp32_islands=(),
        parity=(),
        key=hashlib.sha256(name.encode()).hexdigest(),
    )


def _write_golden_components(folder: Path, networks: Mapping[str, Function]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in networks.items():
        inputs = _tiny_inputs(name)
        arrays: dict[str, Any] = {f"in.{key}": array for key, array in inputs.items()}
        arrays |= {f"out.{key}": array for key, array in network(inputs).items()}
        np.savez(folder / f"{name}.npz", **arrays)


def _write_golden_request(
    folder: Path, request: GenerationRequest, vocabulary: Path, networks: Mapping[str, Function]
) -> None:
    request = resolve(request, TINY_SPEC)
    tokenizer = ClipTokenizer.from_file(vocabulary)
    engines = {name: FakeEngine(network) for name, network in networks.items()}
    context = encode_prompts(engines["text_encoder"], tokenizer, request, TINY_SPEC)
    *_, last = sample_latents(engines["unet"], context, request, TINY_SPEC)
    _write(folder / "request.json", msgspec.json.encode(asdict(request)))
    np.savez(folder / "golden.npz", context=context, latents=last.latents)
    images = decode_latents(engines["vae_decoder"], last.latents, TINY_SPEC)
    for index, image in enumerate(images):
        image.save(folder / f"{index}.png")


def _file_records(folder: Path) -> list[FileRecord]:
    paths = sorted(each for each in folder.rglob("*") if each.is_file())
    return [
        FileRecord(
            path=path.relative_to(folder).as_posix(),
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            size_bytes=path.stat().st_size,
        )
        for path in paths
        if path.name != MANIFEST_NAME
    ]


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
