"""What people type after `ldm generate`: names of files, standard input, aliases, repetition."""

import io
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ldm_runtime.bundle.manifest import MANIFEST_NAME, encode_manifest, load_manifest
from ldm_runtime.cli.commands import build_parser, main
from ldm_runtime.cli.flags import given_fields
from ldm_runtime.cli.request_lines import read_requests
from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.pipeline.image_files import read_metadata, save_image
from ldm_runtime.requests.request import FIELDS
from ldm_runtime.testing import TINY_SPEC
from tests.runtime.task_cases import PICTURE


@pytest.fixture
def generate(tiny_bundle, tmp_path, monkeypatch):
    """Runs `ldm generate` in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return main(["generate", "--bundle", str(tiny_bundle), *map(str, arguments)])

    return run


@pytest.fixture
def type_in(monkeypatch):
    """Types text into standard input."""

    def write(text):
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return write


def asked(*arguments):
    """The resolved requests of a command line."""
    return read_requests(build_parser().parse_args(["generate", *map(str, arguments)]), TINY_SPEC)


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def test_every_field_of_a_request_has_a_flag_and_no_default():
    (command,) = (
        action.choices["generate"] for action in build_parser()._actions if action.dest == "command"
    )

    assert set(FIELDS) <= {action.dest for action in command._actions}
    assert set(FIELDS).isdisjoint(vars(build_parser().parse_args(["generate", "red"])))


def test_short_names_and_those_of_other_programs_mean_the_same_field(tmp_path):
    for name in ("photo.png", "mask.png"):
        Image.fromarray(PICTURE[:16, :16]).save(tmp_path / name)
    image, mask = tmp_path / "photo.png", tmp_path / "mask.png"

    (short,) = asked(
        *("-p", "red", "-s", 7, "-n", 2, "--cfg-scale", 4, "--steps", 3),
        *("-i", image, "--mask", mask, "--sampler", "Euler a"),
    )
    (long,) = asked(
        *("red", "--seed", 7, "--num-images", 2, "--guidance-scale", 4),
        *("--num-inference-steps", 3, "--image", image, "--mask-image", mask),
        *("--sampler", "euler_ancestral"),
    )

    assert short == long


def test_a_size_is_width_times_height():
    (sized,) = asked("red", "--size", "32x24", "-s", 1)
    (apart,) = asked("red", "-W", 32, "-H", 24, "-s", 1)

    (square,) = asked("red", "--size", 24)

    assert (sized.width, sized.height) == (32, 24)
    assert (square.width, square.height) == (24, 24)
    assert sized == apart


def test_sizes_that_a_model_is_told_are_width_times_height_too():
    parser = build_parser()
    flags = ["--original-size", "768x512", "--target-size", "64", "--crop-top-left", "3,5"]

    given = given_fields(parser.parse_args(["generate", "red", *flags]))

    assert (given["original_size"], given["target_size"]) == ((512, 768), (64, 64))
    assert given["crop_top_left"] == (3, 5)


def test_an_image_gets_the_name_that_is_asked_for(generate, tmp_path, capsys):
    assert generate("red", "-s", 7, "-o", "new/circle.png") == 0
    assert capsys.readouterr().out == "new/circle.png\n"
    assert generate("blue", "-s", 8, "--output", "new/circle.png") == 0

    assert written(tmp_path) == ["new/circle.png"]
    assert read_metadata(tmp_path / "new/circle.png")["request"]["prompt"] == "blue"


def test_a_pattern_names_every_image(generate, tmp_path):
    assert generate("red", "-s", 7, "-n", 2, "-o", "out/{index:03d}-{seed}.png") == 0

    assert written(tmp_path) == ["out/000-7.png", "out/001-8.png"]


def test_a_pattern_counts_through_all_requests(generate, tmp_path, type_in):
    type_in('{"prompt": "red", "seed": 4, "num_images": 2}\n{"prompt": "blue", "seed": 9}\n')

    assert generate("--requests", "-", "-o", "{index}-{seed}.png") == 0

    assert written(tmp_path) == ["0-4.png", "1-5.png", "2-9.png"]


def test_an_output_that_is_a_folder_is_numbered(generate, tmp_path):
    assert generate("red", "-s", 7, "-o", "some/where/") == 0

    assert written(tmp_path) == ["some/where/0000-seed7.png"]


def test_standard_output_gets_the_bytes_of_the_file(generate, tmp_path, capfdbinary):
    generate("red", "-s", 7, "-o", "file.png", "--quiet")
    capfdbinary.readouterr()

    assert generate("red", "-s", 7, "-o", "-", "--quiet") == 0

    assert capfdbinary.readouterr().out == (tmp_path / "file.png").read_bytes()
    assert written(tmp_path) == ["file.png"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-n", 2, "-o", "a.png"], "put {index} into it"),
        (["-o", "{name}.png"], "has the placeholder {name}"),
        (["-n", 2, "-o", "-"], "standard output takes one image, and this makes 2; give -o FILE"),
        (["-o", "-", "--json"], "does not go with --json"),
        (["-o", "a.png", "--out-dir", "out"], "output: does not go with --out-dir"),
        (["--out-dir", "-"], "out_dir: must be a folder; `-o -` writes to standard output"),
        (["--out-dir", "circle.png"], "out_dir: must be a folder; `-o circle.png` names"),
        (["-p", "blue"], "prompt: is given twice"),
        (["--size", "8x8", "-W", 8], "size: sets --width and --height already"),
        (["--like", "a.png", "--requests", "r.jsonl"], "like: cannot be combined with --requests"),
    ],
)
def test_what_contradicts_itself_is_one_sentence_and_writes_nothing(
    generate, tmp_path, capsys, flags, message
):
    assert generate("red", *flags) == 2

    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["", "8x", "ax8", "8x8x8"])
def test_a_size_that_is_none_is_wrong_usage(size, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "red", "--size", size])

    assert f"must be WIDTHxHEIGHT pixels, got '{size}'" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["-"], ["-p", "-"], ["--prompt=-"]])
def test_a_prompt_may_come_from_standard_input(type_in, flags):
    type_in("a red circle\n")

    assert asked(*flags)[0].condition.prompt == "a red circle"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "prompt: standard input is empty"),
        (b"caf\xe9", "prompt: standard input is not UTF-8 at byte 3"),
    ],
)
def test_standard_input_without_a_prompt_is_one_sentence(type_in, text, message):
    type_in(text)

    with pytest.raises(RequestError, match=message):
        asked("-")


@pytest.mark.parametrize("name", ["prompts.txt", "prompts", "-"])
def test_lines_that_are_not_json_are_prompts_which_share_the_flags(tmp_path, type_in, name):
    text = "\ufeffa red circle\n\n  zwei {blaue} Kreise\r\n"
    type_in(text)
    path = name if name == "-" else tmp_path / name
    if name != "-":
        path.write_text(text, encoding="utf-8")

    requests = asked("--requests", path, "--steps", 3, "-s", 5)

    assert [each.condition.prompt for each in requests] == ["a red circle", "zwei {blaue} Kreise"]
    assert {(each.num_inference_steps, each.seed) for each in requests} == {(3, 5)}


@pytest.mark.parametrize("name", ["r.jsonl", "r.JSON", "requests", "-"])
def test_lines_of_json_are_known_by_the_suffix_or_the_first_character(tmp_path, type_in, name):
    text = '\ufeff\n{"prompt": "red", "seed": 4}\n'
    type_in(text)
    path = name if name == "-" else tmp_path / name
    if name != "-":
        path.write_text(text, encoding="utf-8")

    (request,) = asked("--requests", path)

    assert (request.condition.prompt, request.seed) == ("red", 4)


@pytest.mark.parametrize(
    ("name", "text", "flags", "message"),
    [
        ("p.txt", "", [], "p.txt is empty; write one prompt per line"),
        ("p.txt", "red", ["blue"], "prompt: cannot be combined with --requests"),
        ("p.txt", b"red\ncaf\xe9", [], "p.txt, line 2 is not UTF-8 at byte 3"),
        ("p.txt", "red", ["--width", 17], "p.txt, line 1: width: 17 is not a multiple of 4"),
        ("-", '{"prompt": 3}', [], "requests: standard input, line 1: prompt: must be text, got 3"),
    ],
)
def test_a_bad_line_is_one_sentence(tmp_path, type_in, name, text, flags, message):
    data = text if isinstance(text, bytes) else text.encode()
    type_in(data)
    (tmp_path / name).write_bytes(data)

    with pytest.raises(RequestError) as caught:
        asked(*flags, "--requests", name if name == "-" else tmp_path / name)

    assert message in str(caught.value)


def test_json_has_a_line_per_image(generate, capsys):
    assert generate("red", "-s", 7, "-n", 2, "--json") == 0

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["path"], each["seed"]) for each in lines] == [
        ("out/0000-seed7.png", 7),
        ("out/0001-seed8.png", 8),
    ]
    assert all(0 < each["seconds"] < 60 for each in lines)


def test_an_image_is_repeated_from_what_it_records(generate, tmp_path):
    fields = ("--sampler", "DPM++ 2M Karras", "--steps", 3, "--size", "16x20", "-n", 2)
    generate("(red:1.2) circle", *fields, "-s", 7, "-o", "{seed}.png")

    assert generate("--like", "8.png", "-o", "again.png") == 0

    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "8.png").read_bytes()


def test_flags_change_the_repetition(generate, tmp_path):
    generate("red", "-s", 7, "--steps", 3, "-o", "first.png")
    generate("blue", "-s", 7, "--steps", 3, "-o", "expected.png")

    assert generate("blue", "--like", "first.png", "-o", "changed.png") == 0

    assert (tmp_path / "changed.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


@pytest.mark.parametrize(
    ("recorded", "flags", "expected"),
    [
        (["--sampler", "ddim"], ["--sampler", "dpmpp_sde"], {"eta": 1.0, "schedule": "karras"}),
        (["--sampler", "euler"], ["--sampler", "Heun Karras"], {"schedule": "karras"}),
        (["--sigmas", "9,3,1"], ["--steps", 2], {"schedule": "leading", "num_inference_steps": 2}),
        (["--sigmas", "9,3"], ["--sampler", "heun"], {"schedule": "custom", "sigmas": (9, 3, 0)}),
        (["--sigmas", "9,3"], ["--sampler", "Heun Karras"], {"schedule": "karras"}),
        (["--steps", 4], ["--sigmas", "9,3,1"], {"num_inference_steps": 3}),
        (["--steps", 3], ["--preset", "tcd"], {"sampler": "tcd", "num_inference_steps": 4}),
        (["--sigmas", "9,3"], ["--preset", "lcm", "--steps", 2], {"num_inference_steps": 2}),
        (["--size", "16x16"], ["--size", "512x512"], {"tile_size": 192}),
        (["--guidance-rescale", 0.5], ["--guidance-rescale", 0], {"guidance_rescale": 0.0}),
    ],
)
def test_what_depends_on_a_changed_field_is_not_repeated(
    tiny_bundle, tmp_path, recorded, flags, expected
):
    path = tmp_path / "a.png"
    main(["generate", "red", *map(str, recorded), "-o", str(path), "--bundle", str(tiny_bundle)])

    (request,) = asked("--like", path, *flags, "--bundle", tiny_bundle)

    assert {name: getattr(request, name) for name in expected} == expected


def test_a_repetition_with_another_bundle_is_warned_of(tiny_bundle, tmp_path, caplog):
    metadata = {"request": {"prompt": "red", "seed": 4}, "bundle_sha256": "0123" * 16}
    save_image(Image.new("RGB", (16, 16)), tmp_path / "a.png", metadata)

    (request,) = asked("--like", tmp_path / "a.png", "--bundle", tiny_bundle)

    assert request.seed == 4
    assert "was generated from another bundle (012301230123)" in caplog.text


def test_an_image_to_start_from_is_given_again(generate, tmp_path, capsys):
    Image.fromarray(np.full((16, 16, 3), 99, np.uint8)).save(tmp_path / "photo.png")
    generate("red", "-i", "photo.png", "-s", 7, "-o", "first.png")
    capsys.readouterr()

    assert generate("--like", "first.png", "-o", "again.png") == 2
    assert "image: is known by its hash alone" in capsys.readouterr().err
    assert generate("--like", "first.png", "-i", "photo.png", "-o", "again.png") == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "first.png").read_bytes()


def test_an_image_that_is_given_again_keeps_the_size_asked_for(generate, tmp_path):
    for name, side in (("photo.png", 16), ("other.png", 32)):
        Image.fromarray(np.full((side, side, 3), 99, np.uint8)).save(tmp_path / name)
    generate("red", "-i", "photo.png", "--size", "24x20", "-s", 7, "-o", "first.png")

    assert generate("--like", "first.png", "-i", "photo.png", "-o", "again.png") == 0
    assert generate("--like", "first.png", "-i", "other.png", "-o", "changed.png") == 0

    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "first.png").read_bytes()
    assert InputImage.read(tmp_path / "changed.png").size == (32, 32)


def test_an_image_without_a_record_cannot_be_repeated(generate, tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "plain.png")
    save_image(Image.new("RGB", (16, 16)), tmp_path / "odd.png", {"request": 3})

    assert generate("--like", "plain.png") == 1
    assert generate("--like", "odd.png") == 1
    assert "odd.png: its metadata has no request" in capsys.readouterr().err


def test_the_settings_of_another_program_are_repeated_as_far_as_they_are_known(
    tiny_bundle, tmp_path, caplog
):
    text = "a red circle\nSteps: 3, Sampler: Euler a, CFG scale: 2, Seed: 7, Model: other"
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", pnginfo=info)

    (request,) = asked("--like", tmp_path / "a.png", "--bundle", tiny_bundle)

    assert (request.condition.prompt, request.seed, request.sampler) == (
        *("a red circle", 7, "euler_ancestral"),
    )
    assert "was made by another program" in caplog.text
    assert "Model" in caplog.text


@pytest.mark.parametrize(
    ("kind", "version", "flags", "skipped"),
    [
        ("clip", "v1.10.1", (), 1),
        ("openclip", "v1.10.1", (), 0),
        ("openclip", "v1.10.1", ("--clip-skip", 1), 1),
        ("openclip", "ldm-deploy 1.0", (), 1),
    ],
)
def test_layers_that_the_web_ui_does_not_skip_are_not_skipped_here(
    own_bundle, caplog, kind, version, flags, skipped
):
    manifest = load_manifest(own_bundle)
    encoder = replace(manifest.spec.networks["text_encoder"], kind=kind)
    spec = manifest.spec.with_networks(text_encoder=encoder)
    document = encode_manifest(replace(manifest, spec=spec))
    (own_bundle / MANIFEST_NAME).write_bytes(document)
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", f"red\nSteps: 3, Seed: 7, Clip skip: 2, Version: {version}")
    image = own_bundle.parent / "a.png"
    Image.new("RGB", (16, 16)).save(image, pnginfo=info)

    (request,) = asked("--like", image, "--bundle", own_bundle, *flags)

    assert request.condition.clip_skip == skipped
    assert ("Clip skip" in caplog.text) == (kind == "openclip" and version == "v1.10.1")


def test_requests_from_a_file_may_have_a_deadline(generate, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("red")

    assert generate("--requests", "p.txt", "--deadline-seconds", "0.000001") == 1
    assert "are over" in capsys.readouterr().err


def test_requests_without_an_end_are_one_sentence(tiny_bundle, tmp_path, capsys):
    file = tmp_path / "requests.jsonl"
    with file.open("wb") as requests:
        requests.truncate((256 << 20) + 1)  # a hole, which takes no room on the disk

    assert main(["generate", "--bundle", str(tiny_bundle), "--requests", str(file)]) == 2
    assert capsys.readouterr().err == (
        f"error: requests: {file} has more than 268435456 bytes; split it into several files\n"
    )


def test_parts_of_images_that_a_killed_process_left_are_removed_once_they_are_old(
    tiny_bundle, tmp_path
):
    out = tmp_path / "out"
    out.mkdir()
    old, young = out / ".0000-seed7.png.0123abcd.part", out / ".0001-seed8.png.0123abcd.part"
    others = [out / name for name in ("a.part", ".a.png.part", ".a.png.0123abcd.partial")]
    for path in (old, young, *others):
        path.write_bytes(b"half")
        if path != young:
            os.utime(path, (0, 0))

    main(["generate", "red", "--bundle", str(tiny_bundle), "--out-dir", str(out), "--seed", "7"])

    left = {path.name for path in out.iterdir()}
    assert left == {"0000-seed7.png", young.name, *(path.name for path in others)}
