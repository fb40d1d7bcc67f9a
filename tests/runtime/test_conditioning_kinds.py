"""What every task but text feeds the UNet, against its definition written plainly."""

from dataclasses import replace
from itertools import product
from typing import get_args

import numpy as np
import pytest

from ldm_runtime.conditioning import CONDITIONERS, conditioning_components, encode_conditioning
from ldm_runtime.conditioning.images import augmentation_alphas, augmentation_noise
from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.layouts import layout_tokens
from ldm_runtime.noise import NOISES
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.specs.model import Task, components_of
from ldm_runtime.specs.tasks import takes_prompts
from ldm_runtime.testing import FakeEngine, tiny_networks, tiny_requests, tiny_spec

RNG = np.random.default_rng(3)
PICTURE = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)


def encode(task, spec=None, **fields):
    """Return the conditioning of a request, and the engines that were asked for it."""
    spec = spec or tiny_spec(task)
    asked = {}

    def network(name):
        asked[name] = FakeEngine(tiny_networks(task)[name])
        return asked[name]

    request = resolve(GenerationRequest(**fields), spec)
    return encode_conditioning(network, None, request, spec), asked


def test_every_task_has_a_kind_of_conditioning():
    assert {*CONDITIONERS} == {*get_args(Task)}


@pytest.mark.parametrize(
    "task",
    [task for task in get_args(Task) if not takes_prompts(tiny_spec(task))],
)
def test_only_the_components_that_are_named_are_asked_for_and_what_comes_fits_the_unet(task):
    spec = tiny_spec(task)
    for request in tiny_requests(task):
        request = resolve(request, spec)
        asked = []

        def network(name, asked=asked):
            asked.append(name)
            return FakeEngine(tiny_networks(task)[name])

        found = encode_conditioning(network, None, request, spec)

        assert tuple(asked) == conditioning_components(spec)
        assert {*asked} <= {*components_of(spec)}
        if spec.unet is None:
            assert (found.context, found.concat) == (None, None)
            continue
        assert (found.context is None) == (spec.unet.context_dim is None)
        assert (0 if found.concat is None else found.concat.shape[1]) == spec.unet.concat_channels
        for array in (found.context, found.concat):
            assert array is None or array.dtype == np.float32


def test_a_class_is_its_row_behind_that_of_the_null_class():
    found, asked = encode("class-to-image", class_label=2)
    plain, _ = encode("class-to-image", class_label=2, guidance_scale=1.0)

    labels = asked["class_embedder"].calls[0]["class_labels"]
    assert (labels.dtype, labels.tolist()) == (np.int64, [4, 2])
    assert found.context.shape == (2, 1, 8)
    np.testing.assert_array_equal(found.context[1:], plain.context)


def test_a_class_without_null_class_is_its_row_alone():
    spec = tiny_spec("class-to-image")
    spec = spec.with_networks(
        class_embedder=replace(spec.networks["class_embedder"], null_class=None)
    )

    found, asked = encode("class-to-image", spec, class_label=4)

    assert asked["class_embedder"].calls[0]["class_labels"].tolist() == [4]
    assert found.context.shape == (1, 1, 8)


def test_a_layout_is_steered_away_from_the_layout_without_objects():
    box = {"label": 3, "box": [0.25, 0.0, 1.0, 0.5]}
    record = tiny_spec("layout-to-image").networks["text_encoder"]

    found, asked = encode("layout-to-image", layout=[box])

    [call] = asked["text_encoder"].calls
    (objects,) = [resolve_layout([box])]
    np.testing.assert_array_equal(call["tokens"][0], layout_tokens((), record))
    np.testing.assert_array_equal(call["tokens"][1], layout_tokens(objects, record))
    assert found.context.shape == (2, 11, 8)


def resolve_layout(boxes):
    return GenerationRequest(layout=boxes).layout


def test_embeddings_have_length_one_and_are_steered_away_from_zeros():
    rows = RNG.standard_normal((3, 8)).astype(np.float32) * 7

    found, _ = encode("retrieval", embeddings=rows)
    plain, _ = encode("retrieval", embeddings=rows, guidance_scale=1.0)

    assert found.context.shape == (2, 3, 8)
    assert not found.context[0].any()
    np.testing.assert_allclose(
        found.context[1], rows / np.sqrt((rows**2).sum(axis=1))[:, None], rtol=1e-6
    )
    np.testing.assert_array_equal(found.context[1:], plain.context)


def test_an_embedding_of_zeros_stays_zeros():
    rows = np.zeros((1, 8), dtype=np.float32)

    found, _ = encode("retrieval", embeddings=rows)

    assert not found.context.any()


def test_a_semantic_map_is_given_in_the_size_of_the_picture():
    classes = (np.arange(8)[:, None] // 4 + 3 * (np.arange(8) // 4)).astype(np.uint8)

    found, asked = encode("semantic-synthesis", segmentation=classes, height=16, width=16)

    ids = asked["segmentation_encoder"].calls[0]["segmentation"]
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids[0], np.kron(classes, np.ones((2, 2), dtype=np.uint8)))
    assert found.concat.shape == (1, 3, 8, 8)


def test_an_odd_map_is_padded_on_the_right_and_below_by_its_edge():
    classes = RNG.integers(0, 5, (7, 9), dtype=np.uint8)

    _, asked = encode("semantic-synthesis", segmentation=classes)

    ids = asked["segmentation_encoder"].calls[0]["segmentation"]
    np.testing.assert_array_equal(ids[0], np.pad(classes, ((0, 1), (0, 3)), mode="edge"))


def test_a_picture_to_enlarge_is_itself_from_minus_one_to_one():
    found, _ = encode("super-resolution", image=PICTURE)

    expected = PICTURE.transpose(2, 0, 1)[None] / np.float32(127.5) - 1
    np.testing.assert_allclose(found.concat, expected, rtol=0, atol=1e-7)


def test_an_odd_picture_to_enlarge_is_padded_on_the_right_and_below_by_its_edge():
    found, _ = encode("super-resolution", image=PICTURE[:5, :7])

    inside, _ = encode("super-resolution", image=PICTURE[:4, :6])
    assert found.concat.shape == (1, 3, 6, 8)
    np.testing.assert_array_equal(found.concat[:, :, :4, :6], inside.concat)
    np.testing.assert_array_equal(found.concat[:, :, 5], found.concat[:, :, 4])
    np.testing.assert_array_equal(found.concat[:, :, :, 7], found.concat[:, :, :, 6])


def noise_of(**fields):
    """Return the noise that a picture to enlarge by prompt has, and what is left of the picture."""
    spec = tiny_spec("text-super-resolution")
    request = resolve(GenerationRequest(image=PICTURE, **fields), spec)
    kept = np.sqrt(augmentation_alphas()[request.noise_level])
    return augmentation_noise((1, 3, 24, 32)) * np.sqrt(1 - kept**2), kept


def test_noise_of_a_level_hides_a_picture_to_enlarge():
    hidden = [noise_of(noise_level=level, seed=3) for level in (0, 20, 350)]

    spreads, shares = [noise.std() for noise, _ in hidden], [kept for _, kept in hidden]
    # The schedule of `x4-upscaling.yaml`: 1e-4 to 0.02, linear in the square roots.
    steps = np.linspace(0.01, np.sqrt(0.02), 1000) ** 2
    expected = [np.prod(1 - steps[: level + 1]) for level in (0, 20, 350)]
    np.testing.assert_allclose(np.square(shares), expected, rtol=1e-9)
    np.testing.assert_allclose(np.square(spreads) + np.square(shares), 1, atol=0.05)


def test_that_noise_is_not_the_latents():
    noise = augmentation_noise((1, 3, 24, 32))

    for seed, generator in product((0, 1), NOISES.values()):
        latents = generator(seed).randn((1, 3, 24, 32))
        assert abs(np.corrcoef(latents.ravel(), noise.ravel())[0, 1]) < 0.1


def test_a_noise_level_beyond_what_the_upscaler_knows_is_refused():
    request = GenerationRequest(image=PICTURE, noise_level=351)

    with pytest.raises(RequestError, match=r"noise_level: is 351, but .* knows 0 to 350; lower it"):
        resolve(request, tiny_spec("text-super-resolution"))


def test_a_hole_is_minus_one_in_the_picture_and_one_in_the_mask():
    mask = RNG.integers(0, 256, (24, 32), dtype=np.uint8)

    found, asked = encode("inpainting", image=PICTURE, mask_image=mask)

    # scripts/inpaint.py, line by line: [0, 1], binarise, multiply, then everything to [-1, 1].
    image = PICTURE.transpose(2, 0, 1)[None] / 255.0
    hole = np.where(mask / 255.0 < 0.5, 0.0, 1.0)[None, None]
    masked = (1 - hole) * image * 2 - 1
    np.testing.assert_allclose(asked["vae_encoder"].calls[0]["image"], masked, atol=1e-6)
    latents = tiny_networks("inpainting")["vae_encoder"]({"image": masked.astype(np.float32)})
    np.testing.assert_allclose(found.concat[:, :3], latents["moments"], atol=1e-6)
    np.testing.assert_array_equal(found.concat[:, 3:], (hole * 2 - 1)[:, :, ::2, ::2])
    assert {*np.unique(found.concat[:, 3:])} == {-1.0, 1.0}


def test_the_latents_of_a_picture_with_a_hole_are_not_scaled_as_those_that_are_sampled():
    fields = {"image": PICTURE, "mask_image": np.full((24, 32), 255, dtype=np.uint8)}
    fields["mask_image"][:, 9:] = 0
    spec = tiny_spec("inpainting")
    scaled = spec.with_networks(autoencoder=replace(spec.autoencoder, latent_scale_factor=0.25))

    found, other = (encode("inpainting", each, **fields)[0].concat for each in (spec, scaled))

    np.testing.assert_array_equal(found, other)
    assert np.abs(found[:, :3]).max() > 0.1


def test_what_is_added_around_a_picture_is_a_hole_as_well():
    found, asked = encode("inpainting", image=PICTURE, outpaint=(8, 0, 0, 4))

    seen = asked["vae_encoder"].calls[0]["image"]
    assert seen.shape == (1, 3, 28, 40)
    assert (seen[:, :, :, :8] == -1).all()
    assert (seen[:, :, 24:] == -1).all()
    np.testing.assert_allclose(
        seen[0, :, :24, 8:], PICTURE.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6
    )
    expected = np.ones((14, 20))
    expected[:12, 4:] = -1
    np.testing.assert_array_equal(found.concat[0, 3], expected)


@pytest.mark.parametrize("task", ["unconditional", "autoencoder"])
def test_without_a_condition_there_is_nothing(task):
    fields = {"image": PICTURE} if task == "autoencoder" else {}

    found, asked = encode(task, **fields)

    assert (found.context, found.concat, asked) == (None, None, {})
