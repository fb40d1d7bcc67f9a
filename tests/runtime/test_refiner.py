"""A second model that makes the last steps of a request."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from ldm_runtime import Generator
from ldm_runtime.bundle.manifest import BuildRecord
from ldm_runtime.cli import main
from ldm_runtime.errors import BackendError, BundleError, RequestError
from ldm_runtime.pipeline.deadline import Deadline
from ldm_runtime.pipeline.image_files import read_metadata
from ldm_runtime.pipeline.image_pipeline import ImagePipeline
from ldm_runtime.pipeline.infotext import InfotextModel, write_infotext
from ldm_runtime.pipeline.open_model import OpenModel, Origin
from ldm_runtime.pipeline.sampling import Step
from ldm_runtime.requests.refiner import check_refiner
from ldm_runtime.requests.request import parse_request
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.resolved import NoRefiner, Refiner
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.testing import TINY_SPEC, FakeEngine, tiny_networks, tiny_spec
from ldm_runtime.text import ClipTokenizer

#: The tiny model with the guidance scale as an input, as latent consistency models have it.
EMBEDDING = TINY_SPEC.with_networks(unet=replace(TINY_SPEC.unet, guidance_dim=8))
PICTURE = np.full((16, 16, 3), 99, dtype=np.uint8)
FIELDS = {"prompt": "red", "seed": 5, "num_inference_steps": 10, "schedule": "trailing"}


class Model:
    """The tiny model over fakes, which says what was opened and which timesteps its UNet saw."""

    def __init__(self, sha256):
        self.engines = {name: FakeEngine(each) for name, each in tiny_networks().items()}
        self.opened = []
        build = BuildRecord(
            checkpoint="model.ckpt",
            checkpoint_sha256=sha256,
            components=(),
            versions={},
            seconds=0.0,
        )
        self.model = OpenModel(
            network=self._open,
            tokenizer=ClipTokenizer([]),
            spec=TINY_SPEC,
            origin=Origin(bundle_sha256=sha256, build=build),
        )

    def _open(self, name):
        self.opened.append(name)
        return self.engines[name]

    @property
    def timesteps(self):
        return [float(call["timesteps"][0]) for call in self.engines["unet"].calls]


def result_of(base, refiner, **fields):
    request = resolve(parse_request(FIELDS | fields), TINY_SPEC, TINY_SPEC)
    pipeline = ImagePipeline(model=base.model, refiner=refiner.model)
    *_, result = pipeline.stream(request, None, Deadline(None), batch_size=1)
    return result


def resolved(spec=TINY_SPEC, refiner=TINY_SPEC, **fields):
    return resolve(parse_request(FIELDS | fields), spec, refiner)


def pixels(result):
    return [image.tobytes() for image in result]


@pytest.mark.parametrize(("fields", "split"), [({}, 8), ({"refiner_start": 0.25}, 3)])
def test_each_model_sees_the_timesteps_that_are_its_own(fields, split):
    base, refiner = Model("a"), Model("b")

    result_of(base, refiner, sampler="euler", **fields)

    steps = [999 - 100 * index for index in range(10)]
    assert base.timesteps == steps[:split]
    assert refiner.timesteps == steps[split:]


def test_a_step_that_calls_twice_asks_each_model_at_its_own_noise_levels():
    base, refiner = Model("a"), Model("b")

    result_of(base, refiner, sampler="heun", refiner_start=0.5)

    assert min(base.timesteps) == 599
    assert max(refiner.timesteps) == 499  # the second call of the step before


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_model_that_refines_itself_makes_the_image_of_one_run(tiny_bundle, sampler):
    fields = {**FIELDS, "sampler": sampler, "num_images": 2}
    with Generator(tiny_bundle, threads=1) as alone:
        expected = pixels(alone(**fields))

    with Generator(tiny_bundle, refiner=tiny_bundle, threads=1) as refined:
        assert pixels(refined(**fields, refiner_start=0.5)) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"image": PICTURE, "strength": 0.6},
        {"image": PICTURE, "mask_image": PICTURE[:, :, 0]},
        {"hires_scale": 2.0},
        {"guidance_scale": 1.0},
        {"negative_prompt": "blue", "guidance_interval": (0.5, 5.0)},
    ],
)
def test_what_steers_a_run_steers_both_models(tiny_bundle, fields):
    fields = FIELDS | fields
    with Generator(tiny_bundle, threads=1) as alone:
        expected = pixels(alone(**fields))

    with Generator(tiny_bundle, refiner=tiny_bundle, threads=1) as refined:
        assert pixels(refined(**fields)) == expected


def test_requests_that_run_together_are_refined_like_those_that_run_alone(tiny_bundle):
    requests = [FIELDS | {"seed": seed, "num_images": 2} for seed in (1, 2, 3)]

    with Generator(tiny_bundle, refiner=tiny_bundle, threads=1) as refined:
        together = [pixels(each) for each in refined.run_many(requests)]

        assert together == [pixels(refined(**each)) for each in requests]


def test_requests_that_run_together_share_the_calls_of_both_models():
    base, refiner = Model("a"), Model("b")
    requests = [resolved(seed=seed, sampler="euler") for seed in (1, 2)]
    requests.append(resolved(seed=3, sampler="euler", refiner_start=0.5))
    pipeline = ImagePipeline(model=base.model, refiner=refiner.model)

    list(pipeline.together(requests, [Deadline(None)] * 3, max_samples=8, min_samples=1))

    def calls(model):
        return [len(call["latents"]) for call in model.engines["unet"].calls]

    assert calls(base) == [6] * 5 + [4] * 3  # two samples per image, with guidance
    assert calls(refiner) == [6] * 2 + [2] * 3  # the third image waits for the other two


def test_the_steps_of_both_models_are_counted_together(tiny_bundle):
    with Generator(tiny_bundle, refiner=tiny_bundle, threads=1) as refined:
        steps = [each for each in refined.stream(**FIELDS) if isinstance(each, Step)]

    assert [(each.index, each.total) for each in steps] == [(i, 10) for i in range(1, 11)]


def test_the_refiner_is_opened_when_it_has_steps_to_make():
    base, refiner = Model("a"), Model("b")

    result_of(base, refiner, refiner_start=1.0)
    assert refiner.opened == []
    result_of(base, refiner, denoising_end=0.5)
    assert "unet" not in refiner.opened
    result_of(base, refiner)

    assert set(refiner.opened) == {"text_encoder", "unet"}  # and no autoencoder


def test_both_models_are_closed_together(tiny_bundle):
    refined = Generator(tiny_bundle, refiner=tiny_bundle, threads=1)
    refined(**FIELDS)
    networks = refined._refiner.networks

    refined.close()

    assert networks.is_closed
    assert repr(refined).startswith(f"Generator({str(tiny_bundle)!r}, refined by ")
    with pytest.raises(BackendError, match="is closed"):
        refined(**FIELDS)


def test_a_result_names_both_bundles_and_where_the_refiner_took_over():
    result = result_of(Model("a"), Model("b"), num_images=2)
    metadata = result.metadata(1)

    assert (metadata["bundle_sha256"], metadata["refiner_sha256"]) == ("a", "b")
    assert metadata["request"]["refiner_start"] == 0.8
    again = resolve(parse_request(metadata["request"]), TINY_SPEC, TINY_SPEC)
    assert again == result.request.of_image(1)


@pytest.mark.parametrize("start", [0.3, 1.0])
def test_a_refined_request_resolves_once_and_for_all(start):
    request = resolved(refiner_start=start)

    assert request.refiner == Refiner(start=start)
    assert resolve(request, TINY_SPEC, TINY_SPEC) == request


def test_without_a_refiner_nothing_is_said_of_one():
    request = resolved(refiner=None)

    assert request.refiner == NoRefiner()
    assert request.as_request().refiner_start is None
    assert "refiner_sha256" not in result_of(Model("a"), Model("b"), refiner_start=1.0).metadata()


def test_other_programs_read_the_refiner_as_the_web_ui_writes_it():
    model, refiner = (InfotextModel(name=name, sha256="01" * 32) for name in ("a", "b: c"))

    text = write_infotext(resolved(), model=model, refiner=refiner, version="1")

    assert ", Refiner: b c [0101010101], Refiner switch at: 0.8, " in text


def test_a_switch_without_a_refiner_is_an_error():
    with pytest.raises(RequestError) as caught:
        resolved(refiner=None, refiner_start=0.8)

    assert str(caught.value) == (
        "refiner_start: means nothing without a refiner; give --refiner, or refiner to Generator(…)"
    )


def test_a_size_that_the_refiner_cannot_take_is_an_error_unless_it_has_nothing_to_do():
    deeper = TINY_SPEC.with_networks(unet=replace(TINY_SPEC.unet, channel_mult=(1, 2, 2)))

    assert resolved(refiner=deeper, height=24).height == 24
    with pytest.raises(RequestError, match=r"^width: 20 is not a multiple of 8, as the refiner"):
        resolved(refiner=deeper, width=20)
    assert resolved(refiner=deeper, width=20, refiner_start=1.0).width == 20


def test_a_pair_takes_the_micro_conditioning_of_either_model():
    def told(count):
        text_encoder = replace(TINY_SPEC.networks["text_encoder"], pooled_dim=8)
        unet = replace(TINY_SPEC.unet, vector_dim=8 + 256 * count)
        return TINY_SPEC.with_networks(unet=unet, text_encoder=text_encoder)

    fields = {"target_size": (32, 32), "aesthetic_score": 8.0}
    request = resolved(told(6), told(5), **fields)

    assert request.passes[0].micro_conditioning.target_size == (32, 32)
    assert request.passes[0].micro_conditioning.aesthetic_score == 8
    assert resolve(request, told(6), told(5)) == request


def test_layers_that_the_refiner_does_not_have_cannot_be_skipped():
    encoder = TINY_SPEC.networks["text_encoder"]
    deep, shallow = (
        TINY_SPEC.with_networks(text_encoder=replace(encoder, num_layers=n, context_layers=n))
        for n in (6, 3)
    )

    assert resolved(deep, None, clip_skip=4).condition.clip_skip == 4
    with pytest.raises(RequestError, match=r"^clip_skip: "):
        resolved(deep, shallow, clip_skip=4)


@pytest.mark.parametrize(
    ("base", "refiner", "message"),
    [
        (tiny_spec("unconditional"), TINY_SPEC, "are text-to-image and unconditional"),
        (TINY_SPEC, tiny_spec("text-inpainting"), "are text-inpainting and text-to-image"),
        (tiny_spec("image-editing"), TINY_SPEC, "are text-to-image and image-editing"),
        (
            TINY_SPEC,
            EMBEDDING,
            "of the refiner takes the guidance scale as an input, and that of the bundle does not",
        ),
        (
            EMBEDDING,
            TINY_SPEC,
            "of the bundle takes the guidance scale as an input, and that of the refiner does not",
        ),
        (
            TINY_SPEC,
            TINY_SPEC.with_networks(autoencoder=replace(TINY_SPEC.autoencoder, embed_dim=3)),
            "has 3 latent channels, and the bundle 4",
        ),
        (
            TINY_SPEC,
            TINY_SPEC.with_networks(
                autoencoder=replace(TINY_SPEC.autoencoder, latent_scale_factor=0.13025)
            ),
            "has 0.13025 as the scale factor of latents, and the bundle 0.5",
        ),
        (
            TINY_SPEC,
            replace(TINY_SPEC, alphas_cumprod=tuple(a**2 for a in TINY_SPEC.alphas_cumprod)),
            "was trained with another noise schedule",
        ),
    ],
)
def test_a_model_that_does_not_fit_cannot_refine(base, refiner, message):
    with pytest.raises(BundleError, match=message):
        check_refiner(base, refiner)


def test_a_schedule_that_was_rounded_fits():
    rounded = tuple(float(np.float32(value)) for value in TINY_SPEC.alphas_cumprod)

    check_refiner(tiny_spec("text-inpainting"), replace(TINY_SPEC, alphas_cumprod=rounded))


def test_models_that_both_take_guidance_as_an_input_fit():
    wider = TINY_SPEC.with_networks(unet=replace(TINY_SPEC.unet, guidance_dim=16))

    check_refiner(EMBEDDING, wider)


def test_a_bundle_that_does_not_fit_is_refused_before_its_networks_are_opened(
    tiny_bundle, bundle_of, capsys
):
    other = bundle_of("class-to-image")

    with pytest.raises(BundleError, match="a refiner is text-to-image"):
        Generator(tiny_bundle, refiner=other)
    status = main(["generate", "red", "--bundle", str(tiny_bundle), "--refiner", str(other)])

    assert status == 1
    assert "a refiner is text-to-image" in capsys.readouterr().err


def test_a_refiner_that_cannot_be_opened_is_named(tiny_bundle, own_bundle):
    (own_bundle / "tokenizer/merges.txt").unlink()

    with pytest.raises(BundleError, match=r"^the refiner: .*merges\.txt"):
        Generator(tiny_bundle, refiner=own_bundle)


def test_the_command_refines_and_repeats_what_it_refined(tiny_bundle, tmp_path, caplog):
    first, again, plain = (tmp_path / name for name in ("first.png", "again.png", "plain.png"))
    pair = ("--bundle", str(tiny_bundle), "--refiner", str(tiny_bundle))

    assert (
        main(["generate", "red", "-s", "7", "--refiner-start", "0.5", *pair, "-o", str(first)]) == 0
    )
    assert main(["generate", "--like", str(first), *pair, "-o", str(again)]) == 0
    assert first.read_bytes() == again.read_bytes()
    assert read_metadata(first)["request"]["refiner_start"] == 0.5

    assert main(["generate", "red", "-s", "7", *pair[:2], "-o", str(plain)]) == 0
    with caplog.at_level(logging.WARNING):
        main(["generate", "--like", str(plain), *pair, "-o", str(again)])
    assert "was generated with no refiner, and not with" in caplog.text


def test_what_was_refined_is_not_repeated_without_a_refiner(tiny_bundle, tmp_path, capsys):
    image, bundle = str(tmp_path / "first.png"), ["--bundle", str(tiny_bundle)]
    main(["generate", "red", *bundle, "--refiner", str(tiny_bundle), "-o", image])

    assert main(["generate", "--like", image, *bundle, "-o", image]) == 2

    assert (
        "refiner_start: means nothing without a refiner; give --refiner" in capsys.readouterr().err
    )
