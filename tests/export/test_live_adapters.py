"""Adapters as inputs of networks, next to the same merged, which are held to PEFT elsewhere."""

import numpy as np
import onnx
import onnx.reference
import pytest
from safetensors.numpy import save_file

from ldm_runtime import GenerationRequest, Generator
from ldm_runtime.adapters.files import read_adapter
from ldm_runtime.adapters.live import MOST_AT_ONCE, LiveAdapters
from ldm_runtime.backends import choose_backend
from ldm_runtime.bundle.graph_weights import stored_weights
from ldm_runtime.bundle.low_rank_branches import Branch, places, with_branches
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.diagnostics.measures import psnr
from ldm_runtime.errors import BackendError, BundleError, RequestError
from ldm_runtime.pipeline.results import Result
from tests.export.small_checkpoint import SIZE
from tests.serve.adapter_files import LAYERS, write_lora

BACKENDS = ("onnxruntime", "openvino")
_MIDDLE = "lora_unet_mid_block_attentions_0_"
_RESNET = "lora_unet_mid_block_resnets_0_"
#: Of the UNet and the text encoder: linear layers, and two convolutions of single pixels.
LIVE = (
    *LAYERS,
    *(f"{_MIDDLE}{name}" for name in ("proj_in", "proj_out")),
    f"{_MIDDLE}transformer_blocks_0_attn1_to_out_0",
)
PROJECTION = "middle_block.1.proj_in.weight"
QUERY = "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
FIELDS = {"num_inference_steps": 3, "height": SIZE, "width": SIZE, "guidance_scale": 3.0}
#: What requests scale, alone and together.
CHOICES = ({"style": 0.7}, {"other": -0.3}, {}, {"style": 0.5, "other": 1.0})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    return {
        "style": write_lora(folder / "style.safetensors", 0, layers=LIVE),
        "other": write_lora(folder / "other.safetensors", 1, layers=LIVE[:-2]),
    }


@pytest.fixture(scope="module", params=BACKENDS)
def generator(request, small_bundle_fp32, files):
    if request.param == "openvino":
        pytest.importorskip("openvino", reason="needs the extra openvino")
    options = {"backend": request.param, "precision": "fp32", "threads": 1}
    with Generator(small_bundle_fp32, live_adapters=files, **options) as generator:
        yield generator


def asked(seed=7, **fields):
    return GenerationRequest(prompt="red", seed=seed, **{**FIELDS, **fields})


def results_of(batch):
    """The results of a batch by request, and how many calls of the UNet there were."""
    results, calls = {}, 0
    while batch:
        for number, event in batch.advance():
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Result):
                results[number] = event
        calls += 1
    return results, calls


def live(generator, scales, **fields):
    """The result of one request, alone."""
    with generator.open_batch() as batch:
        number = batch.add(asked(**fields), adapters=scales)
        return results_of(batch)[0][number]


@pytest.mark.parametrize("scales", CHOICES, ids=str)
def test_images_are_those_of_merged_adapters(generator, small_bundle_fp32, files, scales):
    merged = {files[name]: scale for name, scale in scales.items()}
    options = {"backend": generator.backend, "precision": "fp32", "threads": 1}
    with Generator(small_bundle_fp32, adapters=merged, **options) as reference:
        expected = reference.generate(asked())

    found = live(generator, scales)

    np.testing.assert_allclose(found.latents, expected.latents, atol=2e-4)
    assert psnr(np.asarray(found.image), np.asarray(expected.image)) > 60
    assert found.metadata()["adapters"] == expected.metadata()["adapters"] if scales else True
    assert found.infotext() == expected.infotext()


def test_adapters_change_the_image(generator):
    images = [live(generator, scales).image.tobytes() for scales in CHOICES]

    assert len(set(images)) == len(CHOICES)


def test_requests_with_other_adapters_share_calls_and_no_bit_changes(generator):
    alone = [live(generator, scales, seed=seed) for seed, scales in enumerate(CHOICES)]

    with generator.open_batch(max_batch=len(CHOICES)) as batch:
        numbers = [batch.add(asked(seed), adapters=scales) for seed, scales in enumerate(CHOICES)]
        results, calls = results_of(batch)

    assert calls < 2 * FIELDS["num_inference_steps"]
    for number, expected in zip(numbers, alone, strict=True):
        assert results[number].latents.tobytes() == expected.latents.tobytes()
        assert results[number].image.tobytes() == expected.image.tobytes()


def test_a_request_that_names_none_is_that_of_every_other_call(generator):
    plain = live(generator, {})

    assert generator.generate(asked()).latents.tobytes() == plain.latents.tobytes()
    (together,) = generator.run_many([asked()])
    assert together.latents.tobytes() == plain.latents.tobytes()
    assert "adapters" not in plain.metadata()


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"missing": 1.0}, "there is no 'missing'; there are style, other"),
        ({"style": float("nan")}, "adapters: 'style' has the scale nan; give a finite number"),
    ],
)
def test_scales_that_mean_nothing_are_refused(generator, scales, message):
    with generator.open_batch() as batch, pytest.raises(RequestError, match=message):
        batch.add(asked(), adapters=scales)


def test_more_than_two_at_once_are_refused(small_bundle_fp32, files, tmp_path):
    third = write_lora(tmp_path / "third.safetensors", 2)
    adapters = {name: read_adapter(path) for name, path in {**files, "third": third}.items()}
    known = LiveAdapters(adapters, small_bundle_fp32, load_manifest(small_bundle_fp32))

    assert known.matrices({"style": 1.0, "other": 1.0, "third": 0.0})
    with pytest.raises(RequestError, match=f"at most {MOST_AT_ONCE} go together"):
        known.matrices({"style": 1.0, "other": 1.0, "third": 0.1})


def test_branches_are_as_wide_as_the_widest_two(small_bundle_fp32, files):
    adapters = {name: read_adapter(path) for name, path in files.items()}
    known = LiveAdapters(adapters, small_bundle_fp32, load_manifest(small_bundle_fp32))

    ranks = {each.weight: each.rank for each in known.branches("unet")}

    assert (ranks[QUERY], ranks["middle_block.1.proj_out.weight"]) == (8, 4)
    assert len(known.branches("text_encoder")) == 1
    assert known.branches("vae_decoder") == ()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {
                f"{_RESNET}time_emb_proj.lora_down.weight": np.ones((2, 128), np.float32),
                f"{_RESNET}time_emb_proj.lora_up.weight": np.ones((64, 2), np.float32),
            },
            "which is neither a linear layer of tokens nor a 1x1 convolution",
        ),
        (
            {
                f"{_RESNET}conv1.lora_down.weight": np.ones((2, 64, 3, 3), np.float32),
                f"{_RESNET}conv1.lora_up.weight": np.ones((64, 2, 1, 1), np.float32),
            },
            "a LoRA, and only a LoRA of a matrix can be live; merge the adapter",
        ),
        (
            {f"{_MIDDLE}proj_in.diff": np.ones((64, 64), np.float32)},
            "a full difference, and only a LoRA of a matrix can be live; merge the adapter",
        ),
        (
            {
                f"{_MIDDLE}proj_in.lora_down.weight": np.ones((2, 64), np.float32),
                f"{_MIDDLE}proj_in.lora_up.weight": np.ones((64, 2), np.float32),
                f"{_MIDDLE}proj_in.dora_scale": np.ones((64, 1), np.float32),
            },
            "a LoRA with DoRA, and only",
        ),
        (
            {
                f"{_MIDDLE}proj_in.lora_down.weight": np.ones((2, 96), np.float32),
                f"{_MIDDLE}proj_in.lora_up.weight": np.ones((64, 2), np.float32),
            },
            "does not fit a weight of shape",
        ),
    ],
)
def test_what_cannot_be_live_is_refused_by_name(small_bundle_fp32, tmp_path, tensors, message):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)

    with pytest.raises(RequestError, match=f"^live_adapters: .*{message}"):
        Generator(small_bundle_fp32, backend="onnxruntime", live_adapters={"a": path})


def test_backends_that_run_graphs_as_they_are_take_none(small_bundle_fp32, monkeypatch):
    monkeypatch.setattr("ldm_runtime.backends.onnxruntime.cuda.why_not", lambda *_: None)

    with pytest.raises(BackendError, match="cuda runs graphs as they are"):
        choose_backend("cuda", load_manifest(small_bundle_fp32), adapters="live")


# --- graphs ---------------------------------------------------------------------------------------


@pytest.fixture
def graph(tmp_path):
    """A graph of a linear layer whose weight is cast, two convolutions and what has no place."""
    rng = np.random.default_rng(0)
    weights = {
        "linear": rng.standard_normal((4, 6)).astype(np.float16),
        "pixels": rng.standard_normal((5, 3, 1, 1)).astype(np.float32),
        "bias": rng.standard_normal(5).astype(np.float32),
        "strided": rng.standard_normal((5, 3, 1, 1)).astype(np.float32),
        "kernel": rng.standard_normal((5, 3, 3, 3)).astype(np.float32),
        "twice": rng.standard_normal((4, 4)).astype(np.float32),
        "rows": rng.standard_normal((4, 6)).astype(np.float32),
    }
    node = onnx.helper.make_node
    nodes = [
        node("Cast", ["linear"], ["cast"], to=onnx.TensorProto.FLOAT),
        node("MatMul", ["tokens", "cast"], ["of_tokens"]),
        node("Conv", ["image", "pixels", "bias"], ["of_pixels"]),
        node("Conv", ["image", "strided"], ["of_strides"], strides=[2, 2]),
        node("Conv", ["image", "kernel"], ["of_kernel"], pads=[1, 1, 1, 1]),
        node("MatMul", ["tokens", "twice"], ["once"]),
        node("MatMul", ["once", "twice"], ["again"]),
        node("MatMul", ["vector", "rows"], ["of_vector"]),
    ]
    value = onnx.helper.make_tensor_value_info
    shapes = {"tokens": ["b", "t", 4], "image": ["b", 3, "h", "w"], "vector": ["b", 4]}
    results = {"of_tokens": 3, "of_pixels": 4, "of_strides": 4, "of_kernel": 4, "again": 3}
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "graph",
            [value(name, 1, shape) for name, shape in shapes.items()],
            [value(name, 1, [None] * axes) for name, axes in {**results, "of_vector": 2}.items()],
            [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path / "graph.onnx"
    onnx.save(model, path)
    return path, weights


def test_places_are_weights_of_one_linear_layer_or_one_pixel(graph):
    found = places(graph[0])

    assert {name: (each.inputs, each.outputs) for name, each in found.items()} == {
        "linear": (4, 6),
        "pixels": (3, 5),
    }
    assert [each.is_convolution for each in found.values()] == [False, True]


def test_a_graph_with_branches_computes_them(graph):
    """By ONNX's own reference implementation, and NumPy's matrices."""
    path, weights = graph
    rng = np.random.default_rng(1)
    branches = [Branch(weight=name, place=each, rank=2) for name, each in places(path).items()]
    feed = {
        "tokens": rng.standard_normal((2, 7, 4)),
        "image": rng.standard_normal((2, 3, 5, 3)),
        "vector": rng.standard_normal((2, 4)),
        **{
            name: rng.standard_normal((2, *shape))
            for branch in branches
            for name, shape in branch.shapes.items()
        },
    }
    feed = {name: array.astype(np.float32) for name, array in feed.items()}

    model = onnx.load_from_string(with_branches(path, branches))

    onnx.checker.check_model(model, full_check=True)
    found = onnx.reference.ReferenceEvaluator(model).run(["of_tokens", "of_pixels"], feed)
    linear = weights["linear"].astype(np.float32) + feed["linear.down"] @ feed["linear.up"]
    pixels = weights["pixels"][:, :, 0, 0] + feed["pixels.up"] @ feed["pixels.down"]
    of_pixels = np.einsum("boc,bchw->bohw", pixels, feed["image"])
    of_pixels += weights["bias"][:, None, None]
    np.testing.assert_allclose(found[0], feed["tokens"] @ linear, atol=1e-5)
    np.testing.assert_allclose(found[1], of_pixels, atol=1e-5)


def test_a_graph_without_branches_is_that_of_the_file(graph):
    path, _ = graph

    assert with_branches(path, ()) == path.read_bytes()


def test_the_branches_of_a_bundle_are_inputs_of_its_graph(small_bundle_fp32):
    component = load_manifest(small_bundle_fp32).component("unet")
    path = small_bundle_fp32 / next(g.file for g in component.graphs if g.variant == "fp32")
    known, stored = places(path), stored_weights(path)
    branches = [Branch(weight=name, place=known[name], rank=3) for name in (PROJECTION, QUERY)]

    model = onnx.load_from_string(with_branches(path, branches))

    names = {each.name for each in model.graph.input}
    assert names == {"latents", "timesteps", "context"} | {
        name for branch in branches for name in branch.shapes
    }
    assert all(name in stored for name in known)
    assert known[PROJECTION].is_convolution
    assert not known[QUERY].is_convolution


def test_what_is_no_graph_is_refused(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"\xff\xff\xff")

    with pytest.raises(BundleError, match="is not an ONNX graph"):
        places(path)
    with pytest.raises(BundleError, match="is not an ONNX graph"):
        with_branches(path, ())
