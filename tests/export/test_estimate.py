import dataclasses

import pytest

from ldm_export.estimate import make_estimate
from ldm_runtime.specs.components import COMPONENTS
from ldm_runtime.specs.model import Assumption, components_of
from tests.export.small_spec import SPEC

PARAMETERS = {"text_encoder": 123e6, "unet": 860e6, "vae_decoder": 50e6, "vae_encoder": 34e6}
STABLE_DIFFUSION = {name: int(count) for name, count in PARAMETERS.items()}


@pytest.mark.parametrize(("dtype", "width"), [("float16", 2), ("float32", 4)])
def test_the_size_of_a_bundle_is_that_of_its_weights(dtype, width):
    estimate = make_estimate(SPEC, STABLE_DIFFUSION, dtype)

    assert estimate.bundle_bytes == pytest.approx(width * sum(STABLE_DIFFUSION.values()), rel=0.01)


def test_every_step_is_estimated():
    estimate = make_estimate(SPEC, STABLE_DIFFUSION, "float16")

    networks = components_of(SPEC)
    assert set(estimate.step_seconds) == {"prediction", "tokenizer", *networks, "preview", "golden"}
    assert all(seconds > 0 for seconds in estimate.step_seconds.values())


def test_every_network_there_is_has_an_estimate():
    estimate = make_estimate(SPEC, dict.fromkeys(COMPONENTS, 1000), "float16")

    assert COMPONENTS.keys() <= estimate.step_seconds.keys()


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("unconditional", "task              unconditional\n"),
        ("layout-to-image", "task              layout-to-image (from layout)\n"),
        ("inpainting", "(from image and mask_image or outpaint)\n"),
    ],
)
def test_an_estimate_says_what_the_model_generates_and_from_what(task, line):
    estimate = make_estimate(dataclasses.replace(SPEC, task=task), STABLE_DIFFUSION, "float16")

    assert line in estimate.describe()
    assert "tokenizer" not in estimate.step_seconds


def test_stable_diffusion_keeps_its_promises():
    estimate = make_estimate(SPEC, STABLE_DIFFUSION, "float16")

    assert estimate.peak_bytes <= 8e9
    assert sum(estimate.step_seconds.values()) <= 5 * 60
    assert estimate.bundle_bytes <= 2.3e9


def test_memory_is_that_of_the_largest_component_alone():
    alone = make_estimate(SPEC, {"unet": 10**9}, "float16")

    with_others = make_estimate(SPEC, {"unet": 10**9, "vae_decoder": 10**9}, "float16")

    assert with_others.peak_bytes == alone.peak_bytes


def test_an_estimate_names_the_family_the_components_and_every_assumption():
    assumption = Assumption(field="unet.num_heads", value="8", source="family")
    spec = dataclasses.replace(SPEC, assumptions=(assumption,))

    text = make_estimate(spec, STABLE_DIFFUSION, "float16").describe()

    assert "stable-diffusion-1 (model weights)" in text
    assert all(name in text for name in components_of(SPEC))
    assert "860.00 M parameters" in text
    assert "unet.num_heads = 8 (from family)" in text
    assert "GB" in text
    assert "s on two cores" in text
