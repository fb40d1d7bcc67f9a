"""Texts of AUTOMATIC1111's web UI: strings as it writes them, and those written here."""

import io
import time

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ldm_runtime import GenerationRequest, Generator
from ldm_runtime.adapters.tags import AdapterTag
from ldm_runtime.diagnostics.inspection import inspect
from ldm_runtime.errors import LdmError, RequestError
from ldm_runtime.pipeline.image_files import read_metadata, read_texts, save_image
from ldm_runtime.pipeline.infotext import (
    MAX_CHARACTERS,
    InfotextAdapter,
    InfotextModel,
    infotext_parts,
    model_name,
    read_infotext,
    write_infotext,
)
from ldm_runtime.requests.request import parse_request
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.testing import TINY_SPEC, tiny_spec
from ldm_runtime.text.prompts import unread_syntax

PROMPT = "a large red circle left of a small blue square on a white background"
#: From the web UI: a plain image, one with a quoted value and two passes, one from an image.
PLAIN = f"""{PROMPT}, ((detailed)), [frame]
Negative prompt: blurry, (((deformed))), a dog
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 45dee52b"""
TWO_PASSES = """first line
second line, <lora:thing:0.8>
Negative prompt: ugly
and blurry
Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.5, Seed: 1, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Denoising strength: 0.45, RNG: CPU, \
Hires upscale: 1.5, Hires upscaler: Latent, Lora hashes: "thing: 0123abcd, \\"b\\": 4567", \
Version: v1.10.1"""
FROM_IMAGE = (
    "Steps: 30, Sampler: DPM++ 2M Karras, CFG scale: 7.0, Seed: 3, Size: 64x96, "
    "Variation seed: 9, Variation seed strength: 0.2, Denoising strength: 0.75, Clip skip: 2, "
    "ENSD: 31337, Eta: 0.67, RNG: NV"
)


def text_of(spec=TINY_SPEC, **fields):
    request = resolve(GenerationRequest(**{"prompt": "red", "seed": 7} | fields), spec)
    model = InfotextModel(name="model, v1: a", sha256="0123456789abcdef")
    return write_infotext(request, model=model, refiner=None, version="1.0")


def test_parts_are_as_they_stand_there():
    parts = infotext_parts(TWO_PASSES)

    assert (parts.prompt, parts.negative_prompt) == (
        "first line\nsecond line, <lora:thing:0.8>",
        "ugly\nand blurry",
    )
    assert list(parts.values)[:3] == ["Steps", "Sampler", "Schedule type"]
    assert (parts.values["CFG scale"], parts.values["Size"]) == ("5.5", "512x768")
    assert parts.values["Lora hashes"] == 'thing: 0123abcd, "b": 4567'
    assert infotext_parts("a prompt\nand no more") is None


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_texts_of_a_file_are_those_it_was_written_with(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    save_image(Image.new("RGB", (8, 8)), path, {"seed": 1}, PLAIN, replace=True)

    with path.open("rb") as file:
        texts = read_texts(file, "the image")

    assert texts.infotext == PLAIN
    assert read_metadata(path) == {"seed": 1}
    with pytest.raises(LdmError, match="the page cannot be read as PNG, JPEG or WebP"):
        read_texts(io.BytesIO(b"<html>"), "the page")


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("v1-5-pruned.safetensors", "v1-5-pruned"),
        ("model.v2.ckpt", "model.v2"),
        ("stable-diffusion-v1.5", "stable-diffusion-v1.5"),
    ],
)
def test_a_models_name_is_that_of_its_file_or_its_folder(checkpoint, name):
    assert model_name(checkpoint) == name


def test_adapters_are_named_in_the_prompt_and_by_their_hashes():
    request = resolve(GenerationRequest(prompt="red", negative_prompt="blue", seed=7), TINY_SPEC)
    model = InfotextModel(name="model", sha256="0123456789abcdef")
    adapters = [
        InfotextAdapter(name="my, style:2>", scale=0.7, sha256="ab" * 32),
        InfotextAdapter(name="other", scale=-1.0, sha256="cd" * 32),
    ]

    text = write_infotext(request, model=model, refiner=None, version="1", adapters=adapters)

    prompt, negative, last = text.split("\n")
    assert prompt == "red <lora:my, style2:0.7> <lora:other:-1>"
    assert negative == "Negative prompt: blue"
    assert '"my style2: abababababab, other: cdcdcdcdcdcd"' in last
    read = read_infotext(text)
    assert read.request["prompt"] == "red"
    assert [(each.name, each.scale) for each in read.adapters] == [
        ("my, style2", 0.7),
        ("other", -1.0),
    ]


def test_factors_of_single_networks_stay_in_the_prompt_whose_reader_warns():
    read = read_infotext(PLAIN.replace("((detailed))", "<lora:thing:0.8:0.2>"))

    assert "<lora:thing:0.8:0.2>" in read.request["prompt"]
    assert read.adapters == ()
    assert dict(unread_syntax(read.request["prompt"])) == {
        "an extra network": "<lora:thing:0.8:0.2>"
    }


def test_a_plain_text_is_read():
    read = read_infotext(PLAIN)

    assert read.request == {
        "prompt": f"{PROMPT}, ((detailed)), [frame]",
        "negative_prompt": "blurry, (((deformed))), a dog",
        "num_inference_steps": 20,
        "sampler": "euler_ancestral",
        "guidance_scale": 7.0,
        "seed": 965400086,
        "width": 512,
        "height": 512,
        "noise": "torch-cuda",
    }
    assert read.others == {"Model hash": "45dee52b"}
    assert parse_request(read.request).sampler == "euler_ancestral"


def test_lines_quotes_and_a_second_pass_are_read():
    read = read_infotext(TWO_PASSES)

    assert read.request["prompt"] == "first line\nsecond line,"
    assert read.adapters == (AdapterTag(name="thing", scale=0.8),)
    assert read.request["negative_prompt"] == "ugly\nand blurry"
    assert (read.request["sampler"], read.request["schedule"]) == ("dpmpp_2m", "karras")
    assert (read.request["hires_scale"], read.request["hires_strength"]) == (1.5, 0.45)
    assert "strength" not in read.request
    assert read.request["noise"] == "torch-cpu"
    assert read.others["Lora hashes"] == 'thing: 0123abcd, "b": 4567'
    assert read.others["Version"] == "v1.10.1"


def test_old_names_of_samplers_carry_their_schedule():
    read = read_infotext(FROM_IMAGE)

    assert read.request == {
        "prompt": "",
        "num_inference_steps": 30,
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "guidance_scale": 7.0,
        "seed": 3,
        "width": 64,
        "height": 96,
        "variation_seed": 9,
        "variation_strength": 0.2,
        "strength": 0.75,
        "clip_skip": 1,  # there, 1 is the last layer
        "noise": "torch-cuda",
    }
    assert read.others == {"ENSD": "31337", "Eta": "0.67"}  # DPM++ 2M has none
    assert read_infotext(FROM_IMAGE.replace("DPM++ 2M Karras", "Euler a")).request["eta"] == 0.67


def test_a_second_pass_with_a_size_in_pixels_is_not_read_as_the_strength_of_an_image():
    read = read_infotext(PLAIN + ", Denoising strength: 0.7, Hires resize: 1024x1024, RNG: other")

    assert read.request.keys().isdisjoint({"strength", "hires_strength", "noise"})
    assert (
        read.others.items()
        >= {
            "Denoising strength": "0.7",
            "Hires resize": "1024x1024",
            "RNG": "other",
        }.items()
    )


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        # The web UI 1.10: `samplers_k_diffusion`; without a scheduler there, that of the model.
        ("DPM++ 2M", "karras"),
        ("DPM++ SDE", "karras"),
        ("DPM++ 2S a", "karras"),
        ("DPM2", "karras"),
        ("DPM2 a", "karras"),
        ("DPM++ 2M SDE", "exponential"),
        ("DPM++ 3M SDE", "exponential"),
        ("Euler a", "linspace"),
        ("Euler", "linspace"),
        ("LMS", "linspace"),
        ("Heun", "linspace"),
        ("DDIM", "leading"),
        ("PLMS", "leading"),
        ("LMS Karras", "karras"),
    ],
)
def test_an_automatic_schedule_is_the_one_that_the_web_ui_has_for_the_sampler(sampler, schedule):
    read = read_infotext(
        f"red\nSteps: 20, Sampler: {sampler}, Schedule type: Automatic, Seed: 3, Size: 16x16"
    )

    assert read.request["schedule"] == schedule
    assert read.others == {}


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [("LCM", "Automatic"), ("UniPC", "Automatic"), ("Restart", "Automatic"), ("Euler", "Beta")],
)
def test_a_schedule_of_the_web_ui_that_is_not_here_is_not_repeated(sampler, schedule):
    read = read_infotext(f"red\nSteps: 20, Sampler: {sampler}, Schedule type: {schedule}, Seed: 3")

    assert "schedule" not in read.request
    assert read.others["Schedule type"] == schedule


def test_a_schedule_that_the_web_ui_has_not_is_given_no_name_of_it():
    assert "Schedule type" not in text_of(schedule="beta", num_inference_steps=3)


def test_what_is_not_here_is_said_and_not_guessed():
    read = read_infotext(
        "red\nSteps: 20, Sampler: DPM adaptive, Schedule type: Align Your Steps, Seed: x, Size: 8"
    )

    assert read.request == {"prompt": "red", "num_inference_steps": 20, "noise": "torch-cuda"}
    assert read.others == {
        "Sampler": "DPM adaptive",
        "Schedule type": "Align Your Steps",
        "Seed": "x",
        "Size": "8",
    }


@pytest.mark.parametrize(
    "text", ["", "a prompt alone", "a: b, c: d, e: f", "red\nSteps: 20", "x" * (MAX_CHARACTERS + 1)]
)
def test_other_text_is_not_read(text):
    assert read_infotext(text) is None


def test_a_quotation_mark_that_quotes_nothing_hides_no_value():
    read = read_infotext('red\nBad: "x, Steps: 20, Other: "y: 1, z", Seed: 5, End: "half')

    assert read.request["num_inference_steps"] == 20
    assert read.request["seed"] == 5
    assert read.others == {"Bad": '"x', "Other": "y: 1, z", "End": '"half'}


@pytest.mark.parametrize(
    "line", ['a:"', 'aa: "x,', "aa", "a:", '"\\', " ", ",", "Steps: 1, b: 2, c: 3,"]
)
def test_no_line_takes_long(line):
    started = time.process_time()

    read_infotext(line * (MAX_CHARACTERS // len(line)))

    assert time.process_time() - started < 2


def test_a_text_has_the_values_of_the_request_in_the_order_of_the_web_ui():
    text = text_of(prompt=PROMPT, negative_prompt="blurry", sampler="euler_ancestral", eta=1)

    assert text == (
        f"{PROMPT}\nNegative prompt: blurry\n"
        "Steps: 4, Sampler: Euler a, CFG scale: 3, Seed: 7, Size: 16x16, Model hash: 0123456789, "
        "Model: model v1 a, Eta: 1, RNG: CPU, Version: ldm-deploy 1.0"
    )


def test_guidance_by_an_image_has_the_name_of_the_web_ui():
    spec, image = tiny_spec("image-editing"), np.zeros((16, 16, 3), dtype=np.uint8)

    text = text_of(spec, image=image, image_guidance_scale=1.25)

    assert ", CFG scale: 3, " in text
    assert ", Image CFG scale: 1.25, " in text
    again = text_of(spec, image=image, **read_infotext(text).request)
    assert again == text


def test_a_request_without_a_prompt_has_no_text(bundle_of):
    with Generator(bundle_of("unconditional"), threads=1) as generator:
        request = generator(seed=1).request

    model = InfotextModel(name="", sha256="")
    assert write_infotext(request, model=model, refiner=None, version="") is None


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "two\nlines, (red:1.2) 赤い円"},
        {"negative_prompt": "a: b, c"},
        {"noise": "torch-cuda", "seed": 2**63},
        {"variation_seed": 3, "variation_strength": 0.25},
        {"hires_scale": 2.0, "hires_strength": 0.5},
        {"image": np.zeros((16, 24, 3), dtype=np.uint8), "strength": 0.5},
        {"guidance_scale": 1.25, "num_inference_steps": 7, "schedule": "karras"},
        *({"sampler": name} for name in SAMPLERS),
    ],
)
def test_a_written_text_is_read_as_the_fields_that_it_came_from(fields):
    read = read_infotext(text_of(**fields)).request

    given = {name: value for name, value in fields.items() if name != "image"}
    assert {name: read[name] for name in given} == given


def test_a_text_that_was_read_is_written_again_as_it_was():
    text = text_of(prompt=PROMPT, sampler="dpmpp_2m", schedule="karras", hires_scale=2.0)

    assert text_of(**read_infotext(text).request) == text


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp"])
def test_every_format_says_how_its_image_was_made(tiny_bundle, tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with Generator(tiny_bundle, threads=1) as generator:
        result = generator(f'{PROMPT}, 赤い "円" & <b>', seed=7)

    result.save(path)

    assert read_metadata(path) == result.metadata()
    assert inspect(path, {})["metadata"]["request"]["seed"] == 7
    with Image.open(path) as image:
        assert image.format == {"jpg": "JPEG"}.get(suffix, suffix.upper())
        difference = np.asarray(image).astype(float) - np.asarray(result.image)
        assert np.abs(difference).mean() <= (12 if image.format == "JPEG" else 0)
    with Generator(tiny_bundle, threads=1) as generator:
        assert generator(**read_metadata(path)["request"]).image == result.image


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_other_programs_find_their_text_where_the_web_ui_puts_it(tiny_bundle, tmp_path, suffix):
    with Generator(tiny_bundle, threads=1) as generator:
        generator("rot, größer", seed=7).save(tmp_path / f"a.{suffix}")

    with Image.open(tmp_path / f"a.{suffix}") as image:
        if suffix == "png":
            text = image.text["parameters"]
        else:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert comment[:8] == b"UNICODE\0"  # as piexif writes it, and Exif 2.3 says
            assert b"\x92\x86\0\x07" in image.info["exif"]  # of type UNDEFINED, or piexif fails
            text = comment[8:].decode("utf-16-be")
    assert text.startswith("rot, größer\nSteps: 4, Sampler: DDIM, CFG scale: 3, Seed: 7, Size: 16x")
    assert "Model hash: " in text


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_of_the_web_ui_is_read_as_a_request(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    image = Image.new("RGB", (8, 8))
    if suffix == "png":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", PLAIN)
        image.save(path, pnginfo=info)
    else:
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + PLAIN.encode("utf-16-be")
        image.save(path, exif=exif)

    read = read_metadata(path)
    assert read["request"] == dict(read_infotext(PLAIN).request)
    assert read["adapters"] == []
    assert inspect(path, {})["metadata"]["others"] == {"Model hash": "45dee52b"}


@pytest.mark.parametrize("suffix", ["tiff", "gif", "bmp", "avif", "txt", ""])
def test_other_formats_are_refused_by_name_before_a_folder_is_made(tiny_bundle, tmp_path, suffix):
    path = tmp_path / "new" / (f"a.{suffix}" if suffix else "a")
    with Generator(tiny_bundle, threads=1) as generator:
        result = generator("red")

    with pytest.raises(RequestError, match=r"images are saved as \.png, \.jpg or \.webp"):
        result.save(path)

    assert not path.parent.exists()


def test_metadata_that_a_jpeg_cannot_hold_is_refused_whole(tmp_path):
    with pytest.raises(RequestError, match=r"a\.jpg: the metadata does not fit .*save it as \.png"):
        save_image(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", {"long": "x" * 70_000})

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_an_image_that_says_nothing_is_one_sentence(tmp_path, suffix):
    Image.new("RGB", (8, 8)).save(tmp_path / f"a.{suffix}")

    with pytest.raises(LdmError, match="carries no 'ldm-deploy' metadata, nor 'parameters'"):
        inspect(tmp_path / f"a.{suffix}", {})


def test_text_is_read_without_decoding_a_pixel(tmp_path):
    image = Image.new("RGB", (64, 64))
    save_image(image, tmp_path / "a.png", {"a": 1})
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: data.index(b"IDAT") + 8])

    assert read_metadata(tmp_path / "a.png") == {"a": 1}


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\1\0i\x87\2\0\1\0\0\0a\0\0\0"],
)
def test_damaged_exif_data_is_one_sentence(tmp_path, exif):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)

    with pytest.raises(LdmError, match=r"a\.jpg (carries no|cannot be read)"):
        read_metadata(tmp_path / "a.jpg")


def test_clip_skip_is_counted_from_one_in_the_text():
    written = {
        skip: write_infotext(
            resolve(GenerationRequest("red", seed=1, clip_skip=skip), TINY_SPEC),
            model=InfotextModel(name="m", sha256="0" * 64),
            refiner=None,
            version="1",
        )
        for skip in (0, 1)
    }

    assert "Clip skip: 2" in written[1]
    assert "Clip skip" not in written[0]
    assert read_infotext(written[1]).request["clip_skip"] == 1
    assert read_infotext(f"{written[0]}, Clip skip: 1").request["clip_skip"] == 0
