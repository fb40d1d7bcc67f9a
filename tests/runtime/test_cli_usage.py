"""How both commands answer to what was typed: help, versions, wrong usage, failures."""

import json
import math
import os
import platform
import subprocess
import sys

import pytest
from PIL import Image

from ldm_runtime.backends import get_backend
from ldm_runtime.cli.commands import build_parser, main
from ldm_runtime.diagnostics.verify import Check
from ldm_runtime.pipeline.image_files import save_image
from ldm_runtime.version import version
from tests.runtime.command_process import (
    ROOT,
    needs_full_device,
    run_into_closed_pipe,
    run_module,
    run_on_full_disk,
)

COMMANDS = tuple(build_parser().subcommands())


def strict_json(text):
    """Read JSON, without the Infinity and NaN that Python's reader takes for numbers."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def usage_error(arguments, capsys):
    """The one line on stderr, without its "error: " and its hint to the help."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    out, err = capsys.readouterr()
    message, _, hint = err.partition("; see `ldm")
    assert (caught.value.code, out) == (2, "")
    assert message.startswith("error: ")
    assert hint.endswith(" --help`\n")
    assert err.count("\n") == 1
    return message.removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to do, such as `ldm generate`"),
        (["generatee"], "unknown command 'generatee' (did you mean generate?); choose generate, "),
        (["verify"], "the following arguments are required: bundle"),
        (["generate", "red", "--stpes", "5"], "unknown option --stpes (did you mean --steps or "),
        (["generate", "red", "--step=5"], "unknown option --step (did you mean --steps?)"),
        (["generate", "red", "--frobnicate"], "unknown option --frobnicate"),
        (
            ["generate", "red", "--guidance", "5"],
            "unknown option --guidance (did you mean --guidance-scale, --guidance-rescale or "
            "--guidance-interval?)",
        ),
        (
            ["generate", "a", "red", "circle", "--seed", "7"],
            'unexpected "red circle"; put quotes around the words: "a red circle"',
        ),
        (["inspect", "a", "b"], 'unexpected "b"'),
        (["generate", "red", "--steps", "many"], "invalid int value: 'many'"),
        (["generate", "red", "--threads", "0"], "must be a whole number from 1, got '0'"),
        (["verify", "b", "--backend", "cup"], "unknown backend 'cup' (did you mean cpu?); choose"),
        (["doctor", "--quiet", "--verbose"], "not allowed with argument"),
    ],
)
def test_wrong_usage_is_one_line_with_what_was_meant(arguments, message, capsys):
    assert message in usage_error(arguments, capsys)


@pytest.mark.parametrize("flags", [["--backend", "cpu"], ["--device", "cpu"], ["-b", "cpu"]])
def test_the_backend_of_the_cpu_may_be_called_cpu(flags):
    assert build_parser().parse_args(["generate", "red", *flags]).backend == "onnxruntime"


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_plain_ascii(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])

    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert out.startswith("usage: ldm")
    assert out.isascii()


def test_what_an_encoding_lacks_is_escaped(tmp_path):
    save_image(Image.new("RGB", (1, 1)), tmp_path / "a.png", {"prompt": "five €, señor"})

    done = run_module("ldm_runtime", "inspect", str(tmp_path / "a.png"), PYTHONIOENCODING="latin-1")

    assert done.returncode == 0, done.stderr
    assert b"prompt: five \\u20ac, se\xf1or" in done.stdout


def test_the_module_is_the_command_and_the_version_names_what_runs_it():
    done = run_module("ldm_runtime", "--version")

    onnxruntime = get_backend("onnxruntime").version()
    assert done.stdout.decode() == (
        f"ldm {version()}, Python {platform.python_version()}, ONNX Runtime {onnxruntime}\n"
    )


def test_help_loads_no_engine():
    code = (
        "import sys\nfrom ldm_runtime.cli.commands import build_parser\n"
        "build_parser().format_help()\nprint(*sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )

    assert {"onnxruntime", "starlette", "torch", "uvicorn"}.isdisjoint(done.stdout.split())


def test_a_package_that_is_missing_is_one_sentence(monkeypatch, capsys):
    def diagnose():
        raise ModuleNotFoundError("No module named 'yaml'", name="yaml")

    monkeypatch.setattr("ldm_runtime.diagnostics.doctor.diagnose", diagnose)

    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == (
        "error: the package 'yaml' is not installed; install the extra that has it\n"
    )


def test_verify_in_json_has_every_check(tiny_bundle, capsys):
    assert main(["verify", str(tiny_bundle), "--json"]) == 0

    report = strict_json(capsys.readouterr().out)
    assert report["passed"] is True
    assert len(report["checks"]) == 13
    image = next(each for each in report["checks"] if each["measure"] == "psnr")
    assert image.keys() == {"subject", "measure", "value", "bound", "passed"}


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_value_that_json_does_not_have_is_null(value, monkeypatch, capsys):
    check = Check(subject="golden/0 image 0", measure="psnr", value=value, bound=60.0)
    monkeypatch.setattr("ldm_runtime.diagnostics.verify.verify", lambda *_, **__: iter([check]))

    main(["verify", "engines", "--json"])

    report = strict_json(capsys.readouterr().out)
    assert report["checks"][0]["value"] is None
    assert report["passed"] is (value == math.inf)


@needs_full_device
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--version"], ["completion", "bash"]])
def test_a_full_disk_under_stdout_is_one_sentence(arguments, unbuffered):
    done = run_on_full_disk("ldm_runtime", *arguments, unbuffered=unbuffered)

    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.endswith(b": No space left on device\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_that_its_reader_closed_ends_the_command_in_silence(unbuffered):
    done = run_into_closed_pipe("ldm_runtime", "--version", unbuffered=unbuffered)

    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(os.name == "nt", reason="a shell of Unix closes the stream")
@pytest.mark.parametrize("stream", [">&-", "2>&-"])
def test_a_stream_that_is_closed_from_the_start_is_not_missed(stream):
    command = f'"$0" -m ldm_runtime completion bash {stream}'

    done = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, cwd=ROOT)

    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(os.name == "nt", reason="a shell of Unix closes the stream")
def test_errors_do_not_go_to_stdout_where_stderr_is_closed():
    command = '"$0" -m ldm_runtime inspect /nowhere 2>&-'

    done = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, cwd=ROOT)

    assert (done.returncode, done.stdout) == (1, b"")


def test_quiet_says_nothing_and_verbose_says_more(tiny_bundle, tmp_path):
    where = ("--bundle", str(tiny_bundle), "--out-dir", str(tmp_path))

    quiet = run_module(
        "ldm_runtime", "generate", "red " * 40, "--literal-prompt", "--quiet", *where
    )
    plain = run_module("ldm_runtime", "generate", "red " * 40, "--literal-prompt", *where)

    assert (quiet.returncode, quiet.stderr) == (0, b"")
    assert quiet.stdout.decode().strip() == str(next(tmp_path.glob("0000-*")))
    assert plain.stderr.startswith(b"warning: prompt is longer than")
