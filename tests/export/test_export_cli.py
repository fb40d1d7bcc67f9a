import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm_export.cli import build_parser, main, say_next
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.bundle.quantized_graphs import Range
from ldm_runtime.testing import write_tiny_bundle
from ldm_runtime.version import version
from tests.export.archives import Entry, write_archive
from tests.export.opcodes import call, pickled, text
from tests.runtime.command_process import (
    needs_full_device,
    run_into_closed_pipe,
    run_on_full_disk,
)

pytestmark = pytest.mark.usefixtures("quiet_loggers")


@pytest.fixture
def quiet_loggers(caplog):
    """Let pytest restore the levels that the command sets."""
    for name in ("ldm_export", "ldm_runtime"):
        caplog.set_level("INFO", logger=name)


@pytest.fixture
def command(tmp_path, capsys):
    """Run the command; return its exit status, stdout and stderr lines, and what it wrote."""

    def run(ckpt, *arguments, out="engines"):
        before = set(tmp_path.rglob("*"))
        status = main(["--ckpt", str(ckpt), "--out", str(tmp_path / out), *arguments])
        captured = capsys.readouterr()
        written = set(tmp_path.rglob("*")) - before
        return status, captured.out, captured.err.splitlines(), written

    return run


def test_a_missing_checkpoint_is_one_line(command, tmp_path):
    status, out, lines, written = command(tmp_path / "absent.ckpt")

    assert status == 1
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "absent.ckpt" in lines[0]
    assert (out, written) == ("", set())


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"hello, world", "neither a torch nor"), (b"", "is empty"), (b"PK\3\4junk", "")],
)
def test_what_is_not_a_checkpoint_is_one_line(command, tmp_path, content, words):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)

    status, out, lines, written = command(path)

    assert status == 1
    assert len(lines) == 1
    assert "model.ckpt" in lines[0]
    assert words in lines[0]
    assert (out, written) == ("", set())


def test_an_unknown_model_is_an_error_without_a_traceback(command, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"transformer.weight": torch.zeros(3, 3)}}, path)

    status, out, lines, written = command(path)

    assert status == 1
    assert lines[0].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    assert (out, written) == ("", set())


def test_a_folder_that_is_no_bundle_is_an_error(command, tmp_path, small_checkpoint_path):
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines/thesis.tex").write_text("years of work")

    status, _, lines, written = command(small_checkpoint_path)

    assert status == 1
    assert len(lines) == 1
    assert "is not a bundle" in lines[0]
    assert written == set()


def test_a_size_that_the_model_cannot_draw_is_an_error(command, small_checkpoint_path):
    status, _, lines, written = command(small_checkpoint_path, "--height", "65")

    assert status == 1
    assert any("--height" in line for line in lines)
    assert written == set()


def test_the_result_and_the_plan_can_be_json(command, tmp_path, small_checkpoint_path):
    _, plan, _, written = command(small_checkpoint_path, "--estimate", "--json", "--height", "64")
    status, result, _, _ = command(small_checkpoint_path, "--json", "--engines", "none")

    planned, made = json.loads(plan), json.loads(result)
    assert (status, written) == (0, set())
    assert planned["task"] == made["task"] == "text-to-image"
    assert planned["seconds"] == pytest.approx(sum(planned["step_seconds"].values()))
    heights = [each for each in planned["assumptions"] if each["field"] == "defaults.height"]
    assert heights == [{"field": "defaults.height", "value": "64", "source": "flag"}]
    assert load_manifest(Path(made["bundle"])).build.checkpoint_sha256 == made["checkpoint_sha256"]


def test_an_export_can_add_graphs_in_8_bits(command, small_checkpoint_path, kept_traces):
    size = ("--height", "64", "--width", "64")
    flags = ("--engines", "none", "--quantize", "int8", "--json")
    status, result, _, _ = command(small_checkpoint_path, *flags, *size)

    made = json.loads(result)
    record = load_manifest(Path(made["bundle"])).quantization
    assert status == 0
    assert made["quantization"]["psnr"] == list(record.psnr)
    assert min(record.psnr) >= record.least_psnr


def test_a_bundle_that_8_bits_would_spoil_is_complete_without(
    command, small_checkpoint_path, kept_traces, monkeypatch
):
    monkeypatch.setattr(Range, "scale", 10.0)
    size = ("--height", "64", "--width", "64")
    flags = ("--engines", "none", "--quantize", "int8")
    status, _, lines, _ = command(small_checkpoint_path, *flags, *size)

    (error,) = (line for line in lines if line.startswith("error: "))
    assert status == 1
    assert re.match(r"error: .* is complete but for graphs in 8 bits: .* less than 25 dB", error)


def test_a_place_that_cannot_be_written_is_one_line(command, tmp_path, small_checkpoint_path):
    (tmp_path / "file").write_text("")

    status, _, lines, _ = command(small_checkpoint_path, out="file/engines")

    assert status == 1
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert "file" in errors[0]


def test_a_plan_names_everything_and_writes_nothing(command, small_checkpoint_path):
    status, out, _, written = command(
        *(small_checkpoint_path, "--estimate", "--height", "64", "--width", "64"),
        *("--preset", "lcm"),
    )

    assert status == 0
    words = ("stable-diffusion-1", "text-to-image (from prompt)", "text_encoder", "unet")
    for word in (*words, "vae_decoder", "memory", "time"):
        assert word in out
    assert "defaults.height = 64 (from flag)" in out
    assert "defaults.sampler = lcm (from preset lcm)" in out
    assert "defaults.num_inference_steps = 4 (from preset lcm)" in out
    assert written == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a checkpoint and a folder, as in `ldm-export model.ckpt engines/`"),
        (["--ckpt", "a.ckpt"], "give a checkpoint and a folder"),
        (["a", "b", "c"], 'unexpected "c"; give one checkpoint and one folder'),
        (["--ckpt", "a", "--out", "b", "c"], 'unexpected "c"'),
        (["a", "b", "--weights-dtype", "fp31"], "unknown value 'fp31' (did you mean fp"),
        (["a", "b", "--height", "tall"], "invalid int value: 'tall'"),
        (["a", "b", "--unknown"], "unknown option --unknown"),
        (["a", "b", "--num-head", "3"], "--num-head (did you mean --num-heads or --num-head-chan"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.endswith("; see `ldm-export --help`\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ckpt", "absent.ckpt", "--out", "engines/"],
        ["absent.ckpt", "engines/"],
        ["absent.ckpt", "--weights-dtype", "fp32", "engines/"],
        ["--out", "engines/", "absent.ckpt"],
        ["engines/", "--ckpt", "absent.ckpt"],
    ],
)
def test_checkpoint_and_folder_are_flags_or_in_their_order(arguments, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("ldm_export.cli._export", asked.append)

    assert main(arguments) == 0

    (args,) = asked
    assert (str(args.ckpt), str(args.out)) == ("absent.ckpt", "engines")


def test_the_version_names_the_libraries(capsys):
    assert main(["--version"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"ldm-export {version()}, Python {platform.python_version()}, ")
    assert f"torch {torch.__version__}" in line


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "ldm_export", "--help"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=True,
    )

    assert done.stdout.startswith(b"usage: ldm-export")
    assert b"\\u" not in done.stdout


def test_every_fact_has_a_flag():
    flags = {
        "--ckpt": "a.ckpt",
        "--out": "engines",
        "--config": "a.yaml",
        "--weights": "model",
        "--num-heads": "8",
        "--prediction-type": "v_prediction",
        "--latent-scale-factor": "0.5",
        "--height": "64",
        "--width": "32",
    }

    words = [word for pair in flags.items() for word in pair]
    args = build_parser().parse_args([*words, "--zero-terminal-snr"])

    assert args.zero_terminal_snr
    assert build_parser().parse_args(words).zero_terminal_snr is None
    assert (args.weights, args.num_heads, args.height, args.width) == ("model", 8, 64, 32)
    assert args.latent_scale_factor == 0.5


def test_the_flag_of_zero_terminal_snr_reaches_the_bundle(command, small_checkpoint_path):
    size = ("--height", "64", "--width", "64")
    flags = ("--estimate", "--prediction-type", "v_prediction", "--zero-terminal-snr")

    status, out, _, _ = command(small_checkpoint_path, *size, *flags)

    assert status == 0
    assert "alphas_cumprod = rescaled to zero terminal SNR (from flag)" in out


def test_help_needs_neither_torch_nor_onnx():
    code = (
        "import sys\nfrom ldm_export.cli import build_parser\nbuild_parser().format_help()\n"
        "print(*sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert {"torch", "onnx", "onnx_ir", "onnxscript", "transformers"}.isdisjoint(
        done.stdout.split()
    )


@pytest.mark.parametrize("package", ["torch", "onnx_ir"])
def test_without_a_package_that_exporting_needs_the_command_says_which(
    package, tmp_path, small_checkpoint_path
):
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from ldm_export.cli import main\n"
        f"sys.exit(main(['--ckpt', {str(small_checkpoint_path)!r}, "
        f"'--out', {str(tmp_path / 'engines')!r}]))\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"the package '{package}' is not installed" in line
    assert line.endswith("install the extra 'export' of ldm-deploy")
    assert list(tmp_path.iterdir()) == []


def test_the_end_says_where_the_bundle_is_what_to_look_at_and_what_to_type(tmp_path, capsys):
    bundle = tmp_path / "my bundle"

    say_next("super-resolution", bundle)

    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"the bundle is in {bundle}; ")
    assert first.endswith(f": {bundle}/golden/sheet.png")
    assert second == f"next: ldm generate --image small.png --bundle '{bundle}'"


def test_an_interrupt_says_how_to_go_on(tmp_path, capsys, small_checkpoint_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm_export.bundle.export_bundle", interrupted)

    status = main(["--ckpt", str(small_checkpoint_path), "--out", str(tmp_path / "engines")])

    assert status == 130
    assert "run the same command again" in capsys.readouterr().err


def test_a_refused_file_cannot_rewrite_its_own_refusal(command, tmp_path):
    name = "os.system\x1b[2K\rOK: file is safe"
    path = write_archive(
        tmp_path / "model.ckpt",
        [Entry(name="x/data.pkl", data=pickled(call(name, text("true"))))],
    )

    status, out, lines, written = command(path)

    assert status == 1
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert "names os.system\\x1b[2K\\rOK: file is safe" in lines[0]
    assert (out, written) == ("", set())


def test_too_little_memory_is_one_line(tmp_path, capsys, small_checkpoint_path, monkeypatch):
    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr("ldm_export.bundle.export_bundle", exhausted)

    status = main(["--ckpt", str(small_checkpoint_path), "--out", str(tmp_path / "engines")])

    assert status == 1
    assert capsys.readouterr().err == (
        "error: not enough memory; `--estimate` prints how much the export takes\n"
    )


@pytest.mark.parametrize(("flags", "says"), [([], True), (["--quiet"], False)])
def test_quiet_prints_the_folder_alone(tmp_path, capsys, monkeypatch, flags, says):
    checkpoint = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, checkpoint)
    manifest = write_tiny_bundle(tmp_path / "tiny")
    monkeypatch.setattr("ldm_export.bundle.export_bundle", lambda *_, **__: manifest)

    assert main([str(checkpoint), str(tmp_path / "engines"), *flags]) == 0

    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'engines'}\n"
    assert ("next: ldm generate" in captured.err) is says
    assert (captured.err == "") is not says


@needs_full_device
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_stdout_is_one_sentence(unbuffered):
    done = run_on_full_disk("ldm_export", "--version", unbuffered=unbuffered)

    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.endswith(b": No space left on device\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_that_its_reader_closed_ends_the_command_in_silence(unbuffered):
    done = run_into_closed_pipe("ldm_export", "--version", unbuffered=unbuffered)

    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(os.name == "nt", reason="a shell of Unix closes the stream")
def test_a_stdout_that_is_closed_from_the_start_is_not_missed():
    command = '"$0" -m ldm_export --version >&-'

    done = subprocess.run(["sh", "-c", command, sys.executable], stderr=subprocess.PIPE)

    assert (done.returncode, done.stderr) == (0, b"")
