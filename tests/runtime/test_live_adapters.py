"""Live adapters: the scales that a request has, and files that do not fit."""

import math

import numpy as np
import pytest

from ldm_runtime import GenerationRequest, Generator
from ldm_runtime.adapters.files import read_adapter
from ldm_runtime.adapters.live import LiveAdapters
from ldm_runtime.adapters.merging import read_adapters
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.errors import RequestError
from ldm_runtime.pipeline.deadline import Deadline
from ldm_runtime.pipeline.image_files import read_metadata
from ldm_runtime.pipeline.image_pipeline import ImagePipeline
from ldm_runtime.pipeline.open_model import OpenModel, Origin
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.testing import TINY_SPEC, FakeEngine, tiny_networks
from ldm_runtime.testing.onnx_bytes import Node, encode_model, pack_weights
from ldm_runtime.text import ClipTokenizer
from tests.runtime.adapter_files import safetensors

NAMES = ("a", "b", "c", "d")
WIDTH, CHANNELS = 8, 4


def lora(*, rank=2, width=WIDTH, value=1.0):
    """The bytes of a LoRA of the one layer that the bundle of these tests has."""
    down = np.full((rank, width), value, np.float32)
    up = np.ones((CHANNELS, rank), np.float32)
    return safetensors(
        {"lora_unet_proj.lora_down.weight": down, "lora_unet_proj.lora_up.weight": up}
    )


@pytest.fixture
def bundle(own_bundle):
    """A tiny bundle whose UNet has a linear layer of tokens under a name that adapters know."""
    record = load_manifest(own_bundle).component("unet")
    weights = {"proj.weight": np.ones((WIDTH, CHANNELS), np.float32)}
    nodes = [Node(op="MatMul", inputs=("context", "proj.weight"), output="prediction")]
    graph = encode_model(nodes, record.inputs, record.outputs, weights, {})
    (own_bundle / record.graphs[0].file).write_bytes(graph)
    (own_bundle / record.weights_file).write_bytes(pack_weights(weights)[0])
    return own_bundle


@pytest.fixture
def pipeline(bundle):
    """The tiny model over fakes, with four live adapters."""
    manifest = load_manifest(bundle)
    files = {name: read_adapter(lora(rank=rank)) for rank, name in enumerate(NAMES, start=1)}
    engines = {name: FakeEngine(each) for name, each in tiny_networks().items()}
    model = OpenModel(
        network=engines.__getitem__,
        tokenizer=ClipTokenizer([]),
        spec=TINY_SPEC,
        origin=Origin(bundle_sha256="", build=manifest.build),
        live=LiveAdapters(files, bundle, manifest),
    )
    return ImagePipeline(model=model)


def run_of(pipeline, scales):
    request = resolve(GenerationRequest("red", seed=1, num_inference_steps=2), TINY_SPEC)
    return pipeline.run_of(request, Deadline(None), scales)


def scales_of(run):
    return [each.scale for each in run.model.origin.adapters]


def test_numbers_of_numpy_are_scales_that_an_image_records(pipeline, tmp_path):
    run = run_of(pipeline, {"a": np.float32(0.5), "b": np.int64(-1)})
    *_, images = run.images(range(1))

    run.result([images]).save(tmp_path / "a.png")

    adapters = read_metadata(tmp_path / "a.png")["adapters"]
    assert [each["scale"] for each in adapters] == [0.5, -1]


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        ("0.5", "has the scale '0.5'; give a number, such as 1"),
        (None, "has the scale None; give a number, such as 1"),
        (True, "has the scale True; give a number, such as 1"),
        (np.array([0.5, 1]), r"has the scale array\(\[0.5, 1. \]\); give a number, such as 1"),
        (math.nan, "has the scale nan; give a finite number, such as 1"),
        pytest.param(10**400, "has the scale inf; give a finite number, such as 1", id="huge"),
    ],
)
def test_a_scale_that_is_no_finite_number_is_refused(pipeline, scale, reason):
    with pytest.raises(RequestError, match=f"^adapters: 'a' {reason}$"):
        run_of(pipeline, {"a": scale})


@pytest.mark.parametrize("scale", [1e39, -1e39, 1e308])
def test_a_scale_beyond_the_numbers_of_a_network_is_refused(pipeline, scale):
    with pytest.raises(RequestError) as caught:
        run_of(pipeline, {"a": scale})

    assert str(caught.value) == (
        f"adapters: 'a' has the scale {scale:g}, which makes numbers that are not finite; give a "
        "smaller one, such as 1"
    )
    assert scales_of(run_of(pipeline, {"a": 1e30})) == [1e30]


def test_merged_adapters_take_the_same_numbers():
    merged = read_adapters({lora(rank=1): np.float32(0.5), lora(rank=2): np.int64(1)})

    assert [each.scale for each in merged] == [0.5, 1]
    assert [type(each.scale) for each in merged] == [float, float]


def test_adapters_that_a_request_leaves_out_do_not_count(pipeline):
    with pytest.raises(RequestError, match=r"^adapters: at most 2 go together .*, got 3; leave"):
        run_of(pipeline, {"a": 1.0, "b": 1.0, "c": 0.1, "d": 0.0})

    assert scales_of(run_of(pipeline, {"a": 0.3, "b": 0, "c": 0.1, "d": -0.0})) == [0.3, 0.1]


def test_an_unknown_adapter_is_refused_whatever_its_scale(pipeline):
    for scale in (0.0, 1.0):
        with pytest.raises(
            RequestError, match=r"^adapters: there is no 'x'; there are a, b, c, d$"
        ):
            run_of(pipeline, {"x": scale})


def test_a_generator_without_live_adapters_scales_none(tiny_bundle):
    request = GenerationRequest("red", num_inference_steps=2)

    with Generator(tiny_bundle, threads=1) as generator, generator.open_batch() as batch:
        with pytest.raises(
            RequestError,
            match=r"^adapters: there is no 'style', since this generator has no live adapters; "
            r"give them as live_adapters to Generator\(…\)$",
        ):
            batch.add(request, adapters={"other": 0.0, "style": 0.5})
        with pytest.raises(RequestError, match=r"^adapters: 'style' has the scale 'x'; give a"):
            batch.add(request, adapters={"style": "x"})
        assert len(batch) == 0

        batch.add(request, adapters={"style": 0.0})
        assert len(batch) == 1


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (lora(width=6), "the data: proj.weight: layer .* which does not fit a weight of shape 4x8"),
        (lora(value=math.nan), "the data: proj.weight: layer .* numbers that are not finite"),
        (lora().replace(b"proj", b"mild"), "the data changes 1 layers that this model has not"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error_of_live_adapters(bundle, file, reason):
    with pytest.raises(RequestError, match=f"^live_adapters: {reason}"):
        Generator(bundle, backend="onnxruntime", check_hashes=False, live_adapters={"a": file})
