import dataclasses
import gc
import logging
import weakref

import msgspec
import numpy as np
import pytest
from PIL import Image

from ldm_export.bundle import VOCABULARY
from ldm_export.golden import PROMPTS, golden_requests, write_golden
from ldm_export.reference import TorchEngine
from ldm_runtime.request import parse_request
from ldm_runtime.resolution import resolve
from tests.export.small_checkpoint import random_networks
from tests.export.small_spec import SPEC

FEW_STEPS = 2


@pytest.fixture(scope="module")
def networks():
    return vars(random_networks())


@pytest.fixture(scope="module")
def requests():
    return tuple(
        dataclasses.replace(each, num_inference_steps=FEW_STEPS)
        for each in golden_requests(SPEC, 10**6)
    )


@pytest.fixture(scope="module")
def golden(networks, requests, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    names = write_golden(
        folder, requests, SPEC, VOCABULARY, lambda name: TorchEngine(name, networks[name])
    )
    return folder, names


def with_size(height, width):
    defaults = dataclasses.replace(SPEC.defaults, height=height, width=width)
    return dataclasses.replace(SPEC, defaults=defaults)


def test_golden_requests_differ_in_what_can_go_wrong():
    requests = golden_requests(SPEC, 10**6)

    assert len(requests) == len(PROMPTS) == 3
    assert len({each.sampler for each in requests}) == 3
    assert {each.guidance_scale == 1 for each in requests} == {True, False}
    assert max(each.num_images for each in requests) > 1
    assert any(each.negative_prompt for each in requests)
    assert any(each.eta for each in requests)
    assert 0 in {each.seed for each in requests}


@pytest.mark.parametrize(
    ("default", "drawn"),
    [((64, 64), (64, 64)), ((512, 768), (256, 256)), ((40, 264), (40, 256))],
)
def test_golden_images_are_at_most_256_pixels_a_side(default, drawn):
    requests = golden_requests(with_size(*default), 10**6)

    assert {(each.height, each.width) for each in requests} == {drawn}


def test_large_models_draw_few_steps():
    small, large = (golden_requests(SPEC, count) for count in (10**7, 10**9))

    assert large[0].num_inference_steps < small[0].num_inference_steps


def test_every_request_comes_with_its_latents_and_images(golden, requests):
    folder, names = golden

    assert names == ("golden/0", "golden/1", "golden/2")
    for name, request in zip(names, requests, strict=True):
        with np.load(folder / name / "golden.npz") as arrays:
            assert arrays["latents"].shape == (request.num_images, 4, 16, 16)
            assert arrays["latents"].dtype == np.float32
            assert np.isfinite(arrays["latents"]).all()
        for index in range(request.num_images):
            with Image.open(folder / name / f"{index}.png") as image:
                assert image.size == (64, 64)
                assert np.asarray(image).std() > 1
        assert not (folder / name / f"{request.num_images}.png").exists()


def test_a_written_request_reads_back_as_it_was(golden, requests):
    folder, names = golden

    for name, request in zip(names, requests, strict=True):
        fields = msgspec.json.decode((folder / name / "request.json").read_bytes())

        assert resolve(parse_request(fields), SPEC) == request


def test_the_same_golden_outputs_come_out_twice(golden, networks, requests, tmp_path):
    folder, names = golden

    write_golden(
        tmp_path, requests[:1], SPEC, VOCABULARY, lambda name: TorchEngine(name, networks[name])
    )

    for path in (folder / names[0]).iterdir():
        assert (tmp_path / names[0] / path.name).read_bytes() == path.read_bytes()


def test_one_network_is_in_memory_at_a_time(networks, requests, tmp_path):
    alive, most = weakref.WeakSet(), []

    def open_reference(name):
        gc.collect()
        most.append(len(alive))
        engine = TorchEngine(name, networks[name])
        alive.add(engine)
        return engine

    write_golden(tmp_path, requests[:1], SPEC, VOCABULARY, open_reference)

    assert most == [0, 0, 0]


def test_prompts_of_ours_that_are_cut_are_not_the_users_business(
    networks, requests, tmp_path, caplog
):
    text_encoder = dataclasses.replace(SPEC.text_encoder, max_tokens=8)
    short = dataclasses.replace(SPEC, text_encoder=text_encoder)

    with caplog.at_level(logging.WARNING):
        write_golden(
            tmp_path, requests[:1], short, VOCABULARY, lambda n: TorchEngine(n, networks[n])
        )

    assert caplog.records == []
