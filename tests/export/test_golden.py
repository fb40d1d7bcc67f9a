import dataclasses
import gc
import logging
import weakref

import numpy as np
import pytest
from PIL import Image

from ldm_export.golden.outputs import golden_folders, write_golden
from ldm_export.golden.requests import golden_requests
from ldm_export.golden.sheet import contact_sheet
from ldm_export.graphs.torch_engine import TorchEngine
from ldm_export.networks.loading import build_network
from ldm_export.steps import vocabulary_of
from ldm_runtime.diagnostics.golden_requests import SHEET_FILE, load_golden_request
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.sizes import latent_size
from ldm_runtime.requests.task_checks import check_needs
from ldm_runtime.specs.model import components_of
from ldm_runtime.specs.tasks import can_guide
from released import random_checkpoints
from released.released_models import MODELS
from tests.export.small_checkpoint import random_networks
from tests.export.small_spec import SPEC
from tests.export.small_systems import SIZE, small_system

FEW_STEPS = 2
VOCABULARY = vocabulary_of(SPEC)
#: One system a task, and a second class-conditional one, which has a null class.
ONE_A_TASK = (
    "celeba256",
    "cin256",
    "cin256-v2",
    "text2img256",
    "layout2img-openimages256",
    "semantic_synthesis256",
    "bsr_sr",
    "inpainting_big",
    "rdm-768",
    "vq-f4",
)
FIELDS = {
    "unconditional": (),
    "class-to-image": ("class_label",),
    "text-to-image": ("prompt",),
    "layout-to-image": ("layout",),
    "semantic-synthesis": ("segmentation",),
    "super-resolution": ("image",),
    "inpainting": ("image",),
    "retrieval": ("embeddings",),
    "autoencoder": ("image",),
}


@pytest.fixture(scope="module")
def networks():
    return vars(random_networks())


@pytest.fixture(scope="module")
def requests():
    return tuple(
        resolve(dataclasses.replace(each.as_request(), num_inference_steps=FEW_STEPS), SPEC)
        for each in golden_requests(SPEC, 10**6)
    )


@pytest.fixture(scope="module")
def golden(networks, requests, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    write_golden(folder, requests, SPEC, VOCABULARY, lambda name: TorchEngine(name, networks[name]))
    return folder, golden_folders(requests)


@pytest.fixture(params=ONE_A_TASK)
def released(request):
    """The spec of a released model; nothing of it is large, because it has no weights."""
    return random_checkpoints.as_spec(MODELS[request.param])


def with_size(height, width):
    defaults = dataclasses.replace(SPEC.defaults, height=height, width=width)
    return dataclasses.replace(SPEC, defaults=defaults)


def test_one_sheet_shows_every_golden_image_whole(golden, requests):
    folder, places = golden
    images = [
        np.asarray(Image.open(folder / place / f"{number}.png"))
        for place, request in zip(places, requests, strict=True)
        for number in range(request.num_images)
    ]

    sheet = np.asarray(Image.open(folder / SHEET_FILE))

    assert len(images) == 4
    height, width = images[0].shape[:2]
    cells = [
        sheet[8 + row * (height + 8) :, 8 + column * (width + 8) :][:height, :width]
        for row in range(2)
        for column in range(2)
    ]
    assert sheet.shape == (2 * (height + 8) + 8, 2 * (width + 8) + 8, 3)
    for cell, image in zip(cells, images, strict=True):
        np.testing.assert_array_equal(cell, image)


def test_a_sheet_has_room_for_the_largest_of_its_images():
    small, large = Image.new("RGB", (3, 9)), Image.new("RGB", (10, 4))

    one, two, five = (contact_sheet([*[small] * count, large]).size for count in (0, 1, 4))

    assert one == (10 + 2 * 8, 4 + 2 * 8)
    assert two == (2 * 10 + 3 * 8, 9 + 2 * 8)
    assert five == (3 * 10 + 4 * 8, 2 * 9 + 3 * 8)


def test_golden_requests_differ_in_what_can_go_wrong():
    requests = golden_requests(SPEC, 10**6)

    assert len(requests) == 3
    assert len({each.sampler for each in requests}) == 3
    assert {each.guidance_scale == 1 for each in requests} == {True, False}
    assert max(each.num_images for each in requests) > 1
    assert any(each.condition.negative_prompt for each in requests)
    assert any(each.eta for each in requests)
    assert 0 in {each.seed for each in requests}


def test_the_golden_requests_of_every_task_have_what_it_needs(released):
    requests = golden_requests(released, 10**6)

    inputs = [
        [getattr(each.as_request(), name) for name in FIELDS[released.task]] for each in requests
    ]
    assert len(requests) == (2 if released.task == "autoencoder" else 3)
    for request in requests:
        check_needs(request.as_request(), released)
        assert resolve(request, released) == request
    for field in zip(*inputs, strict=True):
        assert len(set(map(repr, field))) == len(requests)  # no two are of the same input
    if can_guide(released):
        guided = dataclasses.replace(released.defaults, guidance_scale=3.0)
        requests = golden_requests(dataclasses.replace(released, defaults=guided), 10**6)
        assert [each.guidance_scale for each in requests] == [3.0, 3.0, 1.0]
    else:
        assert {each.guidance_scale for each in requests} == {1.0}


def test_the_inputs_of_golden_requests_are_the_same_every_time(released):
    assert golden_requests(released, 10**6) == golden_requests(released, 10**6)


def test_a_golden_request_of_any_task_reads_back_from_the_bundle_as_it_was(released, tmp_path):
    requests = golden_requests(released, 10**9)[:1]
    networks = Zeros(released)

    write_golden(tmp_path, requests, released, vocabulary_of(released), networks)

    assert resolve(load_golden_request(tmp_path / "golden/0"), released) == requests[0]


class Zeros:
    """Networks of any size that say nothing: outputs of the right shape, all zeros."""

    def __init__(self, spec):
        self.spec, self.asked = spec, []

    def __call__(self, name):
        self.asked.append(name)
        self.name = name
        return self

    def run(self, inputs):
        spec, factor = self.spec, self.spec.autoencoder.factor
        channels = spec.autoencoder.embed_dim
        component = components_of(spec)[self.name]
        (output,), first = component.outputs, inputs[component.inputs[0].name]
        rows, sides = len(first), first.shape[-2:]
        shape = {
            "unet": lambda: (rows, channels, *sides),
            "vae_decoder": lambda: (rows, 3, sides[0] * factor, sides[1] * factor),
            "vae_encoder": lambda: (
                rows,
                channels * (2 if spec.autoencoder.kind == "kl" else 1),
                sides[0] // factor,
                sides[1] // factor,
            ),
            "text_encoder": lambda: (*first.shape, spec.networks["text_encoder"].width),
            "class_embedder": lambda: (rows, 1, spec.networks["class_embedder"].width),
            "segmentation_encoder": lambda: (rows, 3, sides[0] // factor, sides[1] // factor),
        }[self.name]()
        return {output.name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize("name", ONE_A_TASK)
def test_no_network_is_opened_twice(name, tmp_path):
    spec = random_checkpoints.as_spec(MODELS[name])
    networks = Zeros(spec)

    write_golden(tmp_path, golden_requests(spec, 10**9), spec, vocabulary_of(spec), networks)

    assert len(set(networks.asked)) == len(networks.asked)
    assert set(networks.asked) <= components_of(spec).keys()
    assert networks.asked[-1] == "vae_decoder"


@pytest.mark.parametrize(
    ("default", "generated"),
    [((64, 64), (64, 64)), ((512, 768), (256, 256)), ((40, 264), (40, 256))],
)
def test_golden_images_are_at_most_256_pixels_a_side(default, generated):
    requests = golden_requests(with_size(*default), 10**6)

    assert {(each.height, each.width) for each in requests} == {generated}


def test_large_models_draw_few_steps():
    small, large = (golden_requests(SPEC, count) for count in (10**7, 10**9))

    assert large[0].num_inference_steps < small[0].num_inference_steps


def test_large_models_draw_few_latents(released):
    if released.unet is None:
        pytest.skip("what a first stage encodes is not sampled")

    for request in golden_requests(released, 10**9):
        assert max(latent_size(request, released)) <= 32


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
        assert resolve(load_golden_request(folder / name), SPEC) == request


def test_the_same_golden_outputs_come_out_twice(golden, networks, requests, tmp_path):
    folder, names = golden

    write_golden(
        tmp_path, requests[:1], SPEC, VOCABULARY, lambda name: TorchEngine(name, networks[name])
    )

    for path in (folder / names[0]).iterdir():
        assert (tmp_path / names[0] / path.name).read_bytes() == path.read_bytes()


def test_a_first_stage_is_shown_by_latents_and_what_they_become(tmp_path):
    system = small_system("autoencoder")
    engines = {name: engine_of(name, system) for name in ("vae_encoder", "vae_decoder")}
    requests = golden_requests(system.spec, 0)

    write_golden(tmp_path, requests, system.spec, None, engines.__getitem__)

    for name, request in zip(golden_folders(requests), requests, strict=True):
        image = request.source_image.image
        pixels = image.pixels[None].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        latents = engines["vae_encoder"].run({"image": pixels})["moments"]
        (decoded,) = engines["vae_decoder"].run({"latents": latents})["image"]
        with np.load(tmp_path / name / "golden.npz") as arrays:
            np.testing.assert_allclose(arrays["latents"], latents, rtol=1e-4, atol=1e-4)
        with Image.open(tmp_path / name / "0.png") as image:
            wanted = np.clip(decoded / 2 + 0.5, 0, 1).transpose(1, 2, 0) * 255
            np.testing.assert_allclose(np.asarray(image), wanted, atol=1)
    assert requests[0].source_image.size == (SIZE, SIZE)


def engine_of(name, system):
    """A component of a small system in torch."""
    network = build_network(name, system.spec)
    network.load_state_dict(
        {key: system.state[key] for key, _ in network.named_parameters()}, assign=True
    )
    return TorchEngine(name, network)


def test_one_network_is_in_memory_at_a_time(networks, requests, tmp_path):
    alive, most = weakref.WeakSet(), []

    def open_reference(name):
        gc.collect()
        most.append(len(alive))
        engine = TorchEngine(name, networks[name])
        alive.add(engine)
        return engine

    write_golden(tmp_path, requests, SPEC, VOCABULARY, open_reference)

    assert most == [0, 0, 0]


def test_prompts_of_ours_that_are_cut_are_not_the_users_business(
    networks, requests, tmp_path, caplog
):
    text_encoder = dataclasses.replace(SPEC.networks["text_encoder"], max_tokens=8)
    short = SPEC.with_networks(text_encoder=text_encoder)

    with caplog.at_level(logging.WARNING):
        write_golden(
            tmp_path, requests[:1], short, VOCABULARY, lambda n: TorchEngine(n, networks[n])
        )

    assert caplog.records == []
