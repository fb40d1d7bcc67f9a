import argparse
import json
import logging

import pytest

from ldm_runtime.bundle.manifest import MANIFEST_NAME, manifest_digest
from ldm_runtime.cli import bench, main
from ldm_runtime.cli.messages import MessageFormatter
from ldm_runtime.escaping import printable, printable_lines

#: Sets the title of a window, rings, turns red, goes back to the start of the line, turns text.
ESCAPES = "\x1b]0;pwned\x07\x1b[31m\rOK\u202e"
SHOWN = "\\x1b]0;pwned\\x07\\x1b[31m\\rOK\\u202e"


@pytest.mark.parametrize(
    "line",
    [
        json.dumps({ESCAPES: 1}),
        json.dumps({"prompt": "red", "image": ESCAPES}),
        json.dumps({"prompt": "red", "sampler": ESCAPES}),
        json.dumps({"prompt": "red", "schedule": ESCAPES}),
    ],
)
def test_nothing_in_a_file_of_requests_can_steer_the_terminal(line, tiny_bundle, tmp_path, capsys):
    file = tmp_path / "requests.jsonl"
    file.write_text(line)

    status = main(["generate", "--bundle", str(tiny_bundle), "--requests", str(file)])

    error = capsys.readouterr().err
    assert status == 2
    assert error.removesuffix("\n").isprintable()
    assert "\\x1b" in error


@pytest.mark.parametrize("field", ["tokenizer_file", "golden", "files"])
def test_no_path_in_a_manifest_can_steer_the_terminal(field, own_bundle, capsys):
    manifest = json.loads((own_bundle / MANIFEST_NAME).read_text())
    if field == "tokenizer_file":
        manifest[field] = ESCAPES
    elif field == "golden":
        manifest[field] = [ESCAPES]
    else:
        manifest[field][0]["path"] = ESCAPES
    manifest["digest"] = manifest_digest(manifest)
    (own_bundle / MANIFEST_NAME).write_text(json.dumps(manifest))

    status = main(["verify", str(own_bundle)])

    captured = capsys.readouterr()
    assert status == 1
    assert captured.err.removesuffix("\n").isprintable()
    assert all(line.isprintable() for line in captured.out.split("\n"))


def test_warnings_and_the_words_of_libraries_cannot_steer_the_terminal():
    record = logging.LogRecord("x", logging.WARNING, "", 0, "it says %s", (ESCAPES,), None)

    line = MessageFormatter().format(record)

    assert line == f"warning: it says {SHOWN}"


def test_text_that_can_be_printed_is_left_alone():
    assert printable("größer, 红色 · 𝄞") == "größer, 红色 · 𝄞"
    assert printable_lines("a\n\x1bb\n") == "a\n\\x1bb\n"
    assert printable("a\nb\tc\ud800\u2028") == "a\\nb\\tc\\ud800\\u2028"


def test_no_name_in_a_bundle_can_steer_the_terminal_of_a_report(own_bundle, capsys):
    manifest = json.loads((own_bundle / MANIFEST_NAME).read_text())
    manifest["spec"]["family"] = manifest["build"]["checkpoint"] = ESCAPES
    manifest["digest"] = manifest_digest(manifest)
    (own_bundle / MANIFEST_NAME).write_text(json.dumps(manifest))

    for command in (["inspect"], ["inspect", "--full"], ["inspect", "--json"]):
        assert main([*command, str(own_bundle)]) == 0
    bench._shown(argparse.Namespace(json=False, quiet=False))(f"{ESCAPES}\n{ESCAPES}")

    captured = capsys.readouterr()
    assert all(line.isprintable() for line in (captured.out + captured.err).split("\n"))
