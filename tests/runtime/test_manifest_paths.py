"""No command follows a path of a manifest that leads out of its bundle."""

import json
import os
import sys
from dataclasses import replace

import pytest

from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import encode_manifest, load_manifest, manifest_digest
from ldm_runtime.cli import main
from ldm_runtime.errors import ManifestError
from ldm_runtime.generator import Generator

SECRET = "root:x:0:0:secret"
OPENED = []
RECORDING = [False]


def record(event, arguments):
    if RECORDING[0] and event == "open":
        OPENED.append(str(arguments[0]))


sys.addaudithook(record)  # cannot be taken away again, hence the switch


@pytest.fixture
def opened():
    """The paths that are opened while the test runs."""
    OPENED.clear()
    RECORDING[0] = True
    yield OPENED
    RECORDING[0] = False


def put_tokenizer(document, path):
    document["tokenizer_file"] = path


def put_weights(document, path):
    document["components"][0]["weights_file"] = path


def put_graph(document, path):
    document["components"][0]["graphs"][0]["file"] = path


def put_engine(document, path):
    document["engines"] = [path]


def put_golden(document, path):
    document["golden"][0] = path


def put_file(document, path):
    document["files"][0]["path"] = path


def put_tokenizer_and_its_record(document, path):
    for each in document["files"]:
        if each["path"] == document["tokenizer_file"]:
            each["path"] = path
    document["tokenizer_file"] = path


PLACES = (
    put_tokenizer,
    put_weights,
    put_graph,
    put_engine,
    put_golden,
    put_file,
    put_tokenizer_and_its_record,
)
PATHS = (
    "{secret}",
    "../secret.txt",
    "unet/../../secret.txt",
    "//{secret}",
    "a\0b",
    "",
    ".",
    "x\x1b",
)
COMMANDS = {
    "generate": lambda bundle: ["generate", "red", "--bundle", bundle],
    "verify": lambda bundle: ["verify", bundle],
    "inspect": lambda bundle: ["inspect", bundle],
    "build-engines": lambda bundle: ["build-engines", bundle],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("put", PLACES, ids=lambda put: put.__name__)
def test_a_path_that_is_not_of_a_listed_file_is_refused_unopened(
    own_bundle, tmp_path, capsys, opened, put, command
):
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    manifest = own_bundle / "manifest.json"
    original = manifest.read_text()
    opened.clear()

    for path in PATHS:
        document = json.loads(original)
        put(document, path.format(secret=secret))
        document["digest"] = manifest_digest(document)
        manifest.write_text(json.dumps(document))

        assert main([*command(str(own_bundle)), "--quiet"]) == 1, path

    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err
    assert captured.err.count("error: ") == len(PATHS)
    assert not [path for path in opened if os.path.realpath(path) == str(secret)]
    assert str(manifest) in opened


@pytest.mark.parametrize("command", ["generate", "verify"])
def test_a_bundle_is_opened_under_its_hash_alone_if_one_is_given(
    tiny_bundle, tmp_path, capsys, command
):
    found = sha256_of(tiny_bundle / "manifest.json")
    arguments = [*COMMANDS[command](str(tiny_bundle)), "--quiet"]
    if command == "generate":
        arguments += ["--out-dir", str(tmp_path)]

    assert main([*arguments, "--sha256", found]) == 0
    assert main([*arguments, "--sha256", "0" * 64]) == 1
    assert f"has sha256 {found}, not 000" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--sha256", found[:12]])


def test_a_generator_opens_a_bundle_under_its_hash_alone(tiny_bundle):
    found = sha256_of(tiny_bundle / "manifest.json")

    with Generator(tiny_bundle, sha256=found) as generator:
        assert generator.bundle_sha256 == found
    with pytest.raises(ManifestError, match=f"has sha256 {found}, not {'f' * 64} as it should"):
        Generator(tiny_bundle, sha256="f" * 64)


@pytest.mark.parametrize("name", [b"Weights.bin", b"../weig.bin"])
@pytest.mark.parametrize("command", ["generate", "verify", "build-engines"])
def test_a_graph_that_names_another_file_is_refused(own_bundle, capsys, command, name):
    graph = own_bundle / "unet/model.cpu.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"weights.bin", name))
    (own_bundle / "unet" / name.decode()).write_bytes(
        (own_bundle / "unet/weights.bin").read_bytes()
    )
    manifest = load_manifest(own_bundle)
    files = tuple(
        replace(each, sha256=sha256_of(own_bundle / each.path)) for each in manifest.files
    )
    (own_bundle / "manifest.json").write_bytes(encode_manifest(replace(manifest, files=files)))

    assert main([*COMMANDS[command](str(own_bundle)), "--quiet"]) == 1
    error = capsys.readouterr().err
    if command != "build-engines":  # which has no builder or no fp16 graph here
        assert f"unet/model.cpu.onnx names the file '{name.decode()}', but the manifest" in error
