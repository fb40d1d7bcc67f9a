"""Stable Diffusion 2 for depth: its networks and its pipeline against transformers and diffusers.

diffusers samples the latents of an image, where ours are their mean.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from PIL import Image
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

from ldm_runtime.conditioning.depth import resized
from ldm_runtime.diagnostics.measures import max_relative_error
from tests.export.small_spec import DEPTH_ESTIMATOR
from tests.reference.midas import load_depth_estimator, midas_tensors
from tests.reference.small_families import SD_2, open_folder_networks, open_networks, state_dict
from tests.reference.test_families_reference import (
    COMMON,
    PROMPT,
    SEED,
    SIDE,
    as_arrays,
    diffusers_pipeline,
    generate,
    lowest_psnr,
)

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # diffusers asks for autocast to float32, which is none.
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]

FAMILY = replace(SD_2, unet=replace(SD_2.unet, in_channels=5))
FIELDS = {name: value for name, value in COMMON.items() if name not in ("height", "width")}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(3)
    return {**state_dict(FAMILY), **midas_tensors()}


@pytest.fixture(scope="module")
def theirs(state, tmp_path_factory):
    def depth_pipeline(**parts):
        del parts["safety_checker"], parts["requires_safety_checker"]
        return StableDiffusionDepth2ImgPipeline(
            **parts
            | {
                "depth_estimator": load_depth_estimator(state),
                "feature_extractor": DPTImageProcessorPil(
                    size={"height": DEPTH_ESTIMATOR.side, "width": DEPTH_ESTIMATOR.side}
                ),
            }
        )

    return diffusers_pipeline(depth_pipeline, FAMILY, state, tmp_path_factory.mktemp("twin"))


def photo(width=SIDE, height=SIDE):
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 4 % 256, y * 3, (x * y) % 256], axis=2).astype(np.uint8)
    return Image.fromarray(pixels)


def depth_map(height=48, width=80):
    """Return inverse depth of another size and other proportions than the image's."""
    y, x = np.mgrid[:height, :width]
    return (1000 + 40 * np.hypot(x - 30, y - 20) + 100 * np.sin(x / 5)).astype(np.float32)


def test_the_depth_estimator_sees_the_depth_of_transformers(state):
    twin, ours = load_depth_estimator(state), open_networks(state).network("depth_estimator")
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = twin(image).predicted_depth.numpy()

    depth = ours.run({"image": image.numpy()})["depth"]

    assert expected.std() > 0.1 * expected.mean() > 0
    assert max_relative_error(depth, expected) <= 1e-4


@pytest.mark.parametrize("size", [(16, 16), (48, 96), (7, 5), (96, 120)])
def test_depth_is_resized_as_torch_does(size):
    values = depth_map()
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None].double(), size=size, mode="bicubic"
    )

    assert np.allclose(resized(values, size), expected[0, 0].numpy(), rtol=1e-12)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("size", "fields"),
    [((64, 64), {}), ((96, 64), {"strength": 0.5}), ((64, 64), {"strength": 1.0})],
)
def test_an_image_is_changed_with_its_depth_as_diffusers_does(
    state, theirs, means, given, size, fields
):
    ours, image = open_networks(state), photo(*size)
    depth = {"depth_map": depth_map()} if given else {}
    expected = theirs(
        PROMPT,
        image=image,
        generator=torch.Generator().manual_seed(SEED),
        **({"depth_map": torch.from_numpy(depth_map())[None]} if given else {}),
        **FIELDS,
        **fields,
    )

    images = generate(ours, prompt=PROMPT, image=image, **depth, **FIELDS, **fields)

    assert (ours.spec.family, ours.spec.task) == ("stable-diffusion-2-depth", "depth-to-image")
    assert lowest_psnr(images, as_arrays(expected.images)) >= 60
    flat = np.arange(64.0).reshape(8, 8)
    other = generate(ours, prompt=PROMPT, image=image, depth_map=flat, **FIELDS, **fields)
    assert lowest_psnr(other, as_arrays(expected.images)) < 60


def test_a_depth_map_alone_is_followed_from_noise(state, theirs, means, monkeypatch):
    """diffusers has no such call: here its image is all noise."""
    ours = open_networks(state)
    monkeypatch.setattr(theirs.scheduler, "add_noise", lambda _latents, noise, _timestep: noise)
    expected = theirs(
        PROMPT,
        image=photo(80, 48),
        depth_map=torch.from_numpy(depth_map())[None],
        strength=1.0,
        generator=torch.Generator().manual_seed(SEED),
        **FIELDS,
    )

    images = generate(ours, prompt=PROMPT, depth_map=depth_map(), **FIELDS)

    assert images.shape == (1, 48, 80, 3)
    assert lowest_psnr(images, as_arrays(expected.images)) >= 60


def test_a_checkpoint_without_a_depth_estimator_follows_maps(state, theirs, means):
    pruned = {name: each for name, each in state.items() if not name.startswith("depth_model.")}
    ours, image = open_networks(pruned), photo()
    expected = theirs(
        PROMPT,
        image=image,
        depth_map=torch.from_numpy(depth_map())[None],
        generator=torch.Generator().manual_seed(SEED),
        **FIELDS,
    )

    images = generate(ours, prompt=PROMPT, image=image, depth_map=depth_map(), **FIELDS)

    assert (ours.spec.family, "depth_estimator" in ours.spec.networks) == (
        "stable-diffusion-2-depth",
        False,
    )
    assert lowest_psnr(images, as_arrays(expected.images)) >= 60


def test_a_folder_that_diffusers_saved_sees_the_same_depth(state, theirs, means, tmp_path, compare):
    theirs.save_pretrained(tmp_path)
    ours, image = open_folder_networks(tmp_path), photo(96, 64)
    generator = torch.Generator().manual_seed(SEED)
    expected = theirs(PROMPT, image=image, generator=generator, **FIELDS)

    images = as_arrays(expected.images)
    compare("stable-diffusion-2-depth", ours, images, prompt=PROMPT, image=image, **FIELDS)

    assert ours.spec.networks["depth_estimator"] == DEPTH_ESTIMATOR
