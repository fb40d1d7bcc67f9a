"""Bundles with the outermost blocks of the UNet as a graph of their own, for feature reuse."""

import shutil
from importlib.util import find_spec

import numpy as np
import pytest

from ldm_export.bundle import estimate_export, export_bundle
from ldm_export.cli import _options, build_parser
from ldm_export.detection.detect import detect
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import ExportError
from ldm_export.networks.loading import build_network, parameter_names
from ldm_export.source import ExportOptions
from ldm_runtime import Generator
from ldm_runtime.diagnostics.measures import psnr
from ldm_runtime.diagnostics.verify import verify
from ldm_runtime.errors import RequestError
from ldm_runtime.quantization.quantize import QuantizationOptions, quantize_bundle
from ldm_runtime.quantization.requests import SampleOptions
from ldm_runtime.specs.model import components_of
from ldm_runtime.specs.networks import UNetSpec
from tests.export.sd_layout import FakeTensor
from tests.export.small_checkpoint import SIZE, random_networks, state_dict
from tests.export.small_systems import small_system
from tests.reference.small_families import open_networks
from tests.reference.small_pipelines import result_of

PROMPT = "a large red circle"
FIELDS = {"num_inference_steps": 4, "seed": 3, "height": SIZE, "width": SIZE}


def options(checkpoint, out, reuse):
    overrides = Overrides(height=SIZE, width=SIZE, reuse=reuse)
    return ExportOptions(checkpoint=checkpoint, out=out, overrides=overrides)


@pytest.fixture(scope="module")
def bundle(small_checkpoint_path, tmp_path_factory, traces):
    out = tmp_path_factory.mktemp("reuse") / "engines"
    with traces.kept():
        export_bundle(options(small_checkpoint_path, out, reuse="default"))
    return out


@pytest.mark.slow
def test_a_bundle_for_reuse_keeps_its_promises_without_torch(bundle):
    checks = list(verify(bundle, backend="onnxruntime"))

    assert all(check.passed for check in checks)
    assert {"unet", "unet_shallow"} <= {check.subject for check in checks}
    with np.load(bundle / "golden/components/unet.npz") as file:
        assert file["out.deep_features"].std() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_its_graphs_reuse_features_as_torch_does(bundle, backend):
    if find_spec(backend) is None:
        pytest.skip(f"needs the extra {backend}")
    torch_networks = open_networks(
        state_dict(random_networks()), overrides=Overrides(height=SIZE, width=SIZE, reuse=1)
    )
    expected = result_of(torch_networks, prompt=PROMPT, reuse="deep:2", sampler="ddim", **FIELDS)
    with Generator(bundle, backend=backend, precision="fp32", threads=1) as generator:
        assert generator.spec.unet.shallow_blocks == 1
        found = generator(PROMPT, reuse="deep:2", sampler="ddim", **FIELDS)
        whole = generator(PROMPT, sampler="ddim", **FIELDS)
        every_call = generator(PROMPT, reuse="deep:1", sampler="ddim", **FIELDS)

    error = np.abs(found.latents - expected.latents).max() / np.abs(expected.latents).max()
    assert error < 0.01  # of weights in half precision
    assert np.abs(whole.latents - expected.latents).max() > 10 * error
    np.testing.assert_array_equal(every_call.latents, whole.latents)


@pytest.mark.slow
def test_networks_that_take_turns_in_memory_reuse_nothing(bundle):
    with (
        Generator(bundle, backend="onnxruntime", threads=1, low_memory=True) as generator,
        pytest.raises(RequestError, match=r"^reuse: does not go with low_memory, which would open"),
    ):
        generator(PROMPT, reuse="deep:2", **FIELDS)


@pytest.mark.slow
def test_its_weights_are_a_part_of_the_whole(bundle):
    sizes = [(bundle / f"{name}/weights.bin").stat().st_size for name in ("unet", "unet_shallow")]

    assert sizes[1] < sizes[0] / 2


def detected(name, reuse):
    tensors = {
        key: FakeTensor(shape=tuple(tensor.shape), values=tensor.numpy())
        for key, tensor in small_system(name).state.items()
    }
    return detect(tensors, overrides=Overrides(height=SIZE, width=SIZE, reuse=reuse))


@pytest.mark.parametrize("name", ["class-guided", "churches", "inpainting", "text-to-image"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_every_family_has_the_weights_of_its_outermost_blocks(name, blocks):
    detection = detected(name, blocks)

    assert set(components_of(detection.spec)) == set(detection.weights)
    assert detection.weights["unet_shallow"].keys() == parameter_names(
        "unet_shallow", detection.spec
    )
    assert detection.weights["unet_shallow"].items() <= detection.weights["unet"].items()


def test_the_outermost_blocks_of_a_call_complete_its_deep_features():
    """In the call that they come from, the shallow network gives what the whole gives."""
    networks = open_networks(
        state_dict(random_networks()), overrides=Overrides(height=SIZE, width=SIZE, reuse=1)
    )
    rng = np.random.default_rng(0)
    inputs = {
        "latents": rng.standard_normal((2, 4, 8, 12), dtype=np.float32),
        "timesteps": np.array([981.0, 17.25], dtype=np.float32),
        "context": rng.standard_normal((2, 5, 64), dtype=np.float32),
    }
    whole = networks.network("unet").run(inputs)
    takes = {each.name for each in components_of(networks.spec)["unet_shallow"].inputs}
    given = {key: each for key, each in {**inputs, **whole}.items() if key in takes}

    shallow = networks.network("unet_shallow").run(given)

    np.testing.assert_allclose(shallow["prediction"], whole["prediction"], rtol=1e-5, atol=1e-6)
    assert whole["prediction"].std() > 0.1


@pytest.mark.parametrize("number", [0, 3])
def test_more_blocks_than_the_first_level_has_are_an_error(number):
    with pytest.raises(
        ExportError,
        match=f"^--reuse-blocks is {number}; the first level of this UNet has 2 blocks on the way "
        "up: give 1 to 2$",
    ):
        detected("class-guided", number)


def test_an_autoencoder_has_no_features_to_reuse():
    with pytest.raises(ExportError, match=r"^--reuse default does not go with this checkpoint"):
        detected("autoencoder", "default")


def test_an_estimate_counts_the_graph(small_checkpoint_path, tmp_path):
    estimate = estimate_export(options(small_checkpoint_path, tmp_path / "engines", reuse=1))

    assert 0 < estimate.parameters["unet_shallow"] < estimate.parameters["unet"]
    assert "unet_shallow" in estimate.describe()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], None), (["--reuse"], "default"), (["--reuse", "--reuse-blocks", "2"], 2)],
)
def test_flags_reach_the_export(flags, expected):
    args = build_parser().parse_args([*flags, "--ckpt", "a.ckpt", "--out", "b"])

    assert _options(args).overrides.reuse == expected


def test_the_shallow_network_has_few_of_the_parameters():
    spec = detected("class-guided", 1).spec

    sizes = [
        sum(each.numel() for each in build_network(name, spec).parameters())
        for name in ("unet", "unet_shallow")
    ]

    assert sizes[1] < sizes[0] / 2
    assert spec.network(UNetSpec).deep_channels == 32


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_both_graphs_can_be_in_8_bits(bundle, backend, tmp_path):
    if find_spec(backend) is None:
        pytest.skip(f"needs the extra {backend}")
    folder = shutil.copytree(bundle, tmp_path / "engines")
    samples = SampleOptions(measured=1, compared=1, steps=3)
    manifest = quantize_bundle(
        folder, QuantizationOptions(backend="onnxruntime", samples=samples, least_psnr=15.0)
    )

    for name in ("unet", "unet_shallow"):
        assert "int8" in {graph.variant for graph in manifest.component(name).graphs}
    images = {}
    for precision in ("fp32", "int8"):
        with Generator(folder, backend=backend, precision=precision, threads=1) as generator:
            for reuse in (None, "deep:2"):
                image = generator(PROMPT, reuse=reuse, **FIELDS).image
                images[precision, reuse] = np.asarray(image)
    assert 15 < psnr(images["int8", "deep:2"], images["fp32", "deep:2"]) < 90
    assert not np.array_equal(images["int8", "deep:2"], images["int8", None])
