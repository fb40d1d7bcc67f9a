import os
import struct
import tracemalloc
import zlib

import pytest
from PIL import Image, PngImagePlugin

from ldm_runtime import Generator
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.cli import main
from ldm_runtime.diagnostics.inspection import inspect, readable
from ldm_runtime.errors import LdmError, ManifestError
from ldm_runtime.pipeline.image_files import save_image


@pytest.fixture
def picture(tiny_bundle, tmp_path):
    with Generator(tiny_bundle) as generator:
        result = generator(prompt="a red circle", seed=7)
    save_image(result.images[0], tmp_path / "a.png", result.metadata(0))
    return tmp_path / "a.png"


def test_a_bundle_is_described_by_its_manifest(tiny_bundle):
    description = inspect(tiny_bundle, {})

    assert description["kind"] == "bundle"
    assert description["sha256"] == sha256_of(tiny_bundle / "manifest.json")
    assert description["spec"]["family"] == "tiny"
    assert description["spec"]["alphas_cumprod"]["length"] == 1000
    assert description["size_bytes"] == sum(
        path.stat().st_size
        for path in tiny_bundle.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    )


def test_a_picture_is_described_by_its_request(picture, tiny_bundle):
    description = inspect(picture, {})

    assert description["kind"] == "image"
    assert description["metadata"]["request"]["prompt"] == "a red circle"
    assert description["metadata"]["request"]["seed"] == 7
    assert description["metadata"]["bundle_sha256"] == inspect(tiny_bundle, {})["sha256"]


@pytest.mark.parametrize(
    "claimed",
    [
        {"kind": "bundle"},
        {"kind": "bundle", "components": [], "files": [], "spec": {}},
        {"kind": "checkpoint", "family": "ldm-unconditional", "path": "/elsewhere"},
    ],
)
def test_an_image_cannot_say_that_it_is_something_else(tmp_path, capsys, claimed):
    path = tmp_path / "a.png"
    save_image(Image.new("RGB", (2, 2)), path, claimed)

    description = inspect(path, {})

    assert description == {"kind": "image", "path": str(path), "metadata": claimed}
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"kind: image\npath: {path}\nmetadata:\n  kind: ")


@pytest.mark.parametrize("inner", ['{"a":%s}', "[%s]"])
@pytest.mark.parametrize("depth", [60, 500, 990, 5000])
def test_deep_metadata_of_an_image_is_one_sentence(tmp_path, capsys, inner, depth):
    before, after = inner.split("%s")
    text = PngImagePlugin.PngInfo()
    text.add_text("ldm-deploy", f'{{"a": {before * depth}1{after * depth}}}', zip=True)
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(path, pnginfo=text)

    assert main(["inspect", str(path)]) == 1
    assert main(["inspect", str(path), "--json"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("nests more than 50 deep" in line or "is damaged" in line for line in errors)


def test_the_metadata_of_an_image_of_150_million_pixels_is_read_without_them(tmp_path):
    path = tmp_path / "a.png"
    save_image(Image.new("L", (2, 2)), path, {"request": {"seed": 3}})
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">2I", 15_000, 10_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    tracemalloc.start()

    assert inspect(path, {})["metadata"] == {"request": {"seed": 3}}

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(LdmError, match="pipe is neither a file nor a folder"):
        inspect(tmp_path / "pipe", {})


def test_a_picture_is_told_by_its_bytes_and_not_its_name(picture):
    other = picture.rename(picture.with_suffix(".ckpt"))

    assert inspect(other, {})["kind"] == "image"


def test_other_files_are_shown_to_each_inspector_until_one_knows_them(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"weights")
    asked = []

    def knows_nothing(path):
        asked.append(path)

    inspectors = {
        "first": lambda: knows_nothing,
        "second": lambda: lambda path: {"kind": "checkpoint", "name": path.name},
        "third": lambda: pytest.fail("the second one knew it"),
    }

    assert inspect(path, inspectors) == {"kind": "checkpoint", "name": "model.ckpt"}
    assert asked == [path]


def test_a_file_that_nobody_knows_is_one_sentence(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")

    with pytest.raises(LdmError, match=r"cannot tell what .*notes\.txt is: it is not a bundle"):
        inspect(tmp_path / "notes.txt", {"some": lambda: lambda path: None})


def test_an_inspector_that_is_not_installed_is_named(tmp_path):
    (tmp_path / "model.ckpt").write_text("hello")

    def load():
        raise ModuleNotFoundError("No module named 'torch'")

    with pytest.raises(LdmError, match=r"\(No module named 'torch'\); install the extra 'export'"):
        inspect(tmp_path / "model.ckpt", {"checkpoint": load})


def test_an_inspector_that_lacks_a_package_for_one_file_is_named(tmp_path):
    (tmp_path / "model.ckpt").write_text("hello")

    def read_with_yaml(path):
        raise ModuleNotFoundError("No module named 'yaml'")

    with pytest.raises(LdmError, match=r"checkpoint \(No module named 'yaml'\); install the extra"):
        inspect(tmp_path / "model.ckpt", {"checkpoint": lambda: read_with_yaml})


def test_what_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(LdmError, match="nowhere cannot be read: No such file"):
        inspect(tmp_path / "nowhere", {})


def test_a_folder_that_is_no_bundle_is_one_sentence(tmp_path):
    with pytest.raises(ManifestError, match="not found"):
        inspect(tmp_path, {})


def test_the_readable_form_of_a_bundle_is_a_page(tiny_bundle):
    lines = readable(inspect(tiny_bundle, {})).splitlines()

    assert lines[0] == "kind: bundle"
    assert "  unet: fp32 graph" in lines
    assert len(lines) < 90
    assert max(map(len, lines)) < 120 + len(str(tiny_bundle))


def test_the_readable_form_indents_records_and_lists_of_records():
    text = readable({"kind": "x", "spec": {"size": 3}, "rows": [{"a": 1}, {"a": 2}], "none": []})

    assert text.splitlines() == [
        "kind: x",
        "spec:",
        "  size: 3",
        "rows:",
        "  0:",
        "    a: 1",
        "  1:",
        "    a: 2",
        "none: []",
    ]


def test_the_readable_form_shows_the_worst_parity_of_each_graph():
    parity = [
        {"variant": "fp32", "max_relative_error": 1e-6},
        {"variant": "fp16", "max_relative_error": 2e-3},
        {"variant": "fp32", "max_relative_error": 3e-5},
    ]
    graphs = [{"variant": "fp16", "file": "a"}, {"variant": "fp32", "file": "b"}]
    component = {"name": "unet", "graphs": graphs, "parity": parity}

    text = readable({"kind": "bundle", "components": [component], "files": []})

    assert (
        "  unet: fp16 graph (max relative error 2.0e-03), fp32 graph (max relative error 3.0e-05)"
        in text.splitlines()
    )


def test_the_readable_form_says_that_a_network_stays_in_fp32():
    graphs = [{"variant": "fp32", "file": "a"}, {"variant": "fp16", "file": "a"}]
    component = {"name": "vae_decoder", "graphs": graphs, "parity": []}

    text = readable({"kind": "bundle", "components": [component], "files": []})

    line = "fp32 graph, fp16 graph, both one file: half precision cannot hold this network"
    assert f"  vae_decoder: {line}" in text.splitlines()


def test_the_readable_form_cannot_steer_a_terminal():
    text = readable({"prompt": "a\x1b[2J red\ncircle, größer", "k\x07": 1})

    assert text == "prompt: a\\x1b[2J red\\ncircle, größer\nk\\x07: 1"
