"""Every kind of network that Stable Diffusion does not have: exported, measured, built."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from ldm_export.errors import PrecisionError
from ldm_export.graphs import onnx_export
from ldm_export.graphs.onnx_export import round_stored, sample_inputs, write_graphs
from ldm_export.graphs.parity import MAX_RELATIVE_ERROR, MAX_RELATIVE_L2, measure
from ldm_export.graphs.precision import fp16_with_islands
from ldm_export.graphs.torch_engine import TorchEngine
from ldm_export.networks.quantizer import Quantizer
from ldm_runtime.diagnostics.measures import max_relative_error, relative_l2
from ldm_runtime.specs.model import components_of
from tests.export.paper_networks import CASES, CLASSES, FIRST_STAGE, LAYOUTS, SEMANTIC
from tests.export.test_onnx_export import FILES, random_network, run, samples

pytestmark = pytest.mark.slow


class Exported:
    """A network of random weights, as stored and as it was, and its graphs."""

    def __init__(self, name, spec, folder):
        self.name, self.spec, self.folder = name, spec, folder
        self.own, self.network = random_network(name, spec), random_network(name, spec)
        round_stored(self.network, "float16")
        self.graphs = write_graphs(name, self.network, spec, folder, "float16")


@pytest.fixture(scope="module")
def export_case(tmp_path_factory):
    """A function that exports a case, once."""
    done = {}

    def export(case):
        if case not in done:
            done[case] = Exported(*CASES[case], tmp_path_factory.mktemp(case))
        return done[case]

    return export


@pytest.fixture(params=CASES)
def exported(request, export_case):
    return export_case(request.param)


def test_both_graphs_keep_what_is_promised(exported):
    """`measure` refuses whatever is above its bound, and what is not a number."""
    inputs = samples(exported.name, exported.network, exported.spec, exported.own)

    records = [
        record
        for graph in exported.graphs
        for record in measure(exported.name, graph, exported.folder, inputs)
    ]

    assert [(each.variant, each.reference) for each in records] == [
        *[("fp32", "stored"), ("fp32", "checkpoint")] * 2,
        *[("fp16", "checkpoint")] * 2,
    ]
    assert all(sample.expected.popitem()[1].std() > 0.01 for sample in inputs)


def test_graphs_take_the_inputs_of_their_model(exported):
    component = components_of(exported.spec)[exported.name]

    for file in FILES.values():
        graph = ir.load(exported.folder / file).graph
        assert [each.name for each in graph.inputs] == [each.name for each in component.inputs]
        for value, tensor in zip(graph.inputs, component.inputs, strict=True):
            assert value.dtype.name == {"float32": "FLOAT", "int64": "INT64"}[tensor.dtype]


def test_tensorrt_rtx_builds_an_engine(exported, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    from ldm_runtime.engines.build import build_engine

    build_engine(exported.folder / "model.onnx", recipe_of(exported), tmp_path / "a.plan")

    weights = (exported.folder / "weights.bin").stat().st_size
    assert (tmp_path / "a.plan").stat().st_size > 0.9 * weights


def recipe_of(exported):
    """An engine for the sizes of the samples, made by TensorRT-RTX for one GPU."""
    from ldm_runtime.engines.library import import_builder
    from ldm_runtime.engines.records import EngineBuildSpec, ProfileRecord

    (_, small), (_, large) = sample_inputs(exported.name, exported.spec)
    return EngineBuildSpec(
        component=exported.name,
        builder="tensorrt_rtx",
        builder_version=str(import_builder("tensorrt_rtx").__version__),
        graph_sha256="",
        weights_sha256="",
        flags=("REQUIRE_USER_ALLOCATION",),
        profiles=tuple(
            ProfileRecord(input=name, min=array.shape, opt=large[name].shape, max=large[name].shape)
            for name, array in small.items()
        ),
        targets=("sm86",),
        gpu_name=None,
    )


@pytest.mark.parametrize("variant", FILES)
def test_a_unet_without_context_takes_sizes_it_was_never_traced_with(export_case, variant):
    exported = export_case("unet_of_attention_blocks")
    rng = np.random.default_rng(0)
    inputs = {
        "latents": rng.normal(size=(2, 7, 10, 6)).astype(np.float32),
        "timesteps": np.array([998.6, 3], np.float32),
    }
    expected = TorchEngine("unet", exported.network).run(inputs)["prediction"]

    prediction = run(exported.folder / FILES[variant], inputs)

    assert relative_l2(prediction, expected) <= MAX_RELATIVE_L2
    if variant == "fp32":
        assert max_relative_error(prediction, expected) <= MAX_RELATIVE_ERROR


# The codebook


def test_the_fp16_graph_finds_codes_in_fp32(export_case):
    folder = export_case("decoder_with_a_codebook").folder
    graph = ir.load(folder / "model.onnx").graph

    choosing = [node for node in graph if node.op_type in {"ArgMax", "Sub"}]

    assert {node.inputs[0].dtype for node in choosing} == {ir.DataType.FLOAT}
    assert sum(node.op_type == "ArgMax" for node in choosing) == 4  # three pieces, and their winner


def test_no_product_of_the_codebook_can_become_tf32(export_case):
    """Engines compute matrix products and convolutions so, even those of an fp32 graph."""
    graph = ir.load(export_case("decoder_with_a_codebook").folder / "model.cpu.onnx").graph
    (codebook,) = (each for each in graph.initializers.values() if "quantize" in each.name)
    chosen, waiting = set(), list(codebook.consumers())

    while waiting:
        node = waiting.pop()
        if node not in chosen and node.op_type != "Conv":  # the first one after the codebook
            chosen.add(node)
            waiting += [user for output in node.outputs for user in output.consumers()]

    assert len(chosen) > 20
    assert not {node.op_type for node in chosen} & {"MatMul", "Gemm"}


def test_a_codebook_is_stored_in_fp32_with_weights_in_fp16(export_case):
    exported = export_case("decoder_with_a_codebook")

    graph = ir.load(exported.folder / "model.onnx").graph

    stored = {name: value.const_value.dtype.name for name, value in graph.initializers.items()}
    assert stored["quantize.embedding.weight"] == "FLOAT"
    assert stored["decoder.conv_in.weight"] == "FLOAT16"
    unrounded = exported.own.quantize.embedding.weight
    assert torch.equal(exported.network.quantize.embedding.weight, unrounded)


def test_rounding_a_codebook_would_choose_other_codes():
    """And cost more than the whole fp16 graph may: that is why codebooks are not rounded."""
    torch.manual_seed(0)
    exact, rounded = Quantizer(256, 4).requires_grad_(False), Quantizer(256, 4)
    exact.embedding.weight.normal_()
    rounded.requires_grad_(False).embedding.weight.copy_(exact.embedding.weight.half())
    latents = torch.randn(4, 4, 64, 64)

    error = relative_l2(rounded(latents).numpy(), exact(latents).numpy())

    assert error > MAX_RELATIVE_L2


# The residual stream of BERT


@pytest.fixture(scope="module")
def hot_bert(tmp_path_factory):
    """A BERT whose stream leaves the range of fp16, exported as what it is and by CLIP's plan."""
    network = random_network("text_encoder", LAYOUTS)
    network.transformer.attn_layers.layers[1][1].net[2].weight *= 60_000
    graphs = {}
    for kind, islands in (("bert", fp16_with_islands), ("clip", fp16_of_clip)):
        folder = tmp_path_factory.mktemp(kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx_export, "fp16_with_islands", islands)
            graphs[kind] = folder, write_graphs("text_encoder", network, LAYOUTS, folder, "float32")
    return network, graphs


def fp16_of_clip(graph, *, residual_stream):
    assert residual_stream
    return fp16_with_islands(graph, residual_stream=False)


def test_bert_stays_a_number_in_fp16_when_its_stream_leaves_that_range(hot_bert):
    """And would not by CLIP's plan."""
    network, graphs = hot_bert
    _, inputs = sample_inputs("text_encoder", LAYOUTS)[0]
    expected = TorchEngine("text_encoder", network).run(inputs)["context"]

    contexts = {
        kind: as_typed(folder / "model.onnx", inputs) for kind, (folder, _) in graphs.items()
    }

    assert stream_of(network) > 65504
    assert relative_l2(contexts["bert"], expected) <= MAX_RELATIVE_L2
    assert not np.isfinite(contexts["clip"]).all()


def test_a_graph_that_would_overflow_is_refused_although_a_cpu_does_not_show_it(hot_bert):
    network, graphs = hot_bert
    inputs = samples("text_encoder", network, LAYOUTS)
    folder, (_, half) = graphs["clip"]
    assert np.isfinite(run(folder / "model.onnx", inputs[0].inputs)).all()

    with pytest.raises(
        PrecisionError, match=r"fp16 graph of text_encoder overflows: .* reaches 1\.\d+e\+05"
    ):
        measure("text_encoder", half, folder, inputs)

    assert sorted(path.name for path in folder.iterdir()) == [
        "model.cpu.onnx",
        "model.onnx",
        "weights.bin",
    ]
    folder, (_, half) = graphs["bert"]
    assert measure("text_encoder", half, folder, inputs)


def as_typed(path, inputs):
    """Compute in the types the graph says: ONNX Runtime's CPU kernels widen fp16 to fp32 inside."""
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(str(path)).run(None, inputs)[0]


def stream_of(network):
    """Return the largest value that the last LayerNorm sees."""
    seen = []
    handle = network.transformer.norm.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].abs().max().item())
    )
    _, inputs = sample_inputs("text_encoder", LAYOUTS)[0]
    TorchEngine("text_encoder", network).run(inputs)
    handle.remove()
    return seen[0]


# Sample inputs


@pytest.mark.parametrize(
    ("name", "spec", "key", "count"),
    [
        ("class_embedder", CLASSES, "class_labels", 11),
        ("segmentation_encoder", SEMANTIC, "segmentation", 182),
        ("text_encoder", LAYOUTS, "tokens", 8192),
    ],
)
def test_ids_are_sampled_among_those_there_are(name, spec, key, count):
    for _, arrays in sample_inputs(name, spec):
        assert arrays[key].dtype == np.int64
        assert 0 <= arrays[key].min() <= arrays[key].max() < count


def test_contexts_without_a_text_encoder_are_sampled_at_one_and_two_tokens():
    assert [arrays["context"].shape[1] for _, arrays in sample_inputs("unet", CLASSES)] == [1, 2]


@pytest.mark.parametrize("spec", [FIRST_STAGE, SEMANTIC], ids=["alone", "below a UNet"])
def test_a_first_stage_is_sampled_at_two_sizes_of_pictures(spec):
    shapes = [arrays["image"].shape for _, arrays in sample_inputs("vae_encoder", spec)]

    assert shapes == [(1, 3, 64, 64), (3, 3, 64, 96)]
    side = 64 // spec.autoencoder.factor
    small, _ = sample_inputs("vae_decoder", spec)
    assert small[1]["latents"].shape == (1, spec.autoencoder.embed_dim, side, side)
