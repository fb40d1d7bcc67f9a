"""Executors under fire: every image is that of the generator, whatever happens to workers."""

import asyncio
import io
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from ldm_runtime import Generator
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.errors import BackendError, LdmError, ManifestError
from ldm_serve.executors.inline import InlineExecutor
from ldm_serve.executors.messages import Failed, Finished, Progress, Ready, Work
from ldm_serve.executors.pool import PoolWorker, WorkerPool
from ldm_serve.executors.process import ProcessExecutor
from ldm_serve.executors.worker import Worker
from ldm_serve.settings import EngineSettings
from tests.serve.conftest import serving

SETTINGS = EngineSettings(backend="onnxruntime", threads=1)
QUICK = {"prompt": "red", "seed": 3, "num_inference_steps": 4}
SLOW = {"prompt": "red", "seed": 1, "width": 256, "height": 256, "num_inference_steps": 200}


@pytest.fixture(scope="module")
def expected(bundle):
    """Returns the image of some fields, generated without a server."""
    with Generator(bundle, threads=1) as generator:
        yield lambda fields: generator(**fields).image.tobytes()


class Events:
    """The events of an executor's jobs, as they come."""

    def __init__(self):
        self.found, self.changed = [], asyncio.Event()

    def report(self, event):
        self.found.append(event)
        self.changed.set()

    async def until(self, is_done, seconds=30):
        async with asyncio.timeout(seconds):
            while not (done := is_done()):
                self.changed.clear()
                await self.changed.wait()
        return done

    async def end_of(self, job):
        ends = (Finished, Failed)
        return await self.until(
            lambda: next((e for e in self.found if e.job == job and isinstance(e, ends)), None)
        )

    async def step_of(self, job, step=1):
        await self.until(
            lambda: any(
                isinstance(e, Progress) and e.job == job and e.step >= step for e in self.found
            )
        )


def run(executor, scenario):
    """Run a scenario with a started executor, which is closed at the end."""

    async def main():
        events = Events()
        await executor.start(events.report, events.changed.set)
        try:
            await events.until(lambda: executor.stats().is_ready)
            return await scenario(executor, events)
        finally:
            await executor.close()

    return asyncio.run(main())


def work(job, fields, model="tiny", **options):
    return Work(job=job, model=model, fields=fields, **options)


def pixels(event, index=0):
    return Image.open(io.BytesIO(event.images[index])).tobytes()


def worker_pids(executor):
    return [worker.process.pid for worker in executor._pool.workers]


@pytest.fixture(params=["inline", "process"])
def executor(request, bundle):
    kind = {"inline": InlineExecutor, "process": ProcessExecutor}[request.param]
    return kind({"tiny": bundle}, SETTINGS)


def test_images_are_those_of_the_generator(executor, expected):
    async def scenario(executor, events):
        for job in "ab":
            executor.submit(work(job, {**QUICK, "seed": ord(job)}))
        return [await events.end_of(job) for job in "ab"], executor.stats()

    (first, second), stats = run(executor, scenario)

    assert pixels(first) == expected({**QUICK, "seed": ord("a")})
    assert pixels(second) == expected({**QUICK, "seed": ord("b")})
    assert (stats.is_ready, stats.room, stats.workers, stats.restarts) == (True, 4, 1, 0)
    assert (stats.backend, stats.precision) == ("onnxruntime", "fp32")


def test_ends_of_jobs_say_which_calls_of_the_unet_there_were(executor):
    """Each of these samplers calls once per step, and a call has room for four images."""

    async def scenario(executor, events):
        executor.submit(work("all", {**QUICK, "num_images": 3, "num_inference_steps": 5}))
        first = await events.end_of("all")
        executor.submit(work("one", {**QUICK, "num_inference_steps": 4}))
        return first, await events.end_of("one")

    first, second = run(executor, scenario)

    assert (first.calls, first.called_images) == (5, 15)
    assert (second.calls, second.called_images) == (4, 4)


def test_wrong_fields_and_deadlines_fail_alone(executor):
    async def scenario(executor, events):
        executor.submit(work("wrong", {"prompt": "red", "height": 17}))
        executor.submit(work("late", SLOW, deadline_seconds=1e-3))
        executor.submit(work("good", QUICK))
        return [await events.end_of(job) for job in ("wrong", "late", "good")]

    wrong, late, good = run(executor, scenario)

    assert (wrong.status, wrong.code, wrong.param) == (400, "invalid_value", "height")
    assert (late.status, late.code) == (504, "deadline_exceeded")
    assert isinstance(good, Finished)


def test_a_cancelled_job_says_no_more(executor):
    async def scenario(executor, events):
        executor.submit(work("slow", SLOW))
        await events.step_of("slow")
        executor.cancel("slow")
        seen = len(events.found)
        executor.submit(work("next", QUICK))
        await events.end_of("next")
        return [event.job for event in events.found[seen:]], executor.stats().room

    jobs, room = run(executor, scenario)

    assert set(jobs) == {"next"}
    assert room == 4


def test_the_jobs_of_a_killed_worker_are_run_again(bundle, expected):
    async def scenario(executor, events):
        jobs = {f"job{seed}": {**SLOW, "seed": seed} for seed in range(3)}
        for job, fields in jobs.items():
            executor.submit(work(job, fields))
        await events.step_of("job0", 5)
        os.kill(worker_pids(executor)[0], signal.SIGKILL)
        return {job: await events.end_of(job) for job in jobs}, jobs, executor.stats().restarts

    ends, jobs, restarts = run(ProcessExecutor({"tiny": bundle}, SETTINGS), scenario)

    assert restarts == 1
    for job, fields in jobs.items():
        assert pixels(ends[job]) == expected(fields)


def test_a_job_that_ends_three_workers_is_not_tried_again(bundle, expected):
    async def scenario(executor, events):
        executor.submit(work("poison", SLOW))
        for _ in range(3):
            seen = len(events.found)
            await events.until(lambda seen=seen: len(events.found) > seen)
            pid = worker_pids(executor)[0]
            os.kill(pid, signal.SIGKILL)
            await events.until(lambda pid=pid: pid not in worker_pids(executor))
        poison = await events.end_of("poison")
        executor.submit(work("good", QUICK))
        return poison, await events.end_of("good")

    poison, good = run(ProcessExecutor({"tiny": bundle}, SETTINGS), scenario)

    assert (poison.status, poison.code) == (500, "worker_crash")
    assert pixels(good) == expected(QUICK)


def test_a_job_that_ends_its_workers_takes_no_other_with_it(bundle, expected):
    async def scenario(executor, events):
        executor.submit(work("poison", SLOW))
        for seed in range(3):
            executor.submit(
                work(f"good{seed}", {**QUICK, "num_inference_steps": 200, "seed": seed})
            )
        await events.step_of("good2")
        while "poison" in executor._pool._attempts:
            for worker in list(executor._pool.workers):
                if "poison" in worker.jobs:
                    worker.process.kill()
            await asyncio.sleep(0.01)
        return [await events.end_of(job) for job in ("poison", "good0", "good1", "good2")]

    poison, *good = run(ProcessExecutor({"tiny": bundle}, SETTINGS), scenario)

    assert poison.code == "worker_crash"
    for seed, end in enumerate(good):
        assert pixels(end) == expected({**QUICK, "num_inference_steps": 200, "seed": seed})


def test_a_worker_that_stalls_is_replaced(bundle, expected):
    async def scenario(executor, events):
        executor.submit(work("job", SLOW))
        await events.step_of("job", 3)
        os.kill(worker_pids(executor)[0], signal.SIGSTOP)
        return await events.end_of("job"), executor.stats().restarts

    executor = ProcessExecutor({"tiny": bundle}, SETTINGS, stall_seconds=1.0)
    end, restarts = run(executor, scenario)

    assert restarts == 1
    assert pixels(end) == expected(SLOW)


def test_a_worker_that_hangs_is_replaced_though_its_clients_go_away(bundle, expected):
    """Each gives up before the worker counts as silent, and another one comes."""

    async def scenario(executor, events):
        executor.submit(work("first", SLOW))
        await events.step_of("first")
        os.kill(worker_pids(executor)[0], signal.SIGSTOP)
        executor.cancel("first")
        for number in range(8):
            executor.submit(work(f"impatient {number}", QUICK))
            await asyncio.sleep(0.25)
            executor.cancel(f"impatient {number}")
        executor.submit(work("last", QUICK))
        return await events.end_of("last"), executor.stats().restarts

    executor = ProcessExecutor({"tiny": bundle}, SETTINGS, stall_seconds=1.0)
    end, restarts = run(executor, scenario)

    assert restarts == 1
    assert pixels(end) == expected(QUICK)


def test_a_worker_that_cannot_be_started_is_started_later(bundle, expected, caplog):
    async def scenario(executor, events):
        spawn, faults = executor._spawn, [OSError(24, "Too many open files"), RuntimeError("full")]

        def starting():
            if faults:
                raise faults.pop()
            spawn()

        executor._spawn = starting
        os.kill(worker_pids(executor)[0], signal.SIGKILL)
        executor.submit(work("job", QUICK))
        return await events.end_of("job")

    end = run(ProcessExecutor({"tiny": bundle}, SETTINGS), scenario)

    assert pixels(end) == expected(QUICK)
    assert caplog.text.count("a worker cannot be started") == 2


def test_what_a_buried_worker_says_comes_too_late():
    """A result that was on its way when its worker died, whose job is run again."""
    pool = WorkerPool()
    dead, alive = (PoolWorker(ready=Ready(backend="", precision="", max_begun=4)) for _ in range(2))
    pool.workers.append(dead)
    pool.add(work("job", QUICK))
    assert [job.job for _, job in pool.hand_out()] == ["job"]
    ends, _ = pool.bury(dead)
    late = Finished(job="job", images=[], seeds=[], metadata=[], infotexts=[], timings={})

    assert (ends, pool.take(dead, late)) == ([], None)

    pool.workers.append(alive)
    assert [(worker, job.job) for worker, job in pool.hand_out()] == [(alive, "job")]
    assert pool.take(alive, late) is late
    assert pool.stats("").room == 4


def test_two_workers_share_the_work(bundle):
    async def scenario(executor, events):
        await events.until(lambda: executor.stats().room == 8)
        for number in range(6):
            executor.submit(work(f"job{number}", QUICK))
        images = [worker.images() for worker in executor._pool.workers]
        for number in range(6):
            await events.end_of(f"job{number}")
        return images

    assert run(ProcessExecutor({"tiny": bundle}, SETTINGS, workers=2), scenario) == [3, 3]


def test_a_bundle_that_cannot_be_opened_is_the_reason(bundle, tmp_path):
    async def scenario():
        executor = ProcessExecutor({"tiny": tmp_path}, SETTINGS)
        changed = asyncio.Event()
        await executor.start(lambda _: None, changed.set)
        async with asyncio.timeout(30):
            await changed.wait()
        stats = executor.stats()
        await executor.close()
        return stats

    stats = asyncio.run(scenario())

    assert not stats.is_ready
    assert "ended with status 1" in stats.reason


@pytest.fixture(params=["inline", "process"])
def with_copy(request, bundle, tmp_path):
    """An executor of the tiny bundle and of a copy, which is opened when it is first asked for."""
    kind = {"inline": InlineExecutor, "process": ProcessExecutor}[request.param]
    copy = shutil.copytree(bundle, tmp_path / "secret")
    return kind({"tiny": bundle, "copy": copy}, SETTINGS), copy / "manifest.json"


def test_a_bundle_that_was_replaced_is_not_used(with_copy, expected):
    executor, manifest = with_copy
    sha256 = sha256_of(manifest)
    with manifest.open("a") as file:
        file.write("\n")  # another one, as good

    async def scenario(executor, events):
        executor.submit(work("old", QUICK, model="copy", bundle_sha256=sha256))
        executor.submit(work("new", QUICK, model="copy", bundle_sha256=sha256_of(manifest)))
        ends = [await events.end_of(job) for job in ("old", "new")]
        executor.submit(work("open", QUICK, model="copy", bundle_sha256=sha256))
        return [*ends, await events.end_of("open")]

    old, new, opened = run(executor, scenario)

    for end in (old, opened):
        assert (end.status, end.code) == (500, "generation_failed")
        assert end.message == (
            "the bundle of model 'copy' was replaced since the start; start the server, or the "
            "batch, again"
        )
    assert pixels(new) == expected(QUICK)


def test_clients_are_not_told_where_a_bundle_lies(with_copy, expected):
    executor, manifest = with_copy
    manifest.unlink()

    async def scenario(executor, events):
        executor.submit(work("bad", QUICK, model="copy"))
        executor.submit(work("good", QUICK))
        return [await events.end_of(job) for job in ("bad", "good")]

    bad, good = run(executor, scenario)

    assert (bad.status, bad.code) == (500, "generation_failed")
    told = "the bundle of model 'copy' cannot be opened; see the server's messages"
    assert bad.message == told
    assert pixels(good) == expected(QUICK)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ManifestError("/models/b/manifest.json: it is cut off; export the bundle again"),
            "the bundle of model 'b' cannot be opened; see the server's messages",
        ),
        (
            BackendError("ONNX Runtime cannot load /models/b/unet.onnx: it is cut off"),
            "the networks of model 'b' cannot be run; see the server's messages",
        ),
        (BackendError("unet takes 9 GB and/or more; ask for less"), None),
        (LdmError("the file of the adapter 'style' has changed; start again with it"), None),
    ],
)
def test_paths_are_in_the_log_and_not_in_the_answer(error, message, caplog):
    class Failing:
        def open(self, *_):
            raise error

    sent = []
    worker = Worker(Failing(), sent.append)
    worker.follow(work("job", QUICK, model="b"))
    worker._begin()

    assert [each.message for each in sent] == [message or str(error)]
    assert (str(error) in caplog.text) == (message is not None)


def test_models_are_closed_for_others_within_the_budget(bundles):
    names = ("text-to-image", "class-to-image")
    sizes = [sum(f.stat().st_size for f in (bundles / name).rglob("*.bin")) for name in names]
    settings = EngineSettings(
        backend="onnxruntime", threads=1, memory_budget_bytes=max(sizes) + min(sizes) - 1
    )
    fields = {"text-to-image": QUICK, "class-to-image": {"class_label": 2, "seed": 1}}

    async def scenario(executor, events):
        ends = []
        for number in range(3):
            for name in names:
                executor.submit(work(f"{name}{number}", fields[name], model=name))
        for number in range(3):
            for name in names:
                ends.append(pixels(await events.end_of(f"{name}{number}")))
        return ends

    ends = run(ProcessExecutor({name: bundles / name for name in names}, settings), scenario)

    for index, name in enumerate(names):
        with Generator(bundles / name, threads=1) as generator:
            assert set(ends[index::2]) == {generator(**fields[name]).image.tobytes()}


def test_closing_leaves_no_process(bundle):
    async def scenario(executor, events):
        executor.submit(work("slow", SLOW))
        await events.step_of("slow")
        return worker_pids(executor)

    executor = ProcessExecutor({"tiny": bundle}, SETTINGS)
    begun = time.monotonic()
    (pid,) = run(executor, scenario)

    assert not Path(f"/proc/{pid}").exists()
    assert time.monotonic() - begun < 30


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends workers with their parent")
def test_workers_end_with_a_killed_server(bundle, tmp_path):
    with serving(tmp_path, bundle) as server:
        (pid,) = server.workers()
        server.process.kill()
        server.process.wait()

        end = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
            if "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
                break
            time.sleep(0.02)
        else:
            assert not Path(f"/proc/{pid}").exists()


def test_a_server_that_is_told_to_end_lets_clients_fetch_their_images(bundle, tmp_path, expected):
    with serving(tmp_path, bundle) as server, server.client(timeout=60) as client:
        job = client.post("/api/jobs", json={"request": SLOW}).json()
        server.process.send_signal(signal.SIGTERM)
        while client.get("/readyz").status_code == 200:
            time.sleep(0.005)
        refused = client.post("/api/jobs", json={"request": SLOW})
        while (found := client.get(f"/api/jobs/{job['id']}").json())["state"] != "completed":
            time.sleep(0.05)
        time.sleep(0.5)  # longer than uvicorn looks between two ticks

        with server.client(timeout=60) as another:
            data = another.get(found["images"][0]["url"]).content

        server.process.wait(4)
    assert (refused.status_code, "is ending" in refused.text) == (503, True)
    assert Image.open(io.BytesIO(data)).tobytes() == expected(SLOW)


def test_a_server_can_generate_without_other_processes(bundle, tmp_path, expected):
    body = {"prompt": "red", "size": "256x256", "seed": 1, "num_inference_steps": 4}
    with (
        serving(tmp_path, bundle, "--executor", "inline") as server,
        server.client(timeout=60) as client,
    ):
        answer = client.post("/v1/images/generations", json=body | {"response_format": "file"})
        workers = server.workers()

    image = Image.open(io.BytesIO(answer.content))
    assert image.tobytes() == expected({**SLOW, "num_inference_steps": 4})
    assert workers == []


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_server_at_once(bundle, tmp_path, second):
    request = {**SLOW, "num_inference_steps": 200, "num_images": 8}
    with serving(tmp_path, bundle) as server, server.client(timeout=60) as client:
        client.post("/api/jobs", json={"request": request})
        server.process.send_signal(signal.SIGTERM)
        while client.get("/readyz").status_code == 200:
            time.sleep(0.005)

        server.process.send_signal(second)

        server.process.wait(8)  # of 30 for which it would go on


@pytest.mark.parametrize("told", ["the server", "all its processes"])
def test_a_server_that_is_told_to_end_finishes_what_has_come(bundle, tmp_path, expected, told):
    """A service manager tells all processes of a service."""
    body = {"prompt": "red", "size": "256x256", "seed": 1, "num_inference_steps": 200}
    body |= {"response_format": "file"}
    with (
        serving(tmp_path, bundle) as server,
        server.client(timeout=60) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(client.post, "/v1/images/generations", json=body)
        while not client.get("/api/jobs").json()["jobs"]:
            time.sleep(0.005)
        for pid in server.workers() if told == "all its processes" else ():
            os.kill(pid, signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)

        image = Image.open(io.BytesIO(answer.result().content))

        server.process.wait(30)
    assert server.process.returncode in (0, -signal.SIGTERM)
    assert image.tobytes() == expected(SLOW)
    assert "ended with status" not in server.messages.read_text()
