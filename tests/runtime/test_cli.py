import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm_runtime
from ldm_runtime.backends import get_backend
from ldm_runtime.bundle.manifest import encode_manifest, load_manifest, manifest_digest
from ldm_runtime.cli.commands import build_parser, main
from ldm_runtime.cli.request_lines import read_requests
from ldm_runtime.errors import RequestError
from ldm_runtime.generator import Generator
from ldm_runtime.pipeline.image_files import read_metadata
from ldm_runtime.requests.request import GenerationRequest, parse_request
from ldm_runtime.testing import tiny_spec, write_tiny_bundle
from tests.runtime.task_cases import BOX, MAP, NEEDED, PICTURE


@pytest.fixture
def draw(tiny_bundle, tmp_path):
    """Runs `ldm generate` into tmp_path/out."""

    def run(*arguments):
        folders = ("--bundle", str(tiny_bundle), "--out-dir", str(tmp_path / "out"))
        return main(["generate", *folders, *arguments])

    return run


def run_command(*arguments):
    code = "import sys; from ldm_runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(ldm_runtime.__file__).parents[1],
    )


def test_generate_writes_a_file_an_image_and_prints_only_their_paths(draw, tmp_path, capsys):
    status = draw("a red circle", "--seed", "7", "-n", "3")

    names = ["0000-seed7.png", "0001-seed8.png", "0002-seed9.png"]
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "out" / name) for name in names]


def test_generate_draws_what_the_generator_draws(draw, tmp_path, tiny_bundle):
    draw("red", "--seed", "7", "-n", "2", "--sampler", "euler_ancestral", "--height", "24")

    with Generator(tiny_bundle) as generator:
        result = generator(prompt="red", seed=7, num_images=2, sampler="euler_ancestral", height=24)
    for name, expected in zip(["0000-seed7", "0001-seed8"], result.images, strict=True):
        with Image.open(tmp_path / f"out/{name}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_every_flag_reaches_the_request(draw, tmp_path):
    draw(
        *("red", "--negative-prompt", "blue", "--height", "24", "--width", "32"),
        *("--num-inference-steps", "3", "--guidance-scale", "2.5", "--sampler", "ddim"),
        *("--schedule", "trailing", "--eta", "0.5", "--seed", "11"),
    )

    metadata = read_metadata(tmp_path / "out/0000-seed11.png")

    assert GenerationRequest(**metadata["request"]) == GenerationRequest(
        prompt="red",
        negative_prompt="blue",
        height=24,
        width=32,
        num_inference_steps=3,
        guidance_scale=2.5,
        sampler="ddim",
        schedule="trailing",
        eta=0.5,
        seed=11,
        num_images=1,
        tile_size=0,
    )


def test_pictures_and_lists_reach_the_request_too(draw, tmp_path):
    gray = np.full((16, 20, 3), 99, dtype=np.uint8)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(gray[:, :, 0] * 0).save(tmp_path / "mask.png")

    status = draw(
        *("red", "--image", str(tmp_path / "gray.png"), "--mask-image", str(tmp_path / "mask.png")),
        *("--sigmas", "9,3,1", "--guidance-interval", "0.5,5"),
    )

    (path,) = (tmp_path / "out").iterdir()
    request = read_metadata(path)["request"]
    assert status == 0
    assert (request["sigmas"], request["guidance_interval"]) == ([9.0, 3.0, 1.0, 0.0], [0.5, 5.0])
    assert request["image"]["width"] == 20
    assert (np.asarray(Image.open(path)) == 99).all()  # a black mask keeps everything


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sigmas", "9;3"], "must be numbers separated by commas, got '9;3'"),
        (["--original-size", "1024,1024"], "must be WIDTHxHEIGHT pixels, got '1024,1024'"),
        (["--outpaint", "1,2,x,4"], "must be whole numbers separated by commas, got '1,2,x,4'"),
    ],
)
def test_a_list_that_is_none_is_wrong_usage(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "red", *flags])

    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_requests_from_a_file_are_drawn_together_in_order(draw, tmp_path, encoding):
    lines = [{"prompt": "red", "seed": 4}, {"prompt": "blue", "seed": 9, "sampler": "euler"}]
    text = "\n".join(map(json.dumps, lines)) + "\n\n"
    (tmp_path / "r.jsonl").write_text(text, encoding=encoding)

    status = draw("--requests", str(tmp_path / "r.jsonl"))

    assert status == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0000-seed4.png",
        "0001-seed9.png",
    ]


def test_requests_in_utf_16_are_refused_with_the_fix(draw, capsys, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"prompt": "red"}', encoding="utf-16")

    status = draw("--requests", str(path))

    assert status == 2
    assert f"requests: {path} is text in UTF-16; save it as UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 3}', "requests: {}, line 1: prompt: must be text, got 3"),
        ("[1]", "requests: {}, line 1 is not a JSON object"),
        ('{"prompt": "caf\xe9"}', "requests: {}, line 1 is not a JSON object"),
        ("[" * 100_000, "requests: {}, line 1 is not a JSON object"),
        ("\n \n", "requests: {} is empty; write one JSON object per line"),
        ("{", "requests: {}, line 1 is not a JSON object"),
    ],
)
def test_a_bad_line_of_requests_is_one_sentence_that_names_it(
    draw, capsys, tmp_path, line, message
):
    path = tmp_path / "r.jsonl"
    path.write_text(line, encoding="latin-1")

    status = draw("--requests", str(path))

    assert status == 2
    assert message.format(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["red"], "prompt"),
        (["--class-label", "3"], "class_label"),
        (["--layout", "boxes.json"], "layout"),
        (["--seed", "0"], "seed"),
        (["--literal-prompt"], "literal_prompt"),
    ],
)
def test_a_field_comes_from_one_place(draw, capsys, tmp_path, flags, field):
    (tmp_path / "r.jsonl").write_text('{"prompt": "red"}')

    status = draw(*flags, "--requests", str(tmp_path / "r.jsonl"))

    assert status == 2
    assert capsys.readouterr().err == (
        f"error: {field}: cannot be combined with --requests, whose lines set it\n"
    )


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("class-to-image", "class_label: this bundle is class-to-image: give --class-label 3"),
        (
            "text-to-image",
            'prompt: this bundle is text-to-image: give a prompt, such as "a large red '
            'circle left of a small blue square on a white background"',
        ),
        ("layout-to-image", "layout: this bundle is layout-to-image: give --layout boxes.json"),
        (
            "semantic-synthesis",
            "segmentation: this bundle is semantic-synthesis: give --segmentation map.png",
        ),
        ("super-resolution", "image: this bundle is super-resolution: give --image photo.png"),
        (
            "inpainting",
            "image: this bundle is inpainting: give --image photo.png and "
            "--mask-image mask.png or --outpaint 0,0,64,0",
        ),
        ("retrieval", "embeddings: this bundle is retrieval: give --embeddings vectors.npy"),
        ("autoencoder", "image: this bundle is autoencoder: give --image photo.png"),
    ],
)
def test_what_the_bundle_needs_is_said_with_the_flag_to_give(
    tiny_bundle, tmp_path, capsys, task, sentence
):
    manifest = dataclasses.replace(load_manifest(tiny_bundle), spec=tiny_spec(task))
    (tmp_path / "manifest.json").write_bytes(encode_manifest(manifest))

    status = main(["generate", "--bundle", str(tmp_path)])

    assert status == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_a_prompt_for_a_bundle_that_takes_none_is_one_sentence(tiny_bundle, tmp_path, capsys):
    manifest = dataclasses.replace(load_manifest(tiny_bundle), spec=tiny_spec("unconditional"))
    (tmp_path / "manifest.json").write_bytes(encode_manifest(manifest))

    status = main(["generate", "a red circle", "--bundle", str(tmp_path)])

    assert status == 2
    assert capsys.readouterr().err == (
        "error: prompt: means nothing to this bundle, which is unconditional; leave it out\n"
    )


def asked(task, *arguments):
    """The one request that a command line means for a bundle of some task."""
    args = build_parser().parse_args(["generate", *map(str, arguments)])
    (request,) = read_requests(args, tiny_spec(task))
    return request


def test_names_of_labels_without_a_label_are_refused(names):
    with pytest.raises(RequestError, match="label_names: needs --class-label or"):
        asked("unconditional", "--label-names", names)


def test_a_reader_who_left_gets_no_error(tiny_bundle):
    code = "import sys; from ldm_runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    line = [sys.executable, "-c", code, "inspect", str(tiny_bundle)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        command.stdout.close()

        assert command.stderr.read() == b""

    assert command.returncode == 1


#: Flags for what a task needs, and the size of what comes out.
COMMANDS = {
    "unconditional": ([], (16, 16)),
    "class-to-image": (["--class-label", "dog", "--label-names", "names.txt"], (16, 16)),
    "text-to-image": (["a red circle"], (16, 16)),
    "layout-to-image": (["--layout", "boxes.json"], (16, 16)),
    "semantic-synthesis": (["--segmentation", "map.png"], (32, 24)),
    "super-resolution": (["--image", "photo.png"], (64, 48)),
    "text-super-resolution": (["red", "--image", "photo.png"], (64, 48)),
    "inpainting": (["--image", "photo.png", "--mask-image", "mask.png"], (32, 24)),
    "text-inpainting": (["red", "--image", "photo.png", "--mask-image", "mask.png"], (32, 24)),
    "image-editing": (["make it red", "--image", "photo.png"], (32, 24)),
    "image-variation": (["--image", "photo.png", "--noise-level", "700"], (16, 16)),
    "depth-to-image": (["red", "--depth-map", "map.png"], (32, 24)),
    "retrieval": (["--embeddings", "vectors.npy"], (16, 16)),
    "autoencoder": (["--image", "photo.png"], (32, 24)),
}


@pytest.mark.parametrize("task", COMMANDS)
def test_every_task_is_drawn_from_the_command_line(tmp_path, monkeypatch, names, task):
    flags, size = COMMANDS[task]
    monkeypatch.chdir(tmp_path)
    write_tiny_bundle(tmp_path / "engines", task)
    Image.fromarray(MAP).save("map.png")
    for name in ("photo.png", "mask.png"):
        Image.fromarray(PICTURE + 255).save(name)
    np.save("vectors.npy", NEEDED["retrieval"]["embeddings"])
    (tmp_path / "boxes.json").write_text(json.dumps([BOX]))

    status = main(["generate", *flags, "--seed", "5"])

    assert status == 0
    path = tmp_path / "out/0000-seed5.png"
    with Image.open(path) as image:
        assert image.size == size
    request = read_metadata(path)["request"]
    assert {name for name, value in request.items() if value is not None} >= set(NEEDED[task])


@pytest.fixture
def names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("cat\nred circle\ndog\nbird\n")
    return path


def test_a_class_is_a_number_or_a_name(names):
    assert asked("class-to-image", "--class-label", 2).condition.label == 2
    named = asked("class-to-image", "--class-label", "red circle", "--label-names", names)
    assert named.condition.label == 1


def test_a_layout_is_a_file_with_numbers_or_names_for_labels(tmp_path, names):
    path = tmp_path / "boxes.json"
    numbered = [{"label": 2, "box": [0, 0, 0.5, 1]}, {"label": 1, "box": [0.5, 0, 1, 1]}]
    expected = parse_request({"layout": numbered}).layout
    path.write_text(json.dumps(numbered))

    assert asked("layout-to-image", "--layout", path).condition.objects == expected

    numbered[0]["label"] = "dog"
    path.write_text(json.dumps(numbered))

    assert (
        asked("layout-to-image", "--layout", path, "--label-names", names).condition.objects
        == expected
    )


def test_a_map_and_embeddings_are_files(tmp_path):
    Image.fromarray(MAP).save(tmp_path / "map.png")
    np.save(tmp_path / "vectors.npy", NEEDED["retrieval"]["embeddings"])

    request = asked("semantic-synthesis", "--segmentation", tmp_path / "map.png")
    retrieval = asked("retrieval", "--embeddings", tmp_path / "vectors.npy")

    np.testing.assert_array_equal(request.condition.segmentation.ids, MAP)
    np.testing.assert_array_equal(
        retrieval.condition.embeddings.values, NEEDED["retrieval"]["embeddings"]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "layout: {} is not JSON"),
        ('[{"label": "cow", "box": [0, 0, 1, 1]}]', "layout: object 0: no label is called 'cow'; "),
        ('[{"label": "cat"}]', "layout: "),
        ("[3]", "layout: "),
        ("3", "layout: "),
    ],
)
def test_a_bad_layout_file_is_one_sentence(tmp_path, names, content, message):
    path = tmp_path / "boxes.json"
    path.write_text(content)

    with pytest.raises(RequestError) as caught:
        asked("layout-to-image", "--layout", path, "--label-names", names)

    assert str(caught.value).startswith(message.format(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("label", "with_names", "message"),
    [
        (
            "cat",
            False,
            "'cat' is a name, and this bundle has no names of labels; give --label-names FILE, or "
            "a number",
        ),
        ("dogs", True, "no label is called 'dogs'"),
        ("-1", False, "must lie between 0 and"),
        ("9", True, "9 is not a class of this bundle; give 0 to 3"),
    ],
)
def test_a_class_that_is_unknown_is_one_sentence(names, label, with_names, message):
    more = ("--label-names", names) if with_names else ()

    with pytest.raises(RequestError) as caught:
        asked("class-to-image", f"--class-label={label}", *more)

    assert str(caught.value).startswith(f"class_label: {message}")


@pytest.mark.parametrize("flag", ["--layout", "--segmentation", "--embeddings", "--label-names"])
def test_a_file_that_is_not_there_is_one_sentence(draw, tmp_path, capsys, flag):
    nowhere = str(tmp_path / "nowhere")

    status = draw(flag, nowhere)

    error = capsys.readouterr().err
    assert status == 2
    assert nowhere in error
    assert error.count("\n") == 1


def test_lines_of_requests_may_hold_what_any_task_takes(tmp_path, names):
    path = tmp_path / "r.jsonl"
    layout = [{"label": "dog", "box": [0, 0, 1, 1]}]
    path.write_text(json.dumps({"layout": layout, "seed": 3}))

    request = asked("layout-to-image", "--requests", path, "--label-names", names)

    assert [each.label for each in request.condition.objects] == [2]

    Image.fromarray(MAP).save(tmp_path / "map.png")
    path.write_text(json.dumps({"segmentation": str(tmp_path / "map.png")}))

    assert asked("semantic-synthesis", "--requests", path).condition.segmentation.size == (32, 24)


def test_a_line_that_lacks_what_the_bundle_needs_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"layout": []}\n\n{"seed": 3}')

    with pytest.raises(RequestError) as caught:
        asked("layout-to-image", "--requests", path)

    assert str(caught.value) == (
        f"requests: {path}, line 3: layout: this bundle is layout-to-image: give layout"
    )


def test_a_preview_file_shows_what_is_being_drawn(draw, tmp_path):
    draw("red", "--preview-file", str(tmp_path / "preview.png"))

    with Image.open(tmp_path / "preview.png") as preview:
        assert preview.size == (8, 8)


def test_a_deadline_is_exit_1_and_one_sentence(draw, capsys):
    status = draw("red", "--deadline-seconds", "0.000001")

    assert status == 1
    assert "are over after step 1 of 4 of image 1" in capsys.readouterr().err


def test_generate_never_replaces_a_file(draw, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/0004-other.txt").write_text("mine")

    draw("red", "--seed", "1")
    draw("red", "--seed", "1")

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0004-other.txt",
        "0005-seed1.png",
        "0006-seed1.png",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "17"], "height: 17 is not a multiple of 4; the nearest sizes are 16 and 20"),
        (["--steps", "0"], "num_inference_steps: must lie between 1 and"),
        (["--steps", "1001"], "num_inference_steps: 1001 steps are impossible"),
        (["--guidance-scale", "nan"], "guidance_scale: must lie between 0 and 100, got nan"),
        (["--sampler", "ddim2"], "sampler: unknown sampler 'ddim2' (did you mean ddim"),
        (["--schedule", "cosine"], "schedule: unknown schedule 'cosine'; choose leading"),
        (["--sampler", "euler", "--eta", "1"], "eta: sampler 'euler' has none"),
        (["--seed", "-1"], "seed: must lie between 0"),
        (["-n", "0"], "num_images: must lie between 1"),
    ],
)
def test_a_bad_request_is_one_sentence_and_exit_2(draw, arguments, message, capsys, tmp_path):
    status = draw("red", *arguments)

    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["no bundle", "missing file", "wrong hash", "bad manifest"])
def test_a_spoilt_bundle_is_one_sentence_and_exit_1(own_bundle, damage, capsys):
    file = own_bundle / "unet/weights.bin"
    match damage:
        case "no bundle":
            (own_bundle / "manifest.json").unlink()
        case "missing file":
            file.unlink()
        case "wrong hash":
            file.write_bytes(file.read_bytes()[::-1])
        case "bad manifest":
            (own_bundle / "manifest.json").write_text("{")

    status = main(["generate", "red", "--bundle", str(own_bundle)])

    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_folder_that_is_a_file_is_one_sentence_and_exit_2(draw, tmp_path, capsys):
    (tmp_path / "out").write_text("a file, not a folder")

    status = draw("red")

    assert status == 2
    assert capsys.readouterr().err == (
        f"error: out_dir: {tmp_path / 'out'} is a file; give a folder, or -o FILE\n"
    )


def test_a_prompt_that_is_not_text_is_one_sentence(tiny_bundle, tmp_path):
    result = run_command(
        *("generate", b"caf\xe9", "--bundle", str(tiny_bundle), "--out-dir", str(tmp_path))
    )

    assert result.returncode == 2
    assert result.stderr.startswith("error: prompt: is not valid Unicode at character 3")


def test_progress_goes_to_stderr_as_plain_lines_where_there_is_no_terminal(draw, capsys):
    draw("red", "-n", "2")

    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["image 1/2", "image 2/2"]
    assert all(re.search(r" generated in \d+\.\d s$", line) for line in lines)


def test_progress_is_a_bar_on_a_terminal(draw, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    draw("red", "-n", "2")

    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "[........................] image 1/2" in err
    assert "[############............] image 2/2" in err
    assert err.endswith("\r\x1b[K")  # and nothing is left of it


def test_an_over_long_prompt_warns_once_on_stderr(tiny_bundle, tmp_path):
    result = run_command(
        *("generate", "red " * 40, "-n", "2", "--literal-prompt"),
        *("--bundle", str(tiny_bundle), "--out-dir", str(tmp_path)),
    )

    assert result.returncode == 0
    assert result.stderr.startswith("warning: prompt is longer than 14 tokens; left out: 'red")
    assert result.stderr.count("warning") == 1


def test_an_interrupt_is_exit_130_and_keeps_what_was_drawn(draw, capsys, monkeypatch, tmp_path):
    stream = Generator.stream
    drawn = []

    def interrupted(self, request, **options):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(request)
        return stream(self, request, **options)

    monkeypatch.setattr(Generator, "stream", interrupted)

    status = draw("red", "-n", "3", "--seed", "1")

    assert status == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0000-seed1.png"]


def test_verify_prints_a_line_a_check_and_exits_0(tiny_bundle, capsys):
    status = main(["verify", str(tiny_bundle)])

    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert len(lines) == 13
    assert all(line.endswith(" ok") for line in lines)
    assert any(line.startswith("golden/0 image 0     psnr") for line in lines)


def test_verify_exits_1_on_a_miss(own_bundle, capsys, make_missing_bundle):
    make_missing_bundle(own_bundle)

    status = main(["verify", str(own_bundle)])

    out, err = capsys.readouterr()
    assert status == 1
    assert "MISSED" in out
    assert err.startswith("error: 2 of the promises")


@pytest.fixture
def make_missing_bundle():
    """Makes a bundle's pictures differ from its golden ones, with hashes that agree."""

    def change(bundle):
        manifest = json.loads((bundle / "manifest.json").read_bytes())
        for name in ("0", "1"):
            path = bundle / f"golden/0/{name}.png"
            Image.new("RGB", (16, 16)).save(path)
            (record,) = (
                each for each in manifest["files"] if each["path"].endswith(f"0/{name}.png")
            )
            data = path.read_bytes()
            record.update(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        manifest["digest"] = manifest_digest(manifest)
        (bundle / "manifest.json").write_text(json.dumps(manifest))

    return change


def test_inspect_shows_a_picture_to_people_and_to_programs(draw, tmp_path, capsys):
    draw("ein roter Kreis", "--seed", "3")
    path = str(tmp_path / "out/0000-seed3.png")
    capsys.readouterr()

    assert main(["inspect", path]) == 0
    assert "    prompt: ein roter Kreis" in capsys.readouterr().out.splitlines()
    assert main(["inspect", "--json", path]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["request"]["seed"] == 3


def test_inspect_shows_a_bundle(tiny_bundle, capsys):
    assert main(["inspect", str(tiny_bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spec"]["family"] == "tiny"


def test_inspect_of_nothing_is_one_sentence_and_exit_1(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_doctor_names_every_backend(capsys):
    assert main(["doctor"]) == 0
    version = get_backend("onnxruntime").version()
    assert f"onnxruntime {version}: can run" in capsys.readouterr().out.splitlines()
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["can_run"] is True
