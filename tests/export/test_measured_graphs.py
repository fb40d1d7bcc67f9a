"""Networks that half precision cannot hold, and bundles that do without it."""

import logging
import re
import tracemalloc
from dataclasses import replace

import pytest
import torch

from ldm_export import steps
from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import ExportError
from ldm_export.graphs.parity import MAX_RELATIVE_ERROR, MAX_RELATIVE_L2
from ldm_export.graphs.precision import FP32_ISLANDS, WHOLE_NETWORK
from ldm_export.networks.loading import load_network
from ldm_export.source import ExportOptions, open_source
from ldm_runtime.backends.onnxruntime.tensorrt import PROVIDER, provider_for
from ldm_runtime.engines.build_specs import EngineOptions
from tests.export.small_checkpoint import SIZE, random_networks, write_checkpoint

LOUD = 20_000.0


@pytest.fixture
def build(tmp_path, kept_traces):
    """Export the decoder of a checkpoint alone; return its record and its folder."""

    def run(networks, fp32_components=(), **options):
        path = write_checkpoint(tmp_path / "small.ckpt", networks)
        wanted = ExportOptions(
            checkpoint=path,
            out=tmp_path / "engines",
            overrides=Overrides(height=SIZE, width=SIZE),
            **options,
        )
        with open_checkpoint(path) as checkpoint:
            source = open_source(wanted, checkpoint, hashed=False)
            known = replace(source.detection, fp32_components=frozenset(fp32_components))
            source = replace(source, detection=known)
            record = steps._build_component(source, "vae_decoder", tmp_path)
        return record, tmp_path / "vae_decoder"

    return run


def louden(decoder):
    """Multiply a decoder's residual stream, which its last normalisation divides again."""
    endings = ("conv_in.", ".conv2.", ".proj_out.", ".nin_shortcut.bias", ".upsample.conv.bias")
    for name, parameter in decoder.named_parameters():
        if any(ending in f".{name}" for ending in endings) and "post_quant" not in name:
            parameter.mul_(LOUD)


def test_a_decoder_that_says_nothing_is_exported_with_one_warning(build, caplog):
    networks = random_networks()
    networks.vae_decoder.decoder.conv_out.weight.zero_()

    with caplog.at_level(logging.WARNING):
        record, _ = build(networks)

    assert all(each.relative_l2 < MAX_RELATIVE_L2 for each in record.parity)
    (warning,) = caplog.records
    assert "output of the vae_decoder does not depend on its latents" in warning.message


def test_a_decoder_beyond_half_precision_is_exported_in_fp32_with_one_warning(build, caplog):
    networks = random_networks()
    latents = torch.randn(1, 4, 8, 8)
    before = networks.vae_decoder(latents)
    louden(networks.vae_decoder)
    assert torch.allclose(networks.vae_decoder(latents), before, atol=1e-4)

    with caplog.at_level(logging.WARNING):
        record, folder = build(networks)

    (warning,) = [
        each.message for each in caplog.records if each.name == "ldm_export.graphs.measured"
    ]
    assert "the fp16 graph of vae_decoder overflows: " in warning
    assert "--no-fp16" in warning
    assert record.fp32_islands == (WHOLE_NETWORK,)
    assert {graph.variant: graph.file for graph in record.graphs} == {
        "fp32": "vae_decoder/model.cpu.onnx",
        "fp16": "vae_decoder/model.cpu.onnx",
    }
    assert sorted(path.name for path in folder.iterdir()) == ["model.cpu.onnx", "weights.bin"]
    of_gpus = [each.relative_l2 for each in record.parity if each.variant == "fp16"]
    assert of_gpus
    assert max(of_gpus) <= MAX_RELATIVE_L2
    assert provider_for(record).options["trt_fp16_enable"] == "0"


@pytest.mark.parametrize("fp16", [True, False])
def test_a_decoder_that_is_known_to_overflow_has_one_graph_for_all(build, fp16, caplog):
    with caplog.at_level(logging.WARNING):
        record, folder = build(random_networks(), fp32_components=("vae_decoder",), fp16=fp16)

    file = "vae_decoder/model.cpu.onnx"
    variants = ["fp32", "fp16"] if fp16 else ["fp32"]
    assert [(each.variant, each.file) for each in record.graphs] == [(v, file) for v in variants]
    assert {each.variant for each in record.parity} == set(variants)
    assert record.fp32_islands == ((WHOLE_NETWORK,) if fp16 else ())
    assert sorted(path.name for path in folder.iterdir()) == ["model.cpu.onnx", "weights.bin"]
    warnings = [each.message for each in caplog.records if each.name == "ldm_export.steps"]
    assert len(warnings) == fp16
    assert all("vae_decoder of released models of stable-diffusion-1" in each for each in warnings)
    assert all("force_upcast: false" in each for each in warnings)


def hide(decoder):
    """Give a decoder weights that fp16 rounds to zero, after larger ones: it computes the same."""
    decoder.post_quant_conv.weight[0] *= 1e6
    decoder.post_quant_conv.bias[0] *= 1e6
    decoder.decoder.conv_in.weight[:, 0] /= 1e6


def enlarge(decoder):
    """Give a decoder weights beyond fp16, before smaller ones: it computes the same."""
    attention = decoder.decoder.mid.attn_1
    for parameter in attention.v.parameters():
        parameter *= 1e6
    attention.proj_out.weight /= 1e6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hide, "rounding the weights of vae_decoder to fp16 changes what it computes"),
        (enlarge, r"weight '.*attn_1.v.weight' reaches .*, beyond the range of float16"),
    ],
)
def test_weights_that_fp16_cannot_hold_are_stored_in_fp32_with_one_warning(
    build, change, reason, caplog
):
    networks = random_networks()
    change(networks.vae_decoder)

    with caplog.at_level(logging.WARNING):
        record, folder = build(networks, fp16=False)

    (warning,) = [each.message for each in caplog.records if each.name == "ldm_export.steps"]
    assert re.search(f"{reason}.*; the weights of the vae_decoder are stored in fp32", warning)
    weights = sum(each.nbytes for each in networks.vae_decoder.parameters())
    assert (folder / "weights.bin").stat().st_size > 0.9 * weights
    assert max(each.max_relative_error for each in record.parity) < MAX_RELATIVE_ERROR


def test_weights_that_fp16_cannot_hold_are_read_again_without_a_second_network(tmp_path):
    networks = random_networks()
    enlarge(networks.vae_decoder)
    path = write_checkpoint(tmp_path / "small.ckpt", networks)
    options = ExportOptions(checkpoint=path, out=tmp_path / "engines")
    with open_checkpoint(path) as checkpoint:
        source = open_source(options, checkpoint, hashed=False)
        network = load_network("vae_decoder", source.spec, source.weights("vae_decoder"))
        places = [each.data_ptr() for each in network.parameters()]
        tracemalloc.start()

        dtype, _ = steps._as_stored("vae_decoder", source, network, [], [])

        peak = tracemalloc.get_traced_memory()[1]  # of arrays of NumPy, as weights are read
        tracemalloc.stop()
    exact = networks.vae_decoder.state_dict()
    assert dtype == "float32"
    assert all(torch.equal(each, exact[name]) for name, each in network.named_parameters())
    assert [each.data_ptr() for each in network.parameters()] == places
    assert peak < sum(each.nbytes for each in exact.values()) / 3


def test_a_decoder_within_half_precision_has_an_fp16_graph(build):
    record, folder = build(random_networks())

    assert record.fp32_islands == FP32_ISLANDS
    assert len({graph.file for graph in record.graphs}) == 2
    assert (folder / "model.onnx").exists()
    assert provider_for(record) is PROVIDER


def test_without_fp16_there_is_the_fp32_graph_alone(build):
    record, folder = build(random_networks(), fp16=False)

    assert [graph.variant for graph in record.graphs] == ["fp32"]
    assert {each.variant for each in record.parity} == {"fp32"}
    assert record.fp32_islands == ()
    assert sorted(path.name for path in folder.iterdir()) == ["model.cpu.onnx", "weights.bin"]


def test_a_bundle_for_cpus_shares_no_step_with_one_for_gpus(tmp_path, small_checkpoint_path):
    def key(**options):
        wanted = ExportOptions(checkpoint=small_checkpoint_path, out=tmp_path, **options)
        with open_checkpoint(small_checkpoint_path) as checkpoint:
            return open_source(wanted, checkpoint, hashed=False).key("unet")

    assert key(fp16=False) != key()


@pytest.mark.parametrize("builder", ["auto", "tensorrt", "tensorrt_rtx"])
def test_engines_without_fp16_graphs_are_refused(tmp_path, builder):
    with pytest.raises(ExportError, match=rf"engines \({builder}\) .* --no-fp16 leaves out"):
        ExportOptions(
            checkpoint=tmp_path / "model.ckpt",
            out=tmp_path,
            engines=EngineOptions(builder=builder),
            fp16=False,
        )
