import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from ldm_export.errors import ExportError, PrecisionError
from ldm_export.graphs.onnx_export import (
    WEIGHTS_FILE,
    round_stored,
    sample_inputs,
    write_graphs,
)
from ldm_export.graphs.parity import MAX_RELATIVE_ERROR, MAX_RELATIVE_L2, Sample, measure
from ldm_export.graphs.precision import NORMALISATIONS
from ldm_export.graphs.torch_engine import TorchEngine
from ldm_export.graphs.weights_file import INLINE_BYTES
from ldm_export.networks.loading import build_network, load_network
from ldm_runtime.bundle.graph_weights import stored_weights
from ldm_runtime.diagnostics.measures import max_relative_error, relative_l2
from ldm_runtime.specs.model import components_of
from tests.export.small_checkpoint import random_networks
from tests.export.small_spec import SPEC

# The quickest networks to trace that have everything: convolutions, both normalisations, attention.
QUICK = SPEC.with_networks(
    autoencoder=dataclasses.replace(SPEC.autoencoder, channel_mult=(1, 1), num_res_blocks=1),
    text_encoder=dataclasses.replace(SPEC.networks["text_encoder"], vocab_size=1000, num_layers=1),
)
FILES = {"fp16": "model.onnx", "fp32": "model.cpu.onnx"}


class Stored:
    def __init__(self, array):
        self.array = array
        self.shape = array.shape

    def numpy(self):
        return self.array


def random_network(name, spec, seed=0):
    """A loaded network with random weights."""
    rng = np.random.default_rng(seed)
    weights = {}
    for parameter, value in build_network(name, spec).named_parameters():
        shape = tuple(value.shape)
        spread = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
        center = 1.0 if len(shape) == 1 and parameter.endswith("weight") else 0.0
        array = rng.normal(center, spread, size=shape).astype(np.float32)
        weights[parameter] = Stored(array)
    return load_network(name, spec, weights)


def export(name, folder):
    """Network as stored, folder and graphs of a quick component."""
    network = random_network(name, QUICK)
    round_stored(network, "float16")
    return network, folder, write_graphs(name, network, QUICK, folder, "float16")


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    return export("text_encoder", tmp_path_factory.mktemp("text_encoder"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return export("vae_decoder", tmp_path_factory.mktemp("vae_decoder"))


@pytest.fixture(params=["text_encoder", "vae_decoder"])
def exported(request, text_encoder, decoder):
    """One after the other, with its name."""
    return request.param, *(text_encoder if request.param == "text_encoder" else decoder)


def run(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))[0]


def samples(name, network, spec, reference=None):
    """What bundle.py measures: torch's outputs on the sample inputs."""
    engine, own = TorchEngine(name, network), TorchEngine(name, reference or network)
    return [
        Sample(size=size, inputs=arrays, expected=own.run(arrays), stored=engine.run(arrays))
        for size, arrays in sample_inputs(name, spec)
    ]


def test_samples_have_two_sizes_and_two_batch_sizes():
    for name, table in components_of(SPEC).items():
        (one, first), (three, second) = sample_inputs(name, SPEC)

        assert (one.batch, three.batch) == (1, 3)
        assert list(first) == [tensor.name for tensor in table.inputs]
        sizes = {(each.height, each.width) for each in (one, three)}
        assert sizes == {(0, 0)} if name == "text_encoder" else len(sizes) == 2
        assert [str(array.dtype) for array in second.values()] == [t.dtype for t in table.inputs]


def test_the_context_is_sampled_at_one_and_two_chunks_of_the_text_encoder():
    samples_of_unet = sample_inputs("unet", SPEC)

    assert [arrays["context"].shape[1] for _, arrays in samples_of_unet] == [77, 154]
    assert [size.context_tokens for size, _ in samples_of_unet] == [77, 154]
    for name in ("text_encoder", "vae_decoder"):
        assert [size.context_tokens for size, _ in sample_inputs(name, SPEC)] == [0, 0]


def test_samples_are_the_same_every_time():
    for (_, first), (_, second) in zip(
        sample_inputs("unet", SPEC), sample_inputs("unet", SPEC), strict=True
    ):
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


def test_both_graphs_are_within_their_bounds(exported):
    name, network, folder, graphs = exported

    records = [
        each
        for graph in graphs
        for each in measure(name, graph, folder, samples(name, network, QUICK))
    ]

    kinds = {(each.variant, each.reference, each.batch) for each in records}
    assert kinds == {
        (variant, reference, batch)
        for batch in (1, 3)
        for variant, reference in (
            ("fp32", "stored"),
            ("fp32", "checkpoint"),
            ("fp16", "checkpoint"),
        )
    }
    for each in records:
        bound = MAX_RELATIVE_ERROR if each.variant == "fp32" else MAX_RELATIVE_L2
        error = each.max_relative_error if each.variant == "fp32" else each.relative_l2
        assert 0 < error <= bound


@pytest.mark.parametrize("variant", FILES)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 3, 2), (2, 5, 3), (5, 7, 16)])
def test_the_decoder_takes_sizes_it_was_never_traced_with(decoder, variant, batch, height, width):
    network, folder, _ = decoder
    inputs = {"latents": np.random.default_rng(0).normal(size=(batch, 4, height, width))}
    inputs = {name: array.astype(np.float32) for name, array in inputs.items()}
    expected = TorchEngine("vae_decoder", network).run(inputs)["image"]

    image = run(folder / FILES[variant], inputs)

    assert image.shape == (batch, 3, 2 * height, 2 * width)
    assert relative_l2(image, expected) <= MAX_RELATIVE_L2


@pytest.mark.parametrize("variant", FILES)
def test_axes_are_those_of_the_table_and_types_are_float32(exported, variant):
    name, _, folder, _ = exported
    table = components_of(SPEC)[name]

    session = onnxruntime.InferenceSession(
        folder / FILES[variant], providers=["CPUExecutionProvider"]
    )

    found = {each.name: each for each in (*session.get_inputs(), *session.get_outputs())}
    assert set(found) == {tensor.name for tensor in (*table.inputs, *table.outputs)}
    for tensor in (*table.inputs, *table.outputs):
        value = found[tensor.name]
        assert value.type == {"float32": "tensor(float)", "int64": "tensor(int64)"}[tensor.dtype]
        for axis, length in zip(tensor.axes, value.shape, strict=True):
            assert length == axis or isinstance(length, int)
    assert found[table.inputs[0].name].shape[0] == "batch"


@pytest.mark.parametrize("variant", FILES)
def test_weights_lie_in_the_file_under_the_names_of_the_parameters(exported, variant):
    _, network, folder, _ = exported
    large = {name for name, value in network.named_parameters() if value.nbytes > INLINE_BYTES}

    proto = onnx.load(folder / FILES[variant], load_external_data=False)

    outside = {each.name for each in proto.graph.initializer if each.external_data}
    assert outside == large


def test_both_graphs_point_to_the_same_bytes(exported):
    _, _, folder, _ = exported
    places = []
    for file in FILES.values():
        proto = onnx.load(folder / file, load_external_data=False)
        places.append(
            {
                each.name: {(entry.key, entry.value) for entry in each.external_data}
                for each in proto.graph.initializer
                if each.external_data
            }
        )

    assert places[0] == places[1]
    assert sorted(path.name for path in folder.iterdir()) == [
        *sorted(FILES.values()),
        "weights.bin",
    ]


def element_types(path):
    """Operator and element types of its floating inputs, for every node of a graph."""
    model = ir.load(path)
    for node in model.graph:
        yield node, {value.dtype for value in node.inputs if value is not None and value.dtype}


def test_the_fp16_graph_computes_in_fp16_but_for_its_islands(exported):
    _, _, folder, _ = exported

    kinds = {}
    for node, types in element_types(folder / "model.onnx"):
        if node.op_type in {"Conv", "MatMul", "Gemm", *NORMALISATIONS}:
            kinds.setdefault(node.op_type, set()).update(types)

    assert len(kinds) >= 2
    for operator, types in kinds.items():
        island = operator in NORMALISATIONS
        assert types == {ir.DataType.FLOAT if island else ir.DataType.FLOAT16}


def test_the_fp32_graph_computes_in_fp32(exported):
    _, _, folder, _ = exported

    for node, types in element_types(folder / "model.cpu.onnx"):
        assert node.op_type == "Cast" or ir.DataType.FLOAT16 not in types


def test_no_engine_has_to_transpose_a_weight(exported):
    _, network, folder, _ = exported
    parameters = {name for name, _ in network.named_parameters()}

    for node, _ in element_types(folder / "model.cpu.onnx"):
        source = node.inputs[0].producer() if node.inputs else None
        cast = source is not None and source.op_type == "Cast"
        name = source.inputs[0].name if cast else node.inputs[0].name if node.inputs else ""
        assert not (node.op_type in {"Transpose", "Unsqueeze"} and name in parameters)


def test_graphs_carry_no_traces_of_where_they_were_made(exported):
    _, _, folder, _ = exported

    for file in FILES.values():
        proto = onnx.load(folder / file, load_external_data=False)
        assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
        assert b"site-packages" not in (folder / file).read_bytes()


def test_frequencies_of_timestep_features_are_not_rounded_with_the_weights(tmp_path):
    """Of models of 160 channels and more they are larger than what stays inline."""

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(320, 4)

        def forward(self, latents, timesteps, context):
            from ldm_export.networks.unet_blocks import timestep_embedding

            features = timestep_embedding(timesteps, 320)
            scale = self.out(features) + context.mean(dim=(1, 2))[:, None]
            return latents * scale[:, :, None, None]

    torch.manual_seed(0)
    network = Features().requires_grad_(False)
    round_stored(network, "float16")

    graphs = write_graphs("unet", network, SPEC, tmp_path, "float16")

    records = measure("unet", graphs[0], tmp_path, samples("unet", network, SPEC))
    assert {each.variant for each in records} == {"fp32"}
    assert max(each.max_relative_error for each in records) <= 1e-5


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_are_rounded_to_what_is_stored(dtype):
    network = nn.Linear(40, 8).requires_grad_(False)
    before = {name: value.clone() for name, value in network.named_parameters()}

    changed = round_stored(network, dtype)

    assert changed == (dtype == "float16")
    rounded = before["weight"].half().float() if changed else before["weight"]
    assert torch.equal(network.weight, rounded)
    assert torch.equal(network.bias, before["bias"])  # small ones stay inline, in float32


def test_weights_that_are_float16_already_do_not_change():
    network = nn.Linear(40, 8).requires_grad_(False)
    network.weight.copy_(network.weight.half())

    assert round_stored(network, "float16") is False


def test_a_weight_beyond_float16_is_named():
    network = nn.Linear(40, 8).requires_grad_(False)
    network.weight[0, 0] = 1e5

    with pytest.raises(PrecisionError, match=r"'weight' reaches 1e\+05, beyond the range of"):
        round_stored(network, "float16")


def test_a_corrupted_weight_stops_the_export(decoder, tmp_path):
    network, folder, graphs = decoder
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[4096 + 100 : 4096 + 200] = bytes(100)
    (tmp_path / "weights.bin").write_bytes(data)

    with pytest.raises(ExportError, match=r"graph of vae_decoder differs from torch: .* more than"):
        measure("vae_decoder", graphs[0], tmp_path, samples("vae_decoder", network, QUICK))


def test_a_graph_over_other_weights_stops_the_export(decoder):
    network, folder, graphs = decoder
    other = random_network("vae_decoder", QUICK, seed=1)

    with pytest.raises(ExportError, match=r"relative L2 error .* lose too much in fp16"):
        measure("vae_decoder", graphs[0], folder, samples("vae_decoder", network, QUICK, other))


def test_outputs_that_are_not_numbers_stop_the_export(decoder):
    network, folder, graphs = decoder
    spoilt = [
        dataclasses.replace(each, stored={"image": each.stored["image"] * np.nan})
        for each in samples("vae_decoder", network, QUICK)
    ]

    with pytest.raises(ExportError, match="differs from torch"):
        measure("vae_decoder", graphs[0], folder, spoilt)


@pytest.mark.parametrize("content", [b"", b"not a graph"])
def test_a_graph_that_does_not_load_is_an_export_error(decoder, tmp_path, content):
    network, _, graphs = decoder
    (tmp_path / "model.cpu.onnx").write_bytes(content)

    with pytest.raises(ExportError, match="ONNX Runtime cannot load"):
        measure("vae_decoder", graphs[0], tmp_path, samples("vae_decoder", network, QUICK))


def test_inputs_that_a_graph_does_not_take_are_an_export_error(decoder):
    network, folder, graphs = decoder
    wrong = [
        dataclasses.replace(each, inputs={"latents": np.zeros((1, 3, 4, 4), np.float32)})
        for each in samples("vae_decoder", network, QUICK)
    ]

    with pytest.raises(ExportError, match="ONNX Runtime cannot run"):
        measure("vae_decoder", graphs[0], folder, wrong)


def test_a_network_that_depends_on_its_values_cannot_be_traced(tmp_path):
    class Fickle(nn.Module):
        def forward(self, latents):
            return latents if float(latents.sum()) > 0 else -latents

    with pytest.raises(ExportError, match="torch cannot trace the vae_decoder"):
        write_graphs("vae_decoder", Fickle(), QUICK, tmp_path, "float16")


def test_tracing_leaves_the_network_as_it_was(tmp_path):
    network = random_network("text_encoder", QUICK)
    before = {name: value.clone() for name, value in network.state_dict().items()}

    write_graphs("text_encoder", network, QUICK, tmp_path, "float32")

    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    proto = onnx.load(tmp_path / "model.cpu.onnx", load_external_data=False)
    assert "Cast" not in {node.op_type for node in proto.graph.node}


@pytest.mark.slow
@pytest.mark.parametrize("variant", FILES)
@pytest.mark.parametrize(
    ("batch", "height", "width", "tokens"), [(1, 2, 4, 77), (2, 6, 10, 308), (4, 16, 4, 1)]
)
def test_the_unet_takes_sizes_it_was_never_traced_with(
    small_bundle_fp32, variant, batch, height, width, tokens
):
    rng = np.random.default_rng(0)
    inputs = {
        "latents": rng.normal(size=(batch, 4, height, width)).astype(np.float32),
        "timesteps": np.linspace(998.6, 3, batch, dtype=np.float32),
        "context": rng.normal(size=(batch, tokens, 64)).astype(np.float32),
    }
    expected = TorchEngine("unet", random_networks().unet).run(inputs)["prediction"]

    prediction = run(small_bundle_fp32 / "unet" / FILES[variant], inputs)

    assert relative_l2(prediction, expected) <= MAX_RELATIVE_L2
    if variant == "fp32":
        assert max_relative_error(prediction, expected) <= MAX_RELATIVE_ERROR


@pytest.fixture(scope="module")
def pooling(tmp_path_factory):
    """A text encoder with a pooled output, as SDXL's second: specification, network and folder."""
    encoder = dataclasses.replace(
        QUICK.networks["text_encoder"],
        kind="openclip",
        num_layers=2,
        context_layers=1,
        final_norm=False,
        pooled_dim=16,
    )
    spec, folder = QUICK.with_networks(text_encoder=encoder), tmp_path_factory.mktemp("pooling")
    network = random_network("text_encoder", spec)
    return spec, network, folder, write_graphs("text_encoder", network, spec, folder, "float32")


def test_an_adapter_finds_the_projection_of_the_pooled_prompt_as_a_linear_layer(pooling):
    """Adapters have the matrix of a linear layer, (out, in); open_clip has the other one."""
    _, network, folder, graphs = pooling
    for graph in graphs:
        stored = stored_weights(folder / FILES[graph.variant])["text_projection"]

        found = stored.read(folder / WEIGHTS_FILE)

        np.testing.assert_array_equal(found, network.text_projection.detach().numpy().T)
        np.testing.assert_array_equal(stored.stored(found), network.text_projection.detach())


def test_of_two_outputs_each_is_compared(pooling):
    """The pooled prompt of SDXL: no error of it may hide behind the context's."""
    spec, network, folder, graphs = pooling
    (graph,) = (each for each in graphs if each.variant == "fp32")
    compared = samples("text_encoder", network, spec)
    assert {*compared[0].expected} == {"context", "pooled"}

    records = measure("text_encoder", graph, folder, compared)

    assert max(record.max_relative_error for record in records) <= MAX_RELATIVE_ERROR
    for name in ("context", "pooled"):
        other = {**compared[0].stored, name: compared[0].stored[name] * 1.01}
        planted = dataclasses.replace(compared[0], stored=other)
        with pytest.raises(ExportError, match="differs from torch"):
            measure("text_encoder", graph, folder, [planted])
