"""The descendants of the shapes model: what they are given in training, and what they generate."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_runtime.conditioning.images import encode_text_and_masked_image
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolution import resolve
from models.shapes.catalog.variants import VARIANTS
from models.shapes.data import scenes
from models.shapes.data.masks import mask_image
from models.shapes.evaluation import held_out
from models.shapes.evaluation.scores import image_of
from models.shapes.training.variants import config_of, masked_channels
from models.shapes.training.velocity import alphas_cumprod
from tests.torch_generator import TorchGenerator

FOLDER = Path(__file__).parents[2] / "models/shapes"
SHAPES = FOLDER / "shapes.ckpt"
IMAGES, STEPS = 6, 12
MOST_BYTES = 10_000_000


@cache
def opened(name):
    """Open a variant with the rest of the shapes model."""
    return TorchGenerator(FOLDER / f"{name}.ckpt", vae=SHAPES, text_encoder=SHAPES)


@pytest.fixture(scope="module")
def inpainting():
    return opened("shapes_inpainting")


@pytest.fixture(scope="module")
def zero_snr():
    return opened("shapes_zero_snr")


def fields_of(index):
    (*_, scene) = held_out.held_out_scenes(index + 1, held_out.SEED)
    given = {"image": image_of(scene), "mask_image": mask_image(held_out.hole(index))}
    return scene, {"prompt": scenes.caption(scene), **given}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_it_is_what_the_catalog_says_and_small_enough_to_come_along(variant):
    spec, config = opened(variant.name).spec, config_of(variant)

    assert (FOLDER / f"{variant.name}.ckpt").stat().st_size <= MOST_BYTES
    assert (spec.task, spec.unet) == (variant.task, variant.unet)
    assert spec.networks["text_encoder"] == config.text_encoder
    assert spec.defaults.height == config.latent_size * config.autoencoder.factor
    assert {name: getattr(spec.defaults, name) for name in variant.sampling} == variant.sampling
    np.testing.assert_allclose(spec.alphas_cumprod[:-1], alphas_cumprod(variant.noise)[:-1])


def test_in_training_it_is_given_what_the_runtime_gives_it(inpainting):
    generator = inpainting
    _, fields = fields_of(3)
    request = resolve(GenerationRequest(**fields), generator.spec)
    images = torch.from_numpy(fields["image"]).movedim(2, 0)[None] / 127.5 - 1
    masks = torch.from_numpy(fields["mask_image"] > 0)[None, None]

    given = encode_text_and_masked_image(
        generator.networks.__getitem__, generator.tokenizer, request, generator.spec
    ).concat
    trained = masked_channels(
        generator.networks["vae_encoder"].network,
        images,
        masks,
        generator.spec.autoencoder.latent_scale_factor,
    )

    assert given.shape == (1, 5, 16, 16)
    np.testing.assert_allclose(given, trained.numpy(), atol=1e-4)
    assert 0 < given[:, 0].mean() < 1


def test_it_fills_holes_as_captions_say_and_keeps_the_rest(inpainting):
    wanted, images = [], []
    for index in range(IMAGES):
        scene, fields = fields_of(index)
        seed = held_out.SEED + index
        image = inpainting(seed=seed, num_inference_steps=STEPS, **fields).images[0]
        kept = fields["mask_image"] == 0
        assert np.array_equal(np.asarray(image)[kept], fields["image"][kept])
        wanted.append(scene)
        images.append(np.asarray(image))

    tally = held_out.score_all(wanted, images, scenes.FULL)
    holes = held_out.tally_of_holes(wanted, scenes.FULL)

    assert tally.images_right >= IMAGES - 2
    assert holes.images_right < IMAGES - 2
    assert tally.objects_right > holes.objects_right


def test_another_caption_fills_a_hole_with_another_thing(inpainting):
    _, fields = fields_of(0)
    fields |= {"mask_image": np.full((64, 64), 255, np.uint8), "num_inference_steps": STEPS}

    red, blue = (
        np.asarray(
            inpainting(
                **{**fields, "prompt": f"a large {color} circle on a white background", "seed": 1}
            ).images[0]
        ).astype(int)
        for color in ("red", "blue")
    )

    def covered(image, channel):
        others = np.delete(image, channel, axis=2).max(axis=2)
        return ((image[..., channel] - others) > 80).mean()

    assert covered(red, 0) > 0.05 > covered(blue, 0)
    assert covered(blue, 2) > 0.05 > covered(red, 2)


def test_the_marks_of_its_file_say_what_it_predicts_and_that_sampling_begins_with_noise(zero_snr):
    """Its configuration does not: a file that is shared alone says it, too."""
    spec = zero_snr.spec
    stated = {each.field: (each.value, each.source) for each in spec.assumptions}

    assert "parameterization" not in (FOLDER / "shapes_zero_snr.yaml").read_text()
    assert stated["prediction_type"] == ("v_prediction", "file")
    assert stated["alphas_cumprod"] == ("rescaled to zero terminal SNR", "file")
    assert spec.alphas_cumprod[-1] == 2**-24


def test_from_nothing_but_noise_it_generates_what_captions_say(zero_snr):
    wanted = held_out.held_out_scenes(IMAGES, held_out.SEED)
    images = [
        np.asarray(
            zero_snr(
                prompt=scenes.caption(scene),
                seed=held_out.SEED + index,
                num_inference_steps=2 * STEPS,
            ).images[0]
        )
        for index, scene in enumerate(wanted)
    ]

    assert held_out.score_all(wanted, images, scenes.FULL).images_right >= IMAGES - 2
