"""Image variation: the embedding of an image, with noise, as the vector of the UNet."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ldm_runtime import Generator
from ldm_runtime.conditioning import encode_conditioning, open_tokenizer
from ldm_runtime.conditioning.contract import Conditioning
from ldm_runtime.conditioning.image_embedding import (
    augmented_embeddings,
    clip_pixels,
    embedding_noise,
)
from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.noise import NOISES
from ldm_runtime.pipeline.sampling import sample_latents
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.specs.model import NoiseAugmentation
from ldm_runtime.specs.networks import ImageEncoderSpec
from ldm_runtime.specs.plausible import implausible_fields
from ldm_runtime.testing import FakeEngine, tiny_networks, tiny_spec, write_tiny_bundle

TASK = "image-variation"
SPEC = tiny_spec(TASK)
ENCODER = SPEC.network(ImageEncoderSpec)
PICTURE = np.random.default_rng(3).integers(0, 256, (24, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variation")
    write_tiny_bundle(folder, TASK)
    return folder


def encoded(bundle, **fields):
    """Return a request, its conditioning, and the networks that it asked for."""
    request = resolve(GenerationRequest(image=PICTURE, **{"seed": 7, **fields}), SPEC)
    tokenizer = open_tokenizer(bundle / "tokenizer/merges.txt", SPEC)
    asked = {name: FakeEngine(each) for name, each in tiny_networks(TASK).items()}
    return request, encode_conditioning(asked.__getitem__, tokenizer, request, SPEC), asked


def test_the_vector_is_the_noisy_embedding_and_features_of_the_noise_level(bundle):
    request, found, asked = encoded(bundle, noise_level=500)

    (call,) = asked["image_encoder"].calls
    embedding = tiny_networks(TASK)["image_encoder"](call)["embedding"]
    augmentation = SPEC.noise_augmentation
    kept = augmentation.alphas_cumprod[500]
    noise = embedding_noise(embedding.shape, request.seed)
    noisy = 2.0 * (np.sqrt(kept) * (embedding - 0.5) / 2.0 + np.sqrt(1 - kept) * noise) + 0.5
    angles = 500 / 10_000 ** (np.arange(3) / 3)
    features = np.concatenate([np.cos(angles), np.sin(angles)])
    assert found.image_vectors.shape == (2, 1, 12)
    assert not found.image_vectors[0].any()
    np.testing.assert_allclose(found.image_vectors[1, 0, :6], noisy[0], atol=1e-5)
    np.testing.assert_allclose(found.image_vectors[1, 0, 6:], features, atol=1e-4)


def test_without_guidance_there_are_no_zeros(bundle):
    _, found, _ = encoded(bundle, guidance_scale=1.0, num_images=3)

    assert found.image_vectors.shape == (1, 3, 12)
    assert found.image_vectors.any(axis=2).all()


def test_every_image_has_noise_of_its_own_seed(bundle):
    _, together, _ = encoded(bundle, noise_level=300, num_images=3)

    for index in range(3):
        _, alone, _ = encoded(bundle, noise_level=300, seed=7 + index)
        np.testing.assert_array_equal(together.image_vectors[:, index], alone.image_vectors[:, 0])
    assert len(np.unique(together.image_vectors[1], axis=0)) == 3


def test_the_variations_of_one_noise_have_one_embedding(bundle):
    _, found, _ = encoded(bundle, num_images=2, variation_strength=0.5)

    np.testing.assert_array_equal(found.image_vectors[:, 0], found.image_vectors[:, 1])


def test_that_noise_is_no_noise_of_latents():
    for seed in (0, 1, 7, 2**32, 2**63):
        noise = embedding_noise((1, 1024), seed).ravel()
        for generator in NOISES.values():
            latents = generator(seed).randn((1024,))
            assert abs(np.corrcoef(latents, noise)[0, 1]) < 0.15
    assert np.abs(embedding_noise((1, 10**5), 0).std() - 1) < 0.01


def test_a_batch_has_a_row_for_each_sample_of_each_of_its_images():
    vectors = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    context = np.arange(2 * 4, dtype=np.float32).reshape(2, 4, 1)

    batch = Conditioning(context=context, image_vectors=vectors).of_images(range(1, 4))

    assert batch.image_vectors is None
    np.testing.assert_array_equal(batch.vector, [*vectors[0, 1:4], *vectors[1, 1:4]])
    np.testing.assert_array_equal(batch.context, context[[0, 0, 0, 1, 1, 1]])


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_unet_gets_the_vector_of_each_image(bundle, guidance_scale):
    request, found, asked = encoded(
        bundle, noise_level=300, num_images=3, guidance_scale=guidance_scale
    )
    unet = asked["unet"]

    list(sample_latents(unet, found, request, SPEC, images=range(1, 3)))

    samples = found.image_vectors[:, 1:3]
    for call in unet.calls:
        np.testing.assert_array_equal(call["vector"], samples.reshape(-1, 12))
        assert len(call["latents"]) == len(call["context"]) == len(call["vector"])


def test_an_image_is_the_same_alone_and_among_others(bundle):
    fields = {"image": PICTURE, "noise_level": 400, "prompt": "red"}
    with Generator(bundle) as generator:
        together = generator(**fields, seed=3, num_images=3)
        (parts, _, _) = generator(**fields, seed=3, num_images=3), 0, 0
        alone = generator(**fields, seed=5)
        other = generator(**{**fields, "noise_level": 0}, seed=5)

    np.testing.assert_allclose(together.latents[2], alone.latents[0], atol=1e-5)
    np.testing.assert_array_equal(together.latents, parts.latents)
    assert np.abs(other.latents - alone.latents).max() > 1e-3
    assert alone.images[0].size == (SPEC.defaults.width, SPEC.defaults.height)


def test_images_are_made_of_the_embedding_alone_at_any_size(bundle):
    with Generator(bundle) as generator:
        found = generator(image=PICTURE, seed=1, height=24, width=40)
        larger = generator(image=PICTURE, seed=1, hires_scale=2.0)

    assert found.images[0].size == (40, 24)
    assert larger.images[0].size == (32, 32)


@pytest.mark.parametrize("size", [(8, 8), (32, 24), (24, 32), (9, 31), (4, 6), (100, 37)])
def test_an_image_is_resized_by_its_shorter_side_and_cropped_in_the_middle(size):
    image = Image.fromarray(PICTURE).resize(size)
    short = min(size)
    width, height = 8 * size[0] // short, 8 * size[1] // short
    left, top = (width - 8) // 2, (height - 8) // 2
    square = image.resize((width, height), Image.BICUBIC).crop((left, top, left + 8, top + 8))
    expected = (np.asarray(square) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]

    found = clip_pixels(InputImage.read(image), ENCODER)

    assert (found.shape, found.dtype) == ((1, 3, 8, 8), np.float32)
    np.testing.assert_allclose(found[0], expected.transpose(2, 0, 1), atol=1e-6)


def test_noise_of_level_0_of_a_good_schedule_leaves_the_embedding_as_it_is():
    augmentation = NoiseAugmentation(alphas_cumprod=(1 - 1e-12, 0.1), mean=(3, 4), std=(5, 6))
    embedding = np.array([[1.5, -2.5]], dtype=np.float32)

    found = augmented_embeddings(embedding, np.ones((1, 2), np.float32), 0, augmentation)

    np.testing.assert_allclose(found, [[1.5, -2.5, 1, 0]], atol=1e-4)


def test_an_image_is_needed_and_a_start_means_nothing():
    with pytest.raises(RequestError, match=r"^image: this bundle is image-variation: give image"):
        resolve(GenerationRequest(prompt="a red circle"), SPEC)
    with pytest.raises(RequestError, match=r"^strength: means nothing to this bundle"):
        resolve(GenerationRequest(image=PICTURE, strength=0.5), SPEC)
    with pytest.raises(RequestError, match=r"^mask_image: means nothing to this bundle"):
        resolve(GenerationRequest(image=PICTURE, mask_image=PICTURE), SPEC)


def test_a_noise_level_that_no_model_knows_is_refused():
    with pytest.raises(RequestError, match=r"^noise_level: .*999"):
        GenerationRequest(image=PICTURE, noise_level=1000)
    with pytest.raises(RequestError, match=r"^noise_level: "):
        GenerationRequest(image=PICTURE, noise_level=-1)


def test_a_bundle_that_knows_fewer_noise_levels_says_so():
    few = replace(SPEC.noise_augmentation, alphas_cumprod=SPEC.alphas_cumprod[::2])
    spec = replace(SPEC, noise_augmentation=few)
    request = GenerationRequest(image=PICTURE, noise_level=500)

    with pytest.raises(RequestError, match=r"is 500, but this bundle knows 0 to 499; lower it"):
        resolve(request, spec)
    assert resolve(GenerationRequest(image=PICTURE), spec).noise_level == 0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"mean": (0.0,) * 5}, "noise_augmentation.mean"),
        ({"mean": (float("nan"),) * 6}, "noise_augmentation.mean"),
        ({"std": (0.0,) * 6}, "noise_augmentation.std"),
        ({"alphas_cumprod": (0.1, 0.9)}, "noise_augmentation.alphas_cumprod"),
    ],
)
def test_an_augmentation_of_other_embeddings_is_implausible(changes, field):
    spec = replace(SPEC, noise_augmentation=replace(SPEC.noise_augmentation, **changes))

    assert list(implausible_fields(spec)) == [field]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_heads": 3}, "num_heads"),
        ({"patch_size": 3}, "patch_size"),
        ({"embed_dim": 0}, "embed_dim"),
        ({"pixel_std": (0.0, 1.0, 1.0)}, "pixel_std"),
        ({"pixel_mean": (float("inf"), 1.0, 1.0)}, "pixel_mean"),
    ],
)
def test_an_image_encoder_of_no_model_is_implausible(changes, field):
    spec = SPEC.with_networks(image_encoder=replace(ENCODER, **changes))

    assert f"networks.image_encoder.{field}" in implausible_fields(spec)


def test_an_image_encoder_without_an_augmentation_is_implausible():
    assert list(implausible_fields(replace(SPEC, noise_augmentation=None))) == [
        "noise_augmentation"
    ]
