"""The comparison with other programs, with workers that stand in for them."""

import json
import subprocess
import sys
from argparse import ArgumentTypeError
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import latency
from ldm_runtime.errors import LdmError
from ldm_runtime.testing import write_tiny_bundle
from measuring.rows import ROOT, read_records
from peers import environment, flags, report
from peers.entrants import OWN, PEERS, PINS, WORKERS, Entrant, starts
from peers.race import Race, Task
from scripts import peers_page

#: Generates an image of the colour in its options.
_WORKER = """
import time
from PIL import Image
from protocol import Clock, Job, Opened, main

def open_model(job: Job) -> Opened:
    if "fault" in job.options:
        raise SystemExit(job.options["fault"])
    clock = Clock()
    step = clock.timed(lambda: time.sleep(0.001))
    def generate():
        for _ in job.sigmas[:-1]:
            step()
        colour = (job.options["colour"],) * 3
        return Image.new("RGB", (job.width, job.height), colour), clock.take()
    return Opened(generate, ("numpy",))

main(open_model)
"""
_TASK = Task(steps=3, width=32, height=16, threads=1)


class TinyWeights:
    """A tiny bundle in the place of all forms."""

    narrow = True

    def __init__(self, folder):
        self.folder = folder

    def form(self, name):
        bundle = self.folder / "engines"
        if not bundle.is_dir():
            write_tiny_bundle(bundle)
        return bundle


@pytest.fixture
def weights(tmp_path):
    return TinyWeights(tmp_path / "weights")


@pytest.fixture
def fake(tmp_path):
    """A peer in the environment of the tests."""
    worker = tmp_path / "worker.py"
    worker.write_text(_WORKER)

    def entrant(name, precisions=("fp32",), **options):
        return Entrant(
            name=name,
            environment=None,
            worker=str(worker),
            form="bundle",
            precisions=precisions,
            options={"colour": 100, **options},
        )

    return entrant


def row(entrant="a peer", precision="fp32", seconds=2.0, **changes):
    return {
        "run": "one",
        "date": "2026-12-02T06:25:00+00:00",
        "commit": "0123abc",
        "machine": "a machine",
        "settings": {
            **{"model": "sd15", "steps": 8, "width": 512, "height": 512, "threads": 2},
            "guidance_scale": 7.5,
        },
        "entrant": entrant,
        "precision": precision,
        "repetition": 1,
        "open_seconds": 1.0,
        "first_image_seconds": 3.0,
        "next_image_seconds": seconds,
        "unet_seconds": [0.1, 0.2, 0.3],
        "peak_bytes": 4_000_000_000,
        "psnr_db": 41.2,
        "versions": {"numpy": "2.4.6"},
        "failure": None,
        **changes,
    }


OURS = "ldm-deploy openvino"


def test_entrants_take_turns_and_every_process_is_a_row(weights, fake):
    entrants = starts([fake("one"), fake("two", ("fp32", "bf16"), colour=110)])

    rows = list(Race(weights, _TASK).rows(entrants, rounds=2))

    assert [(each["entrant"], each["precision"], each["repetition"]) for each in rows] == [
        *[("one", "fp32", 1), ("two", "fp32", 1), ("two", "bf16", 1)],
        *[("one", "fp32", 2), ("two", "fp32", 2), ("two", "bf16", 2)],
    ]
    assert len({each["run"] for each in rows}) == 1
    for each in rows:
        assert each["settings"].items() >= {"steps": 3, "width": 32, "threads": 1}.items()
        assert len(each["unet_seconds"]) == len(each["first_unet_seconds"]) == 3
        assert sum(each["unet_seconds"]) < each["next_image_seconds"]
        assert each["peak_bytes"] > 5_000_000
        assert each["versions"] == {"numpy": np.__version__}


def test_images_are_compared_with_those_of_the_first_entrant_in_fp32(weights, fake):
    entrants = starts([fake("half", ("fp16",)), fake("first"), fake("other", colour=110)])

    half, first, other = Race(weights, _TASK).rows(entrants, rounds=1)

    assert (half["psnr_db"], half["psnr_to"]) == (None, None)
    assert (first["psnr_db"], first["psnr_to"]) == (None, "first fp32")
    assert other["psnr_to"] == "first fp32"
    assert other["psnr_db"] == pytest.approx(20 * np.log10(255 / 10))


def test_a_peer_that_fails_is_a_row_with_a_sentence_and_the_others_go_on(weights, fake):
    entrants = starts([fake("broken", fault="no such instruction"), fake("whole")])

    rows = list(Race(weights, _TASK).rows(entrants, rounds=2))

    assert [each["entrant"] for each in rows] == ["broken", "whole", "whole"]
    assert rows[0]["failure"] == "ended with 1: no such instruction"
    assert report.failures(rows) == ["broken fp32: ended with 1: no such instruction"]
    assert "* Not measured: broken fp32: ended with 1: no such instruction" in report.table(rows)


def test_a_peer_without_its_environment_says_what_installs_it(weights, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "ENVIRONMENTS", tmp_path)

    (found,) = Race(weights, _TASK).rows(starts([PEERS["optimum-onnx"]]), rounds=2)

    assert found["failure"] == "not installed: run `make peers PEERS=optimum_onnx`"


def test_what_is_compiled_is_prepared_once_for_the_same_versions_and_weights(weights, fake, capfd):
    entrants = starts([fake("one")])

    list(Race(weights, _TASK).rows(entrants, rounds=1))
    list(Race(weights, _TASK).rows(entrants, rounds=1))
    list(Race(weights, replace(_TASK, width=64)).rows(entrants, rounds=1))

    assert capfd.readouterr().err.count("preparing one fp32") == 2


def test_this_package_is_measured_by_the_same_protocol(weights):
    (found,) = Race(weights, _TASK).rows(starts([OWN[0]]), rounds=1)

    assert found["failure"] is None
    assert len(found["unet_seconds"]) == 3
    assert found["versions"].keys() == {"ldm-deploy", "numpy", "onnxruntime"}


def test_rows_are_kept_and_printed_and_a_failure_is_the_exit_code(weights, fake, tmp_path, capsys):
    results = tmp_path / "peers.jsonl"
    entrants = [fake("one"), fake("broken", fault="no")]
    args = SimpleNamespace(precision=None, repetitions=2, results=results, narrow=True, json=True)

    code = flags.run(Race(weights, _TASK), entrants, args)

    kept = [json.loads(line) for line in results.read_text().splitlines()]
    printed = capsys.readouterr()
    assert code == 1
    assert [each["entrant"] for each in kept] == ["broken", "one", "one"]
    assert [json.loads(line) for line in printed.out.splitlines()] == kept
    assert "| one |" in printed.err


def test_rows_of_two_runs_are_not_compared():
    with pytest.raises(ValueError, match="rows of several runs do not compare: one, two"):
        report.table([row(), row(run="two")])


def test_the_last_run_is_the_one_that_began_last():
    rows = [row(run="20261202T0625"), row(run="20261203T0100"), row(run="20261203T0100")]

    assert report.latest_run(rows) == rows[1:]


def test_a_table_holds_one_precision_and_compares_with_ours_in_it_alone():
    rows = [
        row("a peer", seconds=4.0),
        row(OURS, seconds=2.0),
        row("a peer", "bf16", seconds=3.0),
        row(OURS, "bf16", seconds=1.0),
        row("another", "fp16", seconds=9.0),
    ]

    lines = report.table(rows)

    cells = [line.strip("| ").split(" | ") for line in lines if "GB" in line]
    assert [(each[0], each[3], each[-1]) for each in cells] == [
        (f"**{OURS}**", "2.0 s", "1.00×"),
        ("a peer", "4.0 s", "2.00×"),
        (f"**{OURS}**", "1.0 s", "1.00×"),
        ("a peer", "3.0 s", "3.00×"),
        ("another", "9.0 s", "–"),
    ]
    assert sum(line.startswith("**") for line in lines) == 3


def test_a_summary_is_of_medians_the_highest_memory_and_the_lowest_likeness():
    rows = [
        row(seconds=2.0, peak_bytes=5, psnr_db=None),
        row(seconds=3.0, peak_bytes=7, psnr_db=50.0, unet_seconds=[0.5, 0.5]),
        row(seconds=3.3, peak_bytes=6, psnr_db=45.0),
    ]

    (found,) = report.summaries(rows)

    assert found.seconds["next_image"] == 3.0
    assert found.seconds["unet"] == pytest.approx(0.25)
    assert found.spread == pytest.approx(0.1)
    assert (found.peak_bytes, found.psnr_db) == (7, 45.0)


def test_only_precisions_that_were_asked_for_are_measured():
    names = [str(each) for each in starts([*PEERS.values(), *OWN], ["bf16"])]

    assert names == [
        *("diffusers bf16", "diffusers-compile bf16", "openvino-genai bf16"),
        *("ldm-deploy openvino bf16", "ldm-deploy openvino low-memory bf16"),
    ]


def test_every_peer_has_a_worker_and_pins():
    for entrant in PEERS.values():
        assert (WORKERS / entrant.worker).is_file()
        pins = (PINS / f"{entrant.environment}.txt").read_text().splitlines()
        assert pins[0].startswith("#")
        assert all("==" in pin for pin in pins[1:])


def test_environments_that_have_torch_have_that_of_the_project():
    (wanted,) = (
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("torch==")
    )
    torches = [
        line
        for file in PINS.glob("*.txt")
        for line in file.read_text().splitlines()
        if line.startswith("torch==")
    ]

    assert torches == [wanted] * 3


def test_the_protocol_needs_the_standard_library_alone():
    command = "import protocol, sys; print(sorted({'numpy', 'PIL', 'torch'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", command],
        env={"PYTHONPATH": str(WORKERS)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == "[]\n"


def test_names_of_peers_are_read_with_commas():
    assert flags.peer_names("optimum-onnx, diffusers") == ["optimum-onnx", "diffusers"]
    assert flags.peer_names("all") == list(PEERS)
    with pytest.raises(ArgumentTypeError, match=r"unknown peer 'difusers' \(did you mean"):
        flags.peer_names("difusers")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "cin256"), "with the weights of --model sd15 alone"),
        (("--bundle", "engines"), "with the weights of --model sd15 alone"),
        (("--batch", "2"), "at one image a call, not at --batch 2"),
    ],
)
def test_what_peers_are_not_compared_at_is_refused(arguments, message, capsys):
    assert latency.main(["--peers", *arguments]) == 1

    assert message in capsys.readouterr().err


def test_the_page_says_what_was_measured_and_the_chart_has_a_bar_for_each():
    rows = [
        row("a <peer>", seconds=4.0),
        row(OURS, seconds=2.0, repetition=2),
        row("late", failure="not installed: run `make peers`"),
    ]

    text, drawing = peers_page.page(rows), peers_page.chart(rows)

    assert "512×512 pixels in 8 steps" in text
    assert "2 threads, 2 repetitions" in text
    assert "`python benchmarks/latency.py --peers --repetitions 2`" in text
    assert "In brackets" in text
    assert "In brackets" not in peers_page.page([row("late"), row(OURS)])
    assert "* Not measured: late fp32: not installed" in text
    assert drawing.count("<rect") == 1 + 2 * 2
    assert "a &lt;peer&gt;" in drawing
    assert len(drawing) < 60_000


def test_the_page_is_of_the_last_run_at_full_size():
    narrow = {"model": "sd15 (narrow)"}
    rows = [row(run="1"), row(run="2"), row(run="3", settings=narrow)]

    assert peers_page.rows_of_run(rows) == [rows[1]]
    assert peers_page.rows_of_run(rows, "1") == [rows[0]]
    with pytest.raises(SystemExit, match="no rows of 9 in"):
        peers_page.rows_of_run(rows, "9")
    with pytest.raises(LdmError, match="not installed"):
        environment.python_of("nowhere")


def test_the_committed_page_and_chart_are_those_of_the_committed_rows():
    if not peers_page.ROWS.is_file():
        assert not peers_page.PAGE.exists()
        return
    rows = peers_page.rows_of_run(read_records(peers_page.ROWS))

    assert peers_page.PAGE.read_text(encoding="utf-8") == peers_page.page(rows), "run `make docs`"
    assert peers_page.CHART.read_text(encoding="utf-8") == peers_page.chart(rows)


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path, monkeypatch):
    from released import cached_models

    monkeypatch.setattr(cached_models, "CACHE", tmp_path)
    path = tmp_path / "cin256-narrow/random.ckpt"
    path.parent.mkdir()
    path.write_bytes(b"a checkpoint")

    assert cached_models.random_checkpoint("cin256", narrow=True) == path
    assert path.read_bytes() == b"a checkpoint"


@pytest.mark.parametrize("name", [None, "onnx"])
def test_no_program_of_the_race_reports_to_its_makers(name, monkeypatch):
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setattr(environment, "python_of", lambda _: sys.executable)

    found = environment.run_in(
        name, ["-c", "import os; print(os.environ['ORT_DISABLE_TELEMETRY'])"], threads=1, cache=None
    )

    assert found.strip() == "1"
