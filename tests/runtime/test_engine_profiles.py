from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_runtime.engines.profiles import (
    SizeRange,
    component_profiles,
    resolve_shapes,
)
from ldm_runtime.errors import EngineBuildError
from ldm_runtime.specs.model import components_of, size_step
from ldm_runtime.testing import TINY_SPEC, tiny_spec

#: Stable Diffusion 1 as far as shapes go: f = 8, four levels, 77 tokens of 768, 512 pixels.
SD = replace(
    TINY_SPEC.with_networks(
        unet=replace(TINY_SPEC.unet, channel_mult=(1, 2, 4, 4), context_dim=768),
        autoencoder=replace(TINY_SPEC.autoencoder, channel_mult=(1, 2, 4, 4)),
        text_encoder=replace(TINY_SPEC.networks["text_encoder"], max_tokens=77),
    ),
    defaults=replace(TINY_SPEC.defaults, height=512, width=512),
)


def sized(height, width):
    return replace(SD, defaults=replace(SD.defaults, height=height, width=width))


def profile(name, tensor, wanted=None, spec=SD):
    shapes = resolve_shapes(spec, wanted or SizeRange())
    (found,) = (each for each in component_profiles(name, spec, shapes) if each.input == tensor)
    return found.min, found.opt, found.max


def test_by_default_engines_serve_256_pixels_below_to_half_above_and_four_images():
    assert profile("vae_decoder", "latents") == ((1, 4, 32, 32), (1, 4, 64, 64), (4, 4, 96, 96))


def test_guidance_doubles_the_rows_of_the_unet_and_one_row_stays_possible():
    assert profile("unet", "latents") == ((1, 4, 32, 32), (2, 4, 64, 64), (8, 4, 96, 96))
    assert profile("unet", "timesteps") == ((1,), (2,), (8,))


def test_engines_are_made_for_prompts_of_one_chunk_and_serve_four():
    assert profile("unet", "context") == ((1, 77, 768), (2, 77, 768), (8, 308, 768))


def test_only_the_batch_of_the_text_encoder_varies():
    assert profile("text_encoder", "tokens") == ((1, 77), (2, 77), (8, 77))


def test_static_engines_take_one_shape_with_guidance():
    wanted = SizeRange(static=True, opt_size=(512, 768), max_batch=2)

    assert profile("unet", "latents", wanted) == ((4, 4, 64, 96),) * 3
    assert profile("vae_decoder", "latents", wanted) == ((2, 4, 64, 96),) * 3
    assert profile("unet", "context", wanted) == ((4, 77, 768),) * 3
    assert profile("text_encoder", "tokens", wanted) == ((4, 77),) * 3


def test_static_engines_are_for_one_image_unless_told_otherwise():
    assert profile("unet", "latents", SizeRange(static=True)) == ((2, 4, 64, 64),) * 3


@pytest.mark.parametrize(
    ("native", "low", "high"),
    [(1024, 768, 1536), (768, 512, 1152), (256, 128, 384), (64, 64, 64), (320, 192, 448)],
)
def test_default_sizes_are_multiples_of_what_the_unet_halves(native, low, high):
    shapes = resolve_shapes(sized(native, native), SizeRange())

    assert (shapes.min_size, shapes.max_size) == ((low, low), (high, high))


def test_a_range_beside_the_native_size_moves_the_best_size_into_it():
    shapes = resolve_shapes(SD, SizeRange(min_size=(640, 640)))

    assert (shapes.min_size, shapes.opt_size) == ((640, 640), (640, 640))
    assert shapes.max_size == (768, 768)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (SizeRange(min_size=(300, 256)), "min_size: 300 .* multiple of 64; .* 256 and 320"),
        (SizeRange(max_size=(512, 0)), "max_size: 0 .* nearest sizes are 64 and 128"),
        (SizeRange(opt_size=(512, -64)), "opt_size: -64 "),
        (SizeRange(min_size=(768, 768), max_size=(512, 512)), "768x768 .* 512x512"),
        (SizeRange(max_batch=0), "max_batch is 0"),
        (SizeRange(static=True, max_size=(512, 512)), "static engines serve one size"),
    ],
)
def test_an_impossible_range_is_refused_with_its_values(wanted, sentence):
    with pytest.raises(EngineBuildError, match=sentence):
        resolve_shapes(SD, wanted)


@given(
    native=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    batch=st.integers(1, 16),
    static=st.booleans(),
)
def test_every_profile_is_ordered_and_has_the_axes_of_the_component_table(native, batch, static):
    step = size_step(SD)
    spec = sized(native[0] * step, native[1] * step)
    shapes = resolve_shapes(spec, SizeRange(max_batch=batch, static=static))

    for name, component in components_of(spec).items():
        profiles = component_profiles(name, spec, shapes)
        assert [each.input for each in profiles] == [each.name for each in component.inputs]
        for each, tensor in zip(profiles, component.inputs, strict=True):
            axes = list(zip(tensor.axes, each.min, each.opt, each.max, strict=True))
            assert all(0 < low <= opt <= high for _, low, opt, high in axes)
            lengths = [ends for axis, *ends in axes if axis in ("height", "width")]
            assert all(length % 8 == 0 for ends in lengths for length in ends)
            chunks = [ends for axis, *ends in axes if axis == "context_tokens"]
            assert all(ends == [77, 77, 77 if static else 308] for ends in chunks)


def test_an_image_that_guides_as_well_adds_a_row_of_the_unet_alone():
    spec, static = tiny_spec("image-editing"), SizeRange(static=True, max_batch=2)

    assert profile("unet", "latents", spec=spec) == ((1, 8, 4, 4), (3, 8, 8, 8), (12, 8, 12, 12))
    assert profile("text_encoder", "tokens", spec=spec) == ((1, 16), (2, 16), (8, 16))
    assert profile("unet", "timesteps", static, spec=spec) == ((6,),) * 3
    assert profile("text_encoder", "tokens", static, spec=spec) == ((4, 16),) * 3


@pytest.mark.parametrize(
    ("task", "rows"), [("class-to-image", 2), ("layout-to-image", 2), ("unconditional", 1)]
)
def test_models_that_cannot_be_guided_take_one_row_an_image(task, rows):
    spec = tiny_spec(task)
    static = SizeRange(static=True, max_batch=3)

    _, best, most = profile("unet", "timesteps", spec=spec)
    (always,) = {*profile("unet", "timesteps", static, spec=spec)}

    assert (best, most, always) == ((rows,), (4 * rows,), (3 * rows,))


def test_a_class_embedder_without_null_class_cannot_be_guided():
    spec = tiny_spec("class-to-image")
    spec = spec.with_networks(
        class_embedder=replace(spec.networks["class_embedder"], null_class=None)
    )

    assert profile("class_embedder", "class_labels", spec=spec) == ((1,), (1,), (4,))


@pytest.mark.parametrize("task", ["unconditional", "super-resolution", "inpainting"])
def test_a_unet_without_cross_attention_has_no_profile_of_a_context(task):
    spec = tiny_spec(task)

    profiles = component_profiles("unet", spec, resolve_shapes(spec, SizeRange()))

    assert [each.input for each in profiles] == ["latents", "timesteps"]
    assert {each.opt[1] for each in profiles[:1]} == {spec.unet.in_channels}


@pytest.mark.parametrize(
    ("task", "lengths"),
    [("class-to-image", (1, 1, 1)), ("layout-to-image", (11, 11, 11)), ("retrieval", (1, 1, 21))],
)
def test_the_context_is_as_long_as_its_task_makes_it(task, lengths):
    found = profile("unet", "context", spec=tiny_spec(task))

    assert tuple(shape[1] for shape in found) == lengths


def test_enlarging_engines_are_made_for_a_patch_and_serve_any_smaller_picture():
    spec = tiny_spec("super-resolution")

    assert profile("unet", "latents", spec=spec) == (
        (1, 6, 2, 2),
        (1, 6, 128, 128),
        (4, 6, 128, 128),
    )
    assert profile("vae_decoder", "latents", spec=spec)[2] == (4, 3, 128, 128)


def test_a_first_stage_alone_has_engines_too():
    spec = tiny_spec("autoencoder")

    assert profile("vae_encoder", "image", spec=spec) == (
        (1, 3, 8, 8),
        (1, 3, 16, 16),
        (4, 3, 24, 24),
    )
