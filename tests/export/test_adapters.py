"""Adapters merged into bundles that were exported: which weights change, and what is refused."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from ldm_runtime import Generator, RequestError
from ldm_runtime.adapters.files import adapter_sha256, read_adapter
from ldm_runtime.adapters.merging import MergedAdapters, read_adapters
from ldm_runtime.backends import choose_backend
from ldm_runtime.backends.onnxruntime import cpu
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.graph_weights import stored_weights
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.cli import main
from ldm_runtime.diagnostics.inspection import inspect
from ldm_runtime.errors import BackendError, BundleError
from ldm_runtime.pipeline.image_files import read_metadata, read_texts
from ldm_runtime.requests.request import parse_request
from tests.export.small_checkpoint import SIZE, random_networks

QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONVOLUTION = "lora_unet_mid_block_resnets_0_conv1"
FEED_FORWARD = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"
FIELDS = {"num_inference_steps": 2, "seed": 1, "height": SIZE, "width": SIZE}
OPTIONS = {"backend": "onnxruntime", "threads": 1}


def query_adapter(path, *, rank=2, strength=1.0):
    """Write an adapter of one matrix of the small model's UNet."""
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((2, rank, 64)).astype(np.float32)
    tensors = {f"{QUERY}.lora_down.weight": down, f"{QUERY}.lora_up.weight": strength * up.T.copy()}
    save_file(tensors, path)
    return path


def difference(path, layer, **tensors):
    save_file({f"{layer}.{name}": array for name, array in tensors.items()}, path)
    return path


@pytest.mark.parametrize("variant", ["fp32", "fp16"])
def test_every_stored_weight_is_the_parameter_of_its_name(small_bundle_fp32, variant):
    manifest, networks = load_manifest(small_bundle_fp32), random_networks()
    compared = 0
    for component in manifest.components:
        parameters = dict(getattr(networks, component.name).named_parameters())
        (graph,) = (each.file for each in component.graphs if each.variant == variant)
        for name, stored in stored_weights(small_bundle_fp32 / graph).items():
            found = stored.read(small_bundle_fp32 / component.weights_file)
            expected = parameters[name].detach().numpy()
            if found.ndim != 3:  # of a norm, with two axes more
                assert found.shape == expected.shape
            np.testing.assert_array_equal(found.ravel(), expected.ravel(), err_msg=name)
            assert stored.stored(expected).shape == stored.shape
            compared += 1
    assert compared > 150


def test_a_graph_that_is_none_is_an_error(tmp_path):
    path = tmp_path / "model.onnx"
    for data in (b"", b"\xff" * 40, b"\x3a\x04abcd"):
        path.write_bytes(data)
        with pytest.raises(BundleError, match=r"model.onnx is not an ONNX graph"):
            stored_weights(path)


def test_an_adapter_changes_its_matrix_and_no_other(small_bundle_fp32, tmp_path):
    manifest = load_manifest(small_bundle_fp32)
    path = query_adapter(tmp_path / "style.safetensors")
    adapters = MergedAdapters(read_adapters({path: 0.5}), small_bundle_fp32, manifest)
    unet = manifest.component("unet")
    graph = small_bundle_fp32 / unet.graphs[0].file
    (before,) = (
        each.read(small_bundle_fp32 / unet.weights_file)
        for name, each in stored_weights(graph).items()
        if name == "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    )
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((2, 2, 64)).astype(np.float32)

    ((name, after),) = adapters.changed_weights(unet, graph).items()

    assert name == "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    np.testing.assert_allclose(after.T, before + 0.5 * up.T @ down, rtol=1e-5, atol=1e-5)
    assert adapters.changed_weights(manifest.component("text_encoder"), graph) == {}
    assert adapters.key != MergedAdapters(read_adapters({path: 1}), small_bundle_fp32, manifest).key


def test_images_say_which_adapters_were_merged(
    small_bundle_fp32, tmp_path, monkeypatch, caplog, capsys
):
    monkeypatch.chdir(tmp_path)
    query_adapter(tmp_path / "style.safetensors", strength=3.0)
    where = ["--bundle", str(small_bundle_fp32), "--backend", "onnxruntime", "--size"]
    where += [f"{SIZE}x{SIZE}", "--steps", "2"]
    adapted = ["--lora", "style.safetensors@0.7"]

    assert main(["generate", "red", *where, *adapted, "-o", "a.png"]) == 0
    assert main(["generate", "red", *where, "-o", "plain.png", "--seed", "0"]) == 0

    image = read_texts(tmp_path / "a.png", "the image")
    assert image.infotext.startswith("red <lora:style:0.7>\n")
    (recorded,) = read_metadata(tmp_path / "a.png")["adapters"]
    assert (recorded["name"], recorded["scale"]) == ("style.safetensors", 0.7)
    with caplog.at_level(logging.WARNING):
        assert main(["generate", "--like", "a.png", *where, "-o", "b.png"]) == 0
    assert "--adapter style.safetensors@0.7 gives it" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert main(["generate", "--like", "a.png", *where, *adapted, "-o", "c.png"]) == 0
    assert not caplog.messages
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    assert main(["generate", "red", *where, *adapted, *adapted]) == 2
    assert "adapter: gives style.safetensors twice" in capsys.readouterr().err


def test_adapters_of_an_image_of_the_web_ui_are_asked_for_by_name(
    small_bundle_fp32, tmp_path, monkeypatch, caplog
):
    """Its text has their names and scales, and no hash of a whole file."""
    monkeypatch.chdir(tmp_path)
    query_adapter(tmp_path / "style.safetensors", strength=3.0)
    info = PngInfo()
    text = "red <lora:style:0.7>\nSteps: 2, Sampler: Euler, CFG scale: 3, Seed: 7, RNG: CPU"
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    like = ["generate", "--like", "a.png", "--bundle", str(small_bundle_fp32)]
    like += ["--backend", "onnxruntime", "--size", f"{SIZE}x{SIZE}"]
    adapted = ["--adapter", "style.safetensors@0.7"]

    with caplog.at_level(logging.WARNING):
        assert main([*like, "-o", "without.png"]) == 0
    assert "with the adapter style at a scale of 0.7, which is not given here" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert main([*like, *adapted, "-o", "with.png"]) == 0
    assert "adapter" not in caplog.text

    assert read_metadata(tmp_path / "with.png")["request"]["prompt"] == "red"
    with Generator(small_bundle_fp32, adapters={"style.safetensors": 0.7}, **OPTIONS) as generator:
        request = read_metadata(tmp_path / "with.png")["request"]
        expected = generator.generate(parse_request(request)).image
    assert Image.open(tmp_path / "with.png").tobytes() == expected.tobytes()


def test_inspect_says_what_an_adapter_is(tmp_path, capsys):
    path = query_adapter(tmp_path / "style.safetensors")

    assert main(["inspect", str(path)]) == 0

    shown = capsys.readouterr().out
    assert "adapter" in shown
    assert inspect(path)["layers"] == {"unet": 1}
    assert inspect(path)["kinds"] == {"LoRA": 1}
    assert inspect(path)["ranks"] == [2]


def test_an_adapter_that_peft_saved_is_known_again(
    small_bundle_fp32, tmp_path, monkeypatch, caplog
):
    """Its hash covers the settings next to it, wherever it is compared."""
    monkeypatch.chdir(tmp_path)
    path = query_adapter(tmp_path / "adapter_model.safetensors")
    settings = tmp_path / "adapter_config.json"
    settings.write_text('{"lora_alpha": 1}')
    assert adapter_sha256(path) == read_adapter(path).sha256 != sha256_of(path)
    where = ["--bundle", str(small_bundle_fp32), "--backend", "onnxruntime"]
    where += ["--size", f"{SIZE}x{SIZE}", "--steps", "2", "--adapter", path.name]
    assert main(["generate", "red", *where, "-o", "a.png"]) == 0

    with caplog.at_level(logging.WARNING):
        assert main(["generate", "--like", "a.png", *where, "-o", "b.png"]) == 0

    assert not caplog.messages
    settings.write_text('{"lora_alpha": 2}')
    with caplog.at_level(logging.WARNING):
        assert main(["generate", "--like", "a.png", *where, "-o", "b.png"]) == 0
    assert "the image will differ" in caplog.text
    settings.unlink()
    assert main(["generate", "--like", "a.png", *where, "-o", "b.png"]) == 2


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (math.nan, "has the scale nan; give a finite number"),
        (math.inf, "has the scale inf; give a finite number"),
        ("strong", "has the scale 'strong'; give a number"),
        (True, "has the scale True; give a number"),
    ],
)
def test_a_scale_that_is_no_number_is_refused(small_bundle_fp32, tmp_path, scale, reason):
    path = query_adapter(tmp_path / "style.safetensors")

    with pytest.raises(RequestError, match=f"adapters: .*style.safetensors {reason}"):
        Generator(small_bundle_fp32, adapters={path: scale}, **OPTIONS)


def test_an_adapter_that_cannot_be_read_is_refused(small_bundle_fp32):
    with pytest.raises(RequestError, match=r"adapters: nowhere.safetensors cannot be read"):
        Generator(small_bundle_fp32, adapters={"nowhere.safetensors": 1.0}, **OPTIONS)


def test_a_layer_under_two_names_is_refused(small_bundle_fp32, tmp_path):
    path = tmp_path / "style.safetensors"
    names = ("mid_block_attentions_0", "middle_block_1")
    tensors = {
        f"lora_unet_{name}_transformer_blocks_0_attn1_to_q.diff": np.ones((64, 64), np.float32)
        for name in names
    }
    save_file(tensors, path)

    with pytest.raises(
        RequestError, match=r"adapters: .*style.safetensors has one layer under two"
    ):
        Generator(small_bundle_fp32, adapters={path: 1.0}, **OPTIONS)


def test_a_weight_beyond_half_precision_is_refused(small_bundle_fp16, small_bundle_fp32, tmp_path):
    path = query_adapter(tmp_path / "style.safetensors", strength=1e6)

    with pytest.raises(RequestError, match=r"adapters: .*to_q.weight: reaches .* of float16"):
        Generator(small_bundle_fp16, adapters={path: 1.0}, **OPTIONS)
    with Generator(small_bundle_fp32, adapters={path: 1.0}, **OPTIONS) as generator:
        assert repr(generator).endswith("onnxruntime in fp32, style.safetensors@1)")


def test_a_weight_inside_a_graph_is_not_left_as_it_is(small_bundle_fp16, tmp_path):
    bias = difference(tmp_path / "bias.safetensors", CONVOLUTION, diff_b=np.ones(64, np.float32))

    with pytest.raises(
        RequestError, match=r"adapters: middle_block.0.in_layers.2.bias is so small"
    ):
        Generator(small_bundle_fp16, adapters={bias: 1.0}, **OPTIONS)


def test_weights_and_biases_take_full_differences(small_bundle_fp32, tmp_path):
    tensors = {"diff": np.zeros((512, 64), np.float32), "diff_b": np.ones(512, np.float32)}
    path = difference(tmp_path / "full.safetensors", FEED_FORWARD, **tensors)
    manifest = load_manifest(small_bundle_fp32)
    unet = manifest.component("unet")
    graph = small_bundle_fp32 / unet.graphs[0].file
    adapters = MergedAdapters(read_adapters({path: 2.0}), small_bundle_fp32, manifest)

    changed = adapters.changed_weights(unet, graph)

    stored = stored_weights(graph)
    layer = "middle_block.1.transformer_blocks.0.ff.net.0.proj"
    weight, bias = f"{layer}.weight", f"{layer}.bias"
    before = {
        name: stored[name].read(small_bundle_fp32 / unet.weights_file) for name in (weight, bias)
    }
    assert changed.keys() == before.keys()
    np.testing.assert_array_equal(changed[weight].T, before[weight])
    np.testing.assert_allclose(changed[bias], before[bias] + 2, rtol=1e-6)


def test_an_engine_with_its_weights_built_in_is_not_chosen(small_bundle_fp32, monkeypatch):
    manifest = load_manifest(small_bundle_fp32)
    monkeypatch.setattr(cpu, "ABILITIES", replace(cpu.ABILITIES, takes_weights=False))

    with pytest.raises(BackendError, match="onnxruntime has its weights built in"):
        choose_backend("onnxruntime", manifest, adapters="merged")
    assert choose_backend("onnxruntime", manifest) == "onnxruntime"


def test_a_shallow_unet_is_changed_as_the_whole_one_is(small_bundle_fp32, tmp_path):
    """It is another graph over the same weights, which lacks the deepest of them."""
    manifest = load_manifest(small_bundle_fp32)
    path = query_adapter(tmp_path / "style.safetensors")
    adapters = MergedAdapters(read_adapters({path: 1.0}), small_bundle_fp32, manifest)
    unet, decoder = manifest.component("unet"), manifest.component("vae_decoder")
    graph, other_graph = (small_bundle_fp32 / each.graphs[0].file for each in (unet, decoder))
    shallow = replace(unet, name="unet_shallow")

    assert adapters.changed_weights(shallow, graph).keys() == {
        "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    }
    assert adapters.changed_weights(shallow, other_graph) == {}
    with pytest.raises(RequestError, match="is so small"):
        adapters.changed_weights(unet, other_graph)
