"""A server whose adapters are inputs of the networks: requests with others share calls."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ldm_runtime import Generator
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.cli import main
from ldm_runtime.diagnostics.measures import psnr
from ldm_runtime.errors import LdmError
from ldm_runtime.pipeline.results import Result
from ldm_runtime.requests.request import parse_request
from ldm_serve.adapters import AdapterUse
from ldm_serve.executors.open_models import OpenModels
from ldm_serve.settings import EngineSettings
from tests.serve.adapter_files import write_lora
from tests.serve.conftest import serving
from tests.serve.test_adapters import FIELDS, generated

pytestmark = pytest.mark.slow

ALIASES = ("engines:style@0.7", "engines:other@-0.3", "engines", "engines:style@0.5+other")
SCALES = ({"style": 0.7}, {"other": -0.3}, {}, {"style": 0.5, "other": 1.0})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: write_lora(folder / f"{name}.safetensors", seed)
        for seed, name in enumerate(("style", "other"))
    }


@pytest.fixture(scope="module")
def flags(files):
    return [word for path in files.values() for word in ("--adapter", str(path))]


@pytest.fixture(scope="module")
def server(small_bundle_fp32, bundle, flags, tmp_path_factory):
    models = (f"engines={small_bundle_fp32}", f"tiny={bundle}")
    with serving(tmp_path_factory.mktemp("s"), *models, *flags, "--live-adapters") as server:
        yield server


@pytest.fixture(scope="module")
def alone(small_bundle_fp32, files):
    """The image of each of the scales, generated without a server and without company."""
    images = []
    with (
        Generator(small_bundle_fp32, threads=1, live_adapters=files) as generator,
        generator.open_batch() as batch,
    ):
        for scales in SCALES:
            batch.add(parse_request({"prompt": "red", "seed": 7, **FIELDS}), adapters=scales)
            while batch:
                events = [event for _, event in batch.advance()]
                images += [each.image.tobytes() for each in events if isinstance(each, Result)]
    return images


def test_requests_with_other_adapters_get_the_bits_of_one_alone(ask, alone):
    with ThreadPoolExecutor(len(ALIASES)) as pool:
        images = list(pool.map(lambda alias: generated(ask, model=alias)[0], ALIASES))

    assert images == alone
    assert len(set(images)) == len(images)


def test_images_are_those_of_merged_adapters(ask, small_bundle_fp32, files):
    image, answer = generated(ask, model="engines:style@0.7")

    adapters = {files["style"]: 0.7}
    with Generator(small_bundle_fp32, threads=1, adapters=adapters) as generator:
        merged = np.asarray(generator("red", seed=7, **FIELDS).image)
    assert psnr(np.frombuffer(image, np.uint8).reshape(merged.shape), merged) > 60
    assert answer.model_extra["ldm"]["adapters"] == [{"name": "style", "scale": 0.7}]


def test_a_model_that_none_fits_is_as_it_was(client):
    body = {"prompt": "red", "model": "tiny", "num_inference_steps": 2, "seed": 1}

    assert client.post("/v1/images/generations", json=body).status_code == 200


def test_a_file_that_changed_is_not_used(ask, files, alone):
    """Adapters are in memory from the start."""
    before = files["other"].read_bytes()
    generated(ask, model="engines")
    try:
        write_lora(files["other"], 5)
        image, _ = generated(ask, model=ALIASES[1])
    finally:
        files["other"].write_bytes(before)

    assert image == alone[1]


def test_a_worker_that_opens_with_another_file_refuses_it(small_bundle_fp32, tmp_path):
    path = write_lora(tmp_path / "style.safetensors", 0)
    settings = EngineSettings(
        backend="onnxruntime", threads=1, adapters={"style": path}, live_adapters=True
    )
    use = AdapterUse(name="style", sha256=sha256_of(path), scale=1.0)
    write_lora(path, 5)

    with OpenModels({"engines": small_bundle_fp32}, settings) as models:
        opened = models.open("engines", [use])

        with pytest.raises(LdmError, match="the file of the adapter 'style' has changed"):
            opened.scales([use])
        assert opened.scales([]) == {}


def test_a_file_that_is_gone_leaves_the_others(small_bundle_fp32, tmp_path, caplog):
    path = write_lora(tmp_path / "style.safetensors", 0)
    gone = tmp_path / "gone.safetensors"
    settings = EngineSettings(
        backend="onnxruntime",
        threads=1,
        adapters={"style": path, "gone": gone},
        live_adapters=True,
    )

    with OpenModels({"engines": small_bundle_fp32}, settings) as models:
        opened = models.open("engines")

        assert list(opened.generator.live_adapters.files) == ["style"]
    assert "the adapter 'gone' is left out" in caplog.text


def test_a_batch_has_them(small_bundle_fp32, flags, alone, tmp_path):
    line = {"prompt": "red", "seed": 7, "adapters": "style@0.7", **FIELDS}
    (tmp_path / "requests.jsonl").write_text(json.dumps(line))
    command = ["batch", tmp_path / "requests.jsonl", "--out", tmp_path / "out", *flags]
    command += ["--bundle", small_bundle_fp32, "--live-adapters", "--threads", "1", "--quiet"]

    assert main(list(map(str, command))) == 0

    (image,) = (tmp_path / "out").rglob("*.png")
    assert Image.open(image).tobytes() == alone[0]
