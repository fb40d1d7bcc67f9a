"""`ldm batch`: the same images as `ldm generate`, and nothing lost or made twice, whatever dies."""

import codecs
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ldm_runtime import Generator
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.cli import main
from ldm_runtime.requests.request_json import request_to_fields
from ldm_runtime.specs.tasks import TASKS
from ldm_runtime.testing import tiny_requests, write_tiny_bundle
from ldm_serve.batch.folder import BatchFolder
from ldm_serve.batch.units import BatchModel, RequestFile
from ldm_serve.errors import BatchError
from ldm_serve.executors.worker import Worker
from tests.serve.batches import HashExecutor, files_of, results_of, run_batch

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "ldm_runtime", "batch"]


def write_lines(path, *requests):
    path.write_text("".join(json.dumps(each) + "\n" for each in requests))
    return path


def prompts(count, **fields):
    return [{"prompt": f"image {number}", **fields} for number in range(count)]


def ldm_batch(requests, out, bundle, *flags):
    """Run the command in this process and return its exit status."""
    arguments = ["batch", requests, "--out", out, "--bundle", bundle, "--threads", 1, *flags]
    return main([*map(str, arguments)])


def started(requests, out, bundle, *flags):
    """Run the command in a process of its own."""
    arguments = [requests, "--out", out, "--bundle", bundle, "--threads", 1, *flags]
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def wait_for_lines(out, count, process):
    """Wait until the log of a running batch has a number of lines."""
    log, end = out / "results.jsonl", time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end, "the batch makes no progress"
        if process.poll() is not None:
            return
        time.sleep(0.005)


def without_seconds(out):
    return sorted(
        (each["line"], each["image"], each["seed"], each["path"], each["sha256"])
        for each in results_of(out)
    )


class TestImages:
    @pytest.mark.parametrize("task", TASKS)
    def test_are_those_of_the_generator(self, task, tmp_path):
        bundle = tmp_path / "bundle"
        write_tiny_bundle(bundle, task)
        requests = [request_to_fields(each) for each in tiny_requests(task)]
        file = write_lines(tmp_path / "requests.jsonl", *requests)

        assert ldm_batch(file, tmp_path / "out", bundle, "--executor", "inline") == 0

        found = {(each["line"], each["image"]): each for each in results_of(tmp_path / "out")}
        with Generator(bundle, threads=1) as generator:
            for line, fields in enumerate(requests, start=1):
                result = generator.generate(fields)
                for image in range(len(result)):
                    path = tmp_path / "out" / found.pop((line, image))["path"]
                    assert path.read_bytes() == result.encoded(image)
        assert not found

    def test_share_calls_in_worker_processes(self, bundle, tmp_path):
        np.save(tmp_path / "noise.npy", np.full((2, 4, 8, 8), 0.5, dtype=np.float32))
        size = {"width": 16, "height": 16}
        requests = [
            {"prompt": "a red circle", "seed": 5, "num_images": 3, "num_inference_steps": 7},
            {"prompt": "a square", "seed": 2**64 - 1, "sampler": "euler_ancestral"},
            {
                "prompt": "a dog",
                "seed": 9,
                "num_images": 2,
                "variation_strength": 0.4,
                "variation_seed": 70,
            },
            {
                "prompt": "noise",
                "seed": 1,
                "num_images": 2,
                "latents": str(tmp_path / "noise.npy"),
                **size,
            },
            {"prompt": "unguided", "seed": 3, "guidance_scale": 1.0, "height": 24},
        ]
        file = write_lines(tmp_path / "requests.jsonl", *requests)

        assert ldm_batch(file, tmp_path / "out", bundle, "--workers", 2) == 0

        found = {(each["line"], each["image"]): each for each in results_of(tmp_path / "out")}
        assert len(found) == 9
        with Generator(bundle, threads=1) as generator:
            for line, fields in enumerate(requests, start=1):
                result = generator.generate(fields)
                for image, seed in enumerate(result.seeds):
                    result_line = found[line, image]
                    path = tmp_path / "out" / result_line["path"]
                    assert result_line["seed"] == seed
                    assert path.read_bytes() == result.encoded(image)

    def test_of_prompts_in_a_text_file(self, bundle, tmp_path):
        file = tmp_path / "prompts.txt"
        file.write_text("a red circle\n\na blue square\n")

        assert run_batch(file, tmp_path / "out", bundle).generated == 2
        assert sorted(each["line"] for each in results_of(tmp_path / "out")) == [1, 3]

    @pytest.mark.parametrize("name", ["requests", "r.jsonl"])
    def test_of_json_after_a_byte_order_mark(self, bundle, tmp_path, name):
        requests = tmp_path / name
        requests.write_bytes(codecs.BOM_UTF8 + b'{"prompt": "red", "seed": 7}\n')

        run_batch(requests, tmp_path / "out", bundle)

        assert [each["seed"] for each in results_of(tmp_path / "out")] == [7]

    def test_of_equal_requests_are_one_file(self, bundle, tmp_path):
        file = write_lines(tmp_path / "r.jsonl", *[{"prompt": "a dog", "seed": 7}] * 3)
        executor = HashExecutor()

        counts = run_batch(file, tmp_path / "out", bundle, executor)

        assert (counts.generated, counts.found) == (1, 2)
        assert len(executor.submitted) == 1
        (path,) = {each["path"] for each in results_of(tmp_path / "out")}
        assert files_of(tmp_path / "out").keys() == {"batch.json", path}


class TestOpenSeeds:
    def test_are_chosen_once_and_differ_from_line_to_line(self, bundle, tmp_path):
        file = write_lines(tmp_path / "r.jsonl", *[{"prompt": "a dog"}] * 20)
        model = BatchModel.of_bundle(bundle)
        with BatchFolder(tmp_path / "out") as folder:
            first = [unit.request.seed for unit in RequestFile(file, model, folder.seed)]
        with BatchFolder(tmp_path / "out") as folder:
            again = [unit.request.seed for unit in RequestFile(file, model, folder.seed)]
        with BatchFolder(tmp_path / "other") as folder:
            other = [unit.request.seed for unit in RequestFile(file, model, folder.seed)]

        assert first == again
        assert len({*first, *other}) == 40

    def test_of_a_variation_too(self, bundle, tmp_path):
        fields = {"prompt": "a dog", "seed": 3, "variation_strength": 0.5, "num_images": 2}
        file = write_lines(tmp_path / "r.jsonl", fields, fields)
        model = BatchModel.of_bundle(bundle)

        seeds = [unit.request.variation_seed for unit in RequestFile(file, model, 1)]

        assert seeds == [unit.request.variation_seed for unit in RequestFile(file, model, 1)]
        assert seeds[1] == seeds[0] + 1
        assert len(set(seeds)) == 4

    def test_can_have_every_image_of_the_largest_request(self, bundle, tmp_path):
        file = write_lines(tmp_path / "r.jsonl", {"prompt": "a dog", "num_images": 10_000})

        *_, last = RequestFile(file, BatchModel.of_bundle(bundle), 1)

        assert last.request.seed < 2**32

    def test_do_not_exist_without_sampling(self, tmp_path):
        write_tiny_bundle(tmp_path / "bundle", "autoencoder")
        (request, _) = tiny_requests("autoencoder")
        file = write_lines(tmp_path / "r.jsonl", request_to_fields(request))

        (unit,) = RequestFile(file, BatchModel.of_bundle(tmp_path / "bundle"), 1)

        assert unit.request.seed == 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"prompt": "a"}\n{"prompt": 3}\n', "r.jsonl, line 2: prompt: must be text, got 3"),
            (
                '{"prompt": "a"}\n{"prompd": "a"}\n',
                "r.jsonl, line 2: prompd: unknown field (did you mean",
            ),
            ('{"prompt": "a"}\n\n{"prompt"\n', "r.jsonl, line 3 is not a JSON object"),
            ('{"prompt": "a", "width": 17}\n', "r.jsonl, line 1: width: 17 is not a multiple"),
            ('{"prompt": "a", "image": "none.png"}\n', "r.jsonl, line 1: image: none.png cannot"),
            ("\n", "r.jsonl is empty; write one JSON object per line"),
            ("\ufeff".encode("utf-16").decode("latin-1"), "is text in UTF-16"),
        ],
    )
    def test_of_a_line_come_before_anything_is_generated(
        self, text, message, bundle, tmp_path, capsys
    ):
        file = tmp_path / "r.jsonl"
        file.write_bytes(text.encode("latin-1"))

        assert ldm_batch(file, tmp_path / "out", bundle) == 2

        assert message in capsys.readouterr().err
        assert files_of(tmp_path / "out").keys() == {"batch.json"}

    def test_of_another_file_that_would_replace_all_results(self, bundle, tmp_path, capsys):
        out = tmp_path / "out"
        requests = write_lines(tmp_path / "a.jsonl", *prompts(2, num_inference_steps=1))
        assert ldm_batch(requests, out, bundle, "--executor", "inline") == 0
        lines = results_of(out)
        other = write_lines(tmp_path / "b.jsonl", {"prompt": "another"})

        assert ldm_batch(other, out, bundle, "--executor", "inline") == 2

        assert "has the results of a.jsonl, which those of b.jsonl" in capsys.readouterr().err
        assert results_of(out) == lines
        renamed = requests.rename(tmp_path / "c.jsonl")
        assert ldm_batch(renamed, out, bundle, "--executor", "inline") == 0
        assert json.loads((out / "batch.json").read_bytes())["requests"] == "c.jsonl"

    def test_of_a_second_run_at_the_same_time(self, bundle, tmp_path, capsys):
        file = write_lines(tmp_path / "r.jsonl", *prompts(1))
        with BatchFolder(tmp_path / "out"):
            assert ldm_batch(file, tmp_path / "out", bundle) == 2

        assert "another run is writing to" in capsys.readouterr().err

    def test_of_files_in_place_of_folders_and_folders_in_place_of_files(
        self, bundle, tmp_path, capsys
    ):
        file = write_lines(tmp_path / "r.jsonl", *prompts(1))

        assert ldm_batch(file, file, bundle) == 2
        assert "out: " in capsys.readouterr().err
        assert ldm_batch(tmp_path, tmp_path / "out", bundle) == 2
        assert f"requests: {tmp_path} is not a file" in capsys.readouterr().err

    def test_of_a_damaged_record_of_the_batch(self, bundle, tmp_path, capsys):
        file = write_lines(tmp_path / "r.jsonl", *prompts(1))
        (tmp_path / "out").mkdir()
        (tmp_path / "out/batch.json").write_text("{}")

        assert ldm_batch(file, tmp_path / "out", bundle) == 1
        assert "batch.json is damaged: " in capsys.readouterr().err


class TestResume:
    def test_at_every_change_on_disk(self, bundle, tmp_path):
        requests = [
            {"prompt": "open", "num_images": 2},
            {"prompt": "seeded", "seed": 7},
            {"prompt": "seeded", "seed": 7},
        ]
        file = write_lines(tmp_path / "r.jsonl", *requests)

        done = subprocess.run(
            [sys.executable, "-m", "tests.serve.batches", file, bundle],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )

        assert done.returncode == 0, done.stderr
        assert int(done.stdout) > 15  # changes, at each of which a run was killed

    def test_after_kills_has_the_folder_of_an_uninterrupted_run(self, bundle, tmp_path):
        """Kill command and workers after so many results, and at moments between them."""
        file = write_lines(tmp_path / "r.jsonl", *prompts(60, num_inference_steps=12))
        killed, whole = tmp_path / "killed", tmp_path / "whole"
        moments = random.Random(0)
        kills = 0
        for count in (0, 7, 30):
            process = started(file, killed, bundle, "--workers", 2)
            wait_for_lines(killed, count, process)
            time.sleep(moments.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
        last = started(file, killed, bundle, "--workers", 2)
        output, errors = last.communicate()

        assert last.returncode == 0, errors
        assert output.strip() == str(killed / "results.jsonl")
        assert kills == 3
        whole.mkdir()
        shutil.copy(killed / "batch.json", whole)
        assert ldm_batch(file, whole, bundle, "--executor", "inline") == 0
        assert files_of(killed) == files_of(whole)
        assert without_seconds(killed) == without_seconds(whole)

    def test_generates_nothing_twice(self, bundle, tmp_path):
        file = write_lines(tmp_path / "r.jsonl", *prompts(5, seed=1))
        run_batch(file, tmp_path / "out", bundle)
        before, executor = results_of(tmp_path / "out"), HashExecutor()

        counts = run_batch(file, tmp_path / "out", bundle, executor)

        assert (counts.generated, counts.found, counts.failed) == (0, 5, 0)
        assert executor.submitted == []
        assert results_of(tmp_path / "out") == before

    def test_generates_an_image_that_was_removed(self, bundle, tmp_path):
        file = write_lines(tmp_path / "r.jsonl", *prompts(3, seed=1))
        run_batch(file, tmp_path / "out", bundle)
        files = files_of(tmp_path / "out")
        line = results_of(tmp_path / "out")[1]
        (tmp_path / "out" / line["path"]).unlink()

        assert run_batch(file, tmp_path / "out", bundle).generated == 1

        assert files_of(tmp_path / "out") == files
        assert len(results_of(tmp_path / "out")) == 3

    def test_goes_on_with_a_file_that_was_edited(self, bundle, tmp_path):
        file = write_lines(tmp_path / "r.jsonl", *prompts(4))
        run_batch(file, tmp_path / "out", bundle)
        changed = prompts(5)
        changed[1]["prompt"] = "another"
        del changed[3:]
        write_lines(file, *changed, {"prompt": "new"}, {"prompt": "newer"})

        counts = run_batch(file, tmp_path / "out", bundle)

        assert (counts.generated, counts.found) == (3, 2)
        assert sorted(each["line"] for each in results_of(tmp_path / "out")) == [1, 2, 3, 4, 5]

    def test_leaves_lines_that_are_added_meanwhile_for_the_next_run(self, bundle, tmp_path):
        requests = write_lines(tmp_path / "r.jsonl", *prompts(6))

        class Adding(HashExecutor):
            async def start(self, report, changed):
                await super().start(report, changed)
                with requests.open("a") as file:
                    file.write('{"prompt": "late"}\n')

        first = run_batch(requests, tmp_path / "out", bundle, Adding())
        second = run_batch(requests, tmp_path / "out", bundle)

        assert (first.generated, second.generated, second.found) == (6, 1, 6)

    def test_drops_lines_that_the_file_no_longer_has(self, bundle, tmp_path):
        file = write_lines(tmp_path / "r.jsonl", *prompts(4))
        run_batch(file, tmp_path / "out", bundle)
        write_lines(file, *prompts(2))

        run_batch(file, tmp_path / "out", bundle)

        assert sorted(each["line"] for each in results_of(tmp_path / "out")) == [1, 2]
        assert len(files_of(tmp_path / "out")) == 1 + 4  # images are left alone

    def test_mends_a_log_that_was_cut_off_anywhere(self, bundle, tmp_path):
        file = write_lines(tmp_path / "r.jsonl", *prompts(2, seed=1))
        run_batch(file, tmp_path / "out", bundle)
        log = tmp_path / "out/results.jsonl"
        whole, expected = log.read_bytes(), without_seconds(tmp_path / "out")
        for length in [*range(0, len(whole), 7), len(whole) - 1]:
            log.write_bytes(whole[:length])
            counts = run_batch(file, tmp_path / "out", bundle)

            assert (counts.generated, counts.found) == (0, 2)
            assert without_seconds(tmp_path / "out") == expected

    def test_makes_new_images_for_another_bundle(self, bundle, tmp_path):
        file = write_lines(tmp_path / "r.jsonl", *prompts(2))
        run_batch(file, tmp_path / "out", bundle)
        shutil.copytree(bundle, tmp_path / "other")
        with (tmp_path / "other/manifest.json").open("a") as manifest:
            manifest.write("\n")

        assert run_batch(file, tmp_path / "out", tmp_path / "other").generated == 2

    def test_tells_workers_which_bundle_the_names_of_the_images_are_of(self, bundle, tmp_path):
        told = []

        class Noting(HashExecutor):
            def submit(self, work):
                told.append(work.bundle_sha256)
                super().submit(work)

        file = write_lines(tmp_path / "r.jsonl", *prompts(2))
        run_batch(file, tmp_path / "out", bundle, Noting())

        assert told == [sha256_of(bundle / "manifest.json")] * 2


class TestFailures:
    def test_are_lines_that_do_not_stop_the_others(self, bundle, tmp_path):
        file = write_lines(tmp_path / "r.jsonl", *prompts(2), {"prompt": "fail"}, *prompts(2))

        counts = run_batch(file, tmp_path / "out", bundle)

        assert (counts.generated, counts.failed) == (4, 1)
        (failure,) = (each for each in results_of(tmp_path / "out") if "error" in each)
        assert failure["line"] == 3
        assert failure["error"] == {"code": "internal_error", "message": "it failed"}
        assert "path" not in failure

    def test_are_tried_again_only_when_asked_for(self, bundle, tmp_path):
        file = write_lines(tmp_path / "r.jsonl", {"prompt": "fail"}, *prompts(1))
        run_batch(file, tmp_path / "out", bundle)
        executor, retrying = HashExecutor(), HashExecutor()

        counts = run_batch(file, tmp_path / "out", bundle, executor)
        again = run_batch(file, tmp_path / "out", bundle, retrying, retry_failed=True)

        assert (counts.generated, counts.found, counts.failed) == (0, 1, 1)
        assert not executor.submitted
        assert (again.generated, again.found, again.failed) == (0, 1, 1)
        assert len(retrying.submitted) == 1
        assert len(results_of(tmp_path / "out")) == 2

    def test_are_told_by_the_exit_status(self, bundle, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(
            "ldm_serve.executors.inline.InlineExecutor", lambda *_arguments: HashExecutor()
        )
        file = write_lines(tmp_path / "r.jsonl", {"prompt": "fail"}, *prompts(1))

        assert ldm_batch(file, tmp_path / "out", bundle, "--executor", "inline", "--json") == 1

        printed = capsys.readouterr()
        results = str(tmp_path / "out/results.jsonl")
        counts = {"generated": 1, "found": 0, "failed": 1, "results": results}
        assert json.loads(printed.out) == counts
        assert "error: 1 of 2 images failed" in printed.err
        assert "2/2 images" in printed.err


class TestDeaths:
    def test_of_workers_are_not_noticed(self, bundle, tmp_path):
        file = write_lines(tmp_path / "r.jsonl", *prompts(60, seed=3, num_inference_steps=12))
        process = started(file, tmp_path / "out", bundle, "--workers", 2)
        killed = set()
        for count in (1, 20):
            wait_for_lines(tmp_path / "out", count, process)
            (worker, *_) = sorted(set(workers_of(process.pid)) - killed)
            os.kill(worker, signal.SIGKILL)
            killed.add(worker)
        _, errors = process.communicate()

        assert process.returncode == 0, errors
        assert len(killed) == 2
        assert ldm_batch(file, tmp_path / "alone", bundle, "--executor", "inline") == 0
        assert without_seconds(tmp_path / "out") == without_seconds(tmp_path / "alone")

    @pytest.mark.parametrize("executor", ["inline", "process"])
    def test_of_every_worker_at_its_start_end_the_batch(self, executor, bundle, tmp_path, capfd):
        damaged = tmp_path / "damaged"
        shutil.copytree(bundle, damaged)
        (damaged / "unet/model.cpu.onnx").write_bytes(b"")
        file = write_lines(tmp_path / "r.jsonl", *prompts(2))

        assert ldm_batch(file, tmp_path / "out", damaged, "--executor", executor) == 1
        assert "no worker stays alive" in capfd.readouterr().err

    def test_of_the_command_end_its_workers(self, bundle, tmp_path):
        file = write_lines(tmp_path / "r.jsonl", *prompts(200, num_inference_steps=50))
        process = started(file, tmp_path / "out", bundle)
        wait_for_lines(tmp_path / "out", 1, process)
        workers = workers_of(process.pid)
        process.kill()
        process.communicate()

        assert workers
        end = time.monotonic() + 10
        while any(Path(f"/proc/{worker}/exe").exists() for worker in workers):
            assert time.monotonic() < end
            time.sleep(0.02)


def workers_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def test_images_of_a_worker_that_ends_are_missing_and_not_failed(bundle, tmp_path, monkeypatch):
    """As where the machine has no room for another thread."""
    requests = write_lines(tmp_path / "r.jsonl", *prompts(3, num_inference_steps=1))
    out = tmp_path / "out"

    def ending(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(Worker, "advance", ending)
        assert ldm_batch(requests, out, bundle, "--executor", "inline") == 1
    assert results_of(out) == []

    assert ldm_batch(requests, out, bundle, "--executor", "inline") == 0
    assert len(results_of(out)) == 3


class TestFullDisk:
    def test_is_one_sentence_and_leaves_nothing_half_written(self, bundle, tmp_path):
        file = write_lines(tmp_path / "r.jsonl", *prompts(3))
        limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))\n"
        limited += "from ldm_runtime.cli import main; sys.exit(main(sys.argv[1:]))"
        arguments = ["batch", file, "--out", tmp_path / "out", "--bundle", bundle, "--quiet"]
        arguments += ["--executor", "inline", "--threads", "1"]

        done = subprocess.run(
            [sys.executable, "-c", limited, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )

        assert done.returncode == 1
        (sentence,) = done.stderr.splitlines()
        assert "cannot be written: File too large; mend that and run the same command" in sentence
        assert files_of(tmp_path / "out").keys() == {"batch.json"}
        assert results_of(tmp_path / "out") == []
        assert ldm_batch(file, tmp_path / "out", bundle, "--executor", "inline") == 0
        assert len(results_of(tmp_path / "out")) == 3

    def test_in_the_middle_of_a_line_of_the_log_takes_it_back(self, bundle, tmp_path, monkeypatch):
        file = write_lines(tmp_path / "r.jsonl", *prompts(2, seed=1))
        real_write, executor = os.write, HashExecutor()

        def write_a_part(descriptor, data):
            if data.startswith(b'{"line":2'):
                return real_write(descriptor, data[:10])
            return real_write(descriptor, data)

        monkeypatch.setattr(os, "write", write_a_part)
        with pytest.raises(BatchError, match=os.strerror(errno.ENOSPC)):
            run_batch(file, tmp_path / "out", bundle, executor)
        monkeypatch.undo()

        assert executor.is_closed
        assert [each["line"] for each in results_of(tmp_path / "out")] == [1]
        assert run_batch(file, tmp_path / "out", bundle).generated == 0
        assert [each["line"] for each in results_of(tmp_path / "out")] == [1, 2]


class TestMemory:
    def test_does_not_grow_with_the_requests(self, bundle, tmp_path):
        """200 lines of 20 kB: they are 4 MB, and what the executor has at most is 80 kB."""
        file = write_lines(tmp_path / "r.jsonl", *prompts(200, negative_prompt="x" * 20_000))
        executor, model = HashExecutor(room=4), BatchModel.of_bundle(bundle)

        tracemalloc.start()
        try:
            counts = run_batch(file, tmp_path / "out", model, executor)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert counts.generated == 200
        assert executor.most_running == 4
        assert peak < 2e6


def test_needs_nothing_of_the_extra_serve(bundle, tmp_path):
    file = write_lines(tmp_path / "r.jsonl", *prompts(1))
    blocked = "import sys\n"
    blocked += "for name in ('starlette', 'uvicorn', 'prometheus_client', 'multipart'):\n"
    blocked += "    sys.modules[name] = None\n"
    blocked += "from ldm_runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    for executor in ("inline", "process"):
        arguments = ["batch", file, "--out", tmp_path / executor, "--bundle", bundle]

        done = subprocess.run(
            [sys.executable, "-c", blocked, *map(str, arguments), "--executor", executor],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )

        assert done.returncode == 0, done.stderr
