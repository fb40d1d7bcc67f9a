"""`ldm batch` and `ldm serve` on a Ray cluster on loopback: the images of one process always."""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Ray reads them when it is imported. Without the first, it takes the machine's own address and
# listens on all of them.
os.environ.update(
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN="of-the-tests-alone-0000000000000",
    RAY_USAGE_STATS_ENABLED="0",
)
pytest.importorskip("ray", reason="needs the extra ray")

from ldm_runtime.cli import main
from ldm_runtime.errors import RequestError
from ldm_runtime.progress import Silent
from ldm_runtime.testing import write_tiny_bundle
from ldm_serve.batch.folder import BatchFolder
from ldm_serve.batch.run import BatchRun
from ldm_serve.batch.units import BatchModel, RequestFile
from ldm_serve.errors import BatchError
from ldm_serve.executors.inline import InlineExecutor
from ldm_serve.executors.messages import Work, encode
from ldm_serve.executors.ray import RayExecutor
from ldm_serve.executors.ray_worker import NodeBundles, RayWorker
from ldm_serve.routes.jobs import data_url
from ldm_serve.settings import TEXT_LOGS, EngineSettings, ServeSettings
from tests.serve.adapter_files import write_lora
from tests.serve.asgi import calling
from tests.serve.batches import results_of
from tests.serve.conftest import serving
from tests.serve.test_jobs import events_of, finished, submit

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
SETTINGS = EngineSettings(backend="onnxruntime", threads=1, max_batch=2)
STORE_BYTES = 80 * 2**20
QUICK = {"prompt": "red", "seed": 3, "num_inference_steps": 4}
SLOW = {"prompt": "red", "seed": 1, "width": 256, "height": 256, "num_inference_steps": 150}
#: A dead node is noticed after about a second.
QUICK_HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 2,
}


@pytest.fixture(scope="module")
def cluster():
    """A head without room, to which tests add nodes; no process of it stays behind."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray") as folder:
        patch.setenv("RAY_TMPDIR", folder)
        from ray.cluster_utils import Cluster

        head = {
            "num_cpus": 0,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
            "_system_config": QUICK_HEALTH,
        }
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield cluster
        finally:
            cluster.shutdown()
        wait_until(lambda: not processes_with(folder), "all processes of Ray have ended")


@pytest.fixture
def nodes(cluster):
    """Two nodes with a CPU each."""
    with added(cluster, 2) as nodes:
        yield nodes


@contextlib.contextmanager
def added(cluster, count):
    nodes = [add_node(cluster) for _ in range(count)]
    try:
        yield nodes
    finally:
        for node in cluster.worker_nodes.copy():
            cluster.remove_node(node, allow_graceful=False)


def add_node(cluster):
    return cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)


@pytest.fixture
def requests(tmp_path):
    """A file of 60 requests, which take two workers some seconds."""
    return write_requests(tmp_path / "r.jsonl", 60)


def write_requests(path, count):
    lines = (
        {
            "prompt": f"image {seed}",
            "seed": seed,
            "num_inference_steps": 100,
            "width": 32,
            "height": 32,
        }
        for seed in range(count)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def wait_until(is_true, what, seconds=60):
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, f"not in time: {what}"
        time.sleep(0.02)


def processes_with(text):
    """Return the identifiers of processes whose command line or environment has a text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            has_text = any(
                text.encode() in (folder / each).read_bytes() for each in ("cmdline", "environ")
            )
            if has_text and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def workers():
    """Return the identifiers of the actors' processes of this test's cluster."""
    return [
        pid
        for pid in processes_with(os.environ["RAY_AUTH_TOKEN"])
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::RayWorker")
    ]


def cpu_seconds(pid):
    """Return how long a process has computed."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def arguments(requests, out, bundle, *flags):
    given = ["batch", requests, "--out", out, "--bundle", bundle, "--threads", 1, *flags]
    return [str(each) for each in given]


@contextlib.contextmanager
def started(cluster, requests, out, bundle, *flags):
    """Run the command on the cluster, in a process of its own."""
    flags = ["--executor", "ray", "--address", cluster.address, "--workers", 2, *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "ldm_runtime", *arguments(requests, out, bundle, *flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def count_lines(out):
    log = out / "results.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for_lines(out, count, process):
    wait_until(lambda: count_lines(out) >= count or process.poll() is not None, "images")
    assert process.poll() is None, process.communicate()


def end(process):
    """Wait for the end of a command, and return its output and its messages."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output, errors


def hashes(out):
    """Return the hash of every image's file by its place, checking that none is there twice."""
    lines = results_of(out)
    found = {(each["line"], each["image"]): (each["path"], each["sha256"]) for each in lines}
    assert len(found) == len(lines)
    return found


def inline(requests, out, bundle, *flags):
    """Return the hashes of the images that this process generates."""
    flags = ["--executor", "inline", "--quiet", *flags]
    assert main(arguments(requests, out, bundle, *flags)) == 0
    return hashes(out)


def test_images_are_those_of_one_process(cluster, nodes, requests, bundle, tmp_path):
    with started(cluster, requests, tmp_path / "out", bundle) as process:
        output, errors = end(process)

    assert output == f"{tmp_path / 'out/results.jsonl'}\n"
    assert "error" not in errors
    assert hashes(tmp_path / "out") == inline(requests, tmp_path / "inline", bundle)
    wait_until(lambda: not workers(), "actors have ended")


@pytest.mark.parametrize("flags", [[], ["--live-adapters"]], ids=["merged", "live"])
def test_images_with_adapters_are_those_of_one_process(
    cluster, nodes, small_bundle_fp32, tmp_path, flags
):
    flags = ["--adapter", write_lora(tmp_path / "style.safetensors"), *flags]
    requests, adapters = tmp_path / "r.jsonl", ([], "style@0.7", "style@-0.3")
    lines = [{**QUICK, "seed": seed, "adapters": each} for each in adapters for seed in range(4)]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))

    with started(cluster, requests, tmp_path / "out", small_bundle_fp32, *flags) as process:
        end(process)

    found = hashes(tmp_path / "out")
    assert found == inline(requests, tmp_path / "inline", small_bundle_fp32, *flags)
    assert len({sha256 for _, sha256 in found.values()}) == len(lines)


def test_a_node_that_dies_loses_nothing(cluster, nodes, requests, bundle, tmp_path):
    with started(cluster, requests, tmp_path / "out", bundle) as process:
        wait_for_lines(tmp_path / "out", 3, process)
        cluster.remove_node(nodes[0], allow_graceful=False)
        output, errors = end(process)

    assert output == f"{tmp_path / 'out/results.jsonl'}\n"
    assert "a worker has ended: " in errors
    assert hashes(tmp_path / "out") == inline(requests, tmp_path / "inline", bundle)


def test_workers_that_die_lose_nothing(cluster, nodes, requests, bundle, tmp_path):
    killed = set()
    with started(cluster, requests, tmp_path / "out", bundle) as process:
        for count in (1, 8):
            wait_for_lines(tmp_path / "out", count, process)
            (worker, *_) = sorted(set(workers()) - killed)
            os.kill(worker, signal.SIGKILL)
            killed.add(worker)
        _, errors = end(process)

    assert errors.count("a worker has ended: ") == 2
    assert hashes(tmp_path / "out") == inline(requests, tmp_path / "inline", bundle)


def test_a_killed_command_goes_on(cluster, nodes, requests, bundle, tmp_path):
    out = tmp_path / "out"
    with started(cluster, requests, out, bundle) as process:
        wait_for_lines(out, 5, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    wait_until(lambda: not workers(), "actors have ended with their command")
    found = count_lines(out)
    assert 5 <= found < 60

    with started(cluster, requests, out, bundle, "--json") as process:
        counts = json.loads(end(process)[0])

    assert counts["generated"] + counts["found"] == 60
    assert counts["found"] - found in {0, 1}  # an image may be there before its line is
    assert hashes(out) == inline(requests, tmp_path / "inline", bundle)


def run_here(cluster, requests, out, bundle, **options):
    """Run a batch on the cluster from this process, and return the counts of images."""
    executor = RayExecutor({"model": bundle}, SETTINGS, address=cluster.address, **options)
    with BatchFolder(out) as folder:
        units = RequestFile(requests, BatchModel.of_bundle(bundle), folder.seed)
        run = BatchRun(units, folder, model="model")
        missing = run.survey()
        asyncio.run(run.generate(executor, missing, Silent()))
    return run.counts


def test_a_worker_that_stalls_is_replaced(cluster, nodes, requests, bundle, tmp_path):
    """It is stopped, so that it neither dies nor says anything."""
    out = tmp_path / "out"

    async def stop_one(executor):
        while not all(each.jobs for each in executor._pool.workers):
            await asyncio.sleep(0.02)
        os.kill(workers()[0], signal.SIGSTOP)

    class Stopping(RayExecutor):
        async def start(self, report, changed):
            await super().start(report, changed)
            self.stopping = asyncio.ensure_future(stop_one(self))

    executor = Stopping(
        {"model": bundle}, SETTINGS, address=cluster.address, workers=2, stall_seconds=2
    )
    with BatchFolder(out) as folder:
        units = RequestFile(requests, BatchModel.of_bundle(bundle), folder.seed)
        run = BatchRun(units, folder, model="model")
        asyncio.run(run.generate(executor, run.survey(), Silent()))

    assert executor.stopping.done()
    assert executor.stats().restarts == 1
    assert hashes(out) == inline(requests, tmp_path / "inline", bundle)


class TestNodesWithOtherBundles:
    def test_get_no_workers(self, cluster, tmp_path, monkeypatch, caplog):
        """Nodes run where they were started, and so find another bundle under one path."""
        for name in ("right", "wrong"):
            write_tiny_bundle(tmp_path / name / "bundle")
        with (tmp_path / "wrong/bundle/manifest.json").open("a") as manifest:
            manifest.write("\n")
        bundle, requests = Path("/proc/self/cwd/bundle"), write_requests(tmp_path / "r.jsonl", 8)
        with contextlib.ExitStack() as stack:
            stack.callback(os.chdir, os.getcwd())
            for name in ("wrong", "right"):
                os.chdir(tmp_path / name)
                stack.enter_context(added(cluster, 1))

            counts = run_here(cluster, requests, tmp_path / "out", bundle, workers=2)

            assert counts.generated == 8
            assert "node 127.0.0.1 has another bundle in /proc/self/cwd/bundle: " in caplog.text
            assert hashes(tmp_path / "out") == inline(requests, tmp_path / "inline", bundle)

    def test_alone_end_the_batch(self, cluster, nodes, requests, tmp_path):
        """The folder is another one by the time that a node looks."""
        write_tiny_bundle(tmp_path / "bundle")

        class Late(RayExecutor):
            async def start(self, report, changed):
                await super().start(report, changed)
                (tmp_path / "bundle").rename(tmp_path / "moved")

        executor = Late({"model": tmp_path / "bundle"}, SETTINGS, address=cluster.address)
        with BatchFolder(tmp_path / "out") as folder:
            model = BatchModel.of_bundle(tmp_path / "bundle")
            run = BatchRun(RequestFile(requests, model, folder.seed), folder, model="model")
            missing = run.survey()
            with pytest.raises(BatchError, match=r"alive: node 127\.0\.0\.1 has no"):
                asyncio.run(run.generate(executor, missing, Silent()))


def test_a_bundle_that_cannot_be_opened_ends_the_batch(cluster, nodes, requests, tmp_path):
    write_tiny_bundle(tmp_path / "bundle")
    (tmp_path / "bundle/unet/model.cpu.onnx").write_bytes(b"")

    with pytest.raises(BatchError, match=r"no worker stays alive: a worker has ended: .*unet"):
        run_here(cluster, requests, tmp_path / "out", tmp_path / "bundle")


def test_a_node_without_the_adapter(bundle, tmp_path):
    path = tmp_path / "style.safetensors"
    path.write_bytes(b"one")
    bundles = NodeBundles.of_this_machine({"model": bundle}, [path])
    assert bundles.why_not_here() is None

    for change in (lambda: path.write_bytes(b"other"), path.unlink):
        change()
        assert f"has not the adapter {path}, or another" in bundles.why_not_here()


@pytest.mark.parametrize("command", ["batch", "serve"])
class TestRefusals:
    @pytest.fixture
    def refused(self, command, requests, bundle, tmp_path):
        """Returns the one message of the command on a cluster that it refuses."""
        words = arguments(requests, tmp_path / "out", bundle)
        words = words if command == "batch" else ["serve", str(bundle)]
        return lambda address, **variables: self.message(words, address, tmp_path, **variables)

    def message(self, words, address, tmp_path, **variables):
        flags = ["--executor", "ray", "--address", address, "--quiet"]
        done = subprocess.run(
            [sys.executable, "-m", "ldm_runtime", *words, *flags],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "HOME": str(tmp_path), **variables},
            timeout=60,
        )
        assert done.returncode == 2, done.stderr
        assert not done.stdout
        (message,) = done.stderr.splitlines()
        return message

    def test_of_other_machines_without_authentication(self, refused):
        """The address is one for documentation, RFC 5737: nothing is sent there."""
        message = refused("192.0.2.1:6379", RAY_AUTH_MODE="disabled")

        assert "192.0.2.1 can be reached from other machines" in message
        assert "RAY_AUTH_MODE=token" in message

    def test_without_a_token(self, cluster, refused):
        message = refused(cluster.address, RAY_AUTH_TOKEN="")

        assert f"address: no token for the Ray cluster at {cluster.address}; " in message

    @pytest.mark.parametrize("address", ["ray://localhost:10001", "auto", "localhost"])
    def test_of_what_is_no_address(self, address, refused):
        message = refused(address)

        assert f"{address!r} is not HOST:PORT" in message


def test_nodes_that_others_reach_are_refused(cluster, nodes, monkeypatch):
    """The head is on loopback, but what its nodes say of themselves is not."""
    from ldm_serve.executors import ray_cluster

    monkeypatch.setattr(ray_cluster, "live_nodes", lambda: {"a": "192.0.2.1"})
    monkeypatch.setattr(ray_cluster, "_MODE", "OF_THIS_TEST")
    monkeypatch.setenv("OF_THIS_TEST", "disabled")

    with (
        pytest.raises(RequestError, match=r"192\.0\.2\.1 can be reached"),
        ray_cluster.connected(cluster.address),
    ):
        pass
    assert not ray_cluster.ray.is_initialized()


def test_an_address_without_a_cluster_is_one_sentence(requests, bundle, tmp_path, capsys):
    flags = ["--executor", "ray", "--address", "127.0.0.1:1", "--quiet"]

    for words in (arguments(requests, tmp_path / "out", bundle), ["serve", str(bundle)]):
        assert main([*words, *flags]) == 1
        assert "no Ray cluster answers at 127.0.0.1:1: " in capsys.readouterr().err


def test_flags_of_ray_need_each_other(requests, bundle, tmp_path, capsys):
    assert main(arguments(requests, tmp_path / "out", bundle, "--executor", "ray")) == 2
    assert "--executor ray needs --address HOST:PORT" in capsys.readouterr().err
    assert main(arguments(requests, tmp_path / "out", bundle, "--address", "127.0.0.1:1")) == 2
    assert "is of --executor ray, not of process" in capsys.readouterr().err


def noisy_image():
    """Return an image as a `data:` URL that is too large for Ray to send along with a call."""
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return data_url(file.getvalue(), "png")


def decode_image(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


@pytest.fixture(scope="class")
def flags(cluster, bundles):
    with added(cluster, 2):
        models = (bundles / "text-to-image", bundles / "class-to-image")
        yield *models, "--executor", "ray", "--address", cluster.address, "--max-batch", 1


@pytest.fixture(scope="class")
def server(flags, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), *flags) as server:
        yield server
    wait_until(lambda: not workers(), "actors have ended with their server")


@pytest.fixture
def client(server):
    with server.client(timeout=120) as client:
        yield client


class TestServer:
    """`ldm serve` on two nodes, of which one worker takes one and tests have the other."""

    def inline(self, bundles, calls):
        """Return the files that a server with the inline executor answers with."""
        models = {name: bundles / name for name in ("text-to-image", "class-to-image")}
        settings = ServeSettings(bundles=models, engine=SETTINGS)

        async def scenario(client, site):
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.02)
            return [await self.file(client, *call) for call in calls]

        return calling(settings, InlineExecutor(models, SETTINGS), scenario)

    async def file(self, client, model, request):
        job = (await client.post("/api/jobs", json={"model": model, "request": request})).json()
        while not (state := (await client.get(f"/api/jobs/{job['id']}")).json())["images"]:
            await asyncio.sleep(0.02)
        return (await client.get(state["images"][0]["url"])).content

    def image(self, client, job):
        """Return the file of a job, and how often workers were replaced until then."""
        state = finished(client, job, seconds=120)
        assert state["state"] == "completed", state
        (restarts,) = (
            int(float(line.split()[1]))
            for line in client.get("/metrics").text.splitlines()
            if line.startswith("ldm_worker_restarts_total ")
        )
        return client.get(state["images"][0]["url"]).content, restarts

    def wait_for_steps(self, client, job, count=3):
        url = f"/api/jobs/{job['id']}"
        wait_until(lambda: client.get(url).json()["steps"][0] >= count, "steps")

    def test_images_of_all_models_are_those_of_the_inline_executor(self, client, bundles):
        calls = [
            ("text-to-image", QUICK),
            ("class-to-image", {"class_label": 2, "seed": 1}),
            ("text-to-image", {**QUICK, "image": noisy_image(), "width": 16, "height": 16}),
        ]

        found = [self.image(client, submit(client, fields, model=name)) for name, fields in calls]

        assert found == [(image, 0) for image in self.inline(bundles, calls)]

    def test_steps_come_with_previews(self, client):
        job = submit(client, SLOW, previews=True)

        events = events_of(client, job)

        assert events[-1][0] == "completed"
        steps = [state["steps"][0] for _, state in events]
        assert steps == sorted(steps)
        assert len(set(steps)) > 20
        previews = [state["preview"] for _, state in events if "preview" in state]
        assert len(previews) > 20
        image = decode_image(previews[0])
        assert (image.format, image.size) == ("PNG", (128, 128))

    def test_a_worker_that_dies_is_replaced_and_its_request_run_again(self, client, bundles):
        job = submit(client, SLOW)
        self.wait_for_steps(client, job)
        os.kill(workers()[0], signal.SIGKILL)
        wait_until(lambda: client.get("/readyz").status_code == 503, "the death is noticed")

        image = self.image(client, job)

        assert client.get("/readyz").status_code == 200
        assert image == (*self.inline(bundles, [("text-to-image", SLOW)]), 1)

    def test_a_cancelled_job_leaves_its_worker_idle_within_a_step(self, client):
        slow = submit(client, {**SLOW, "width": 512, "height": 512, "num_images": 8})
        self.wait_for_steps(client, slow)
        (worker,) = workers()

        client.post(f"/api/jobs/{slow['id']}/cancel")
        time.sleep(0.5)
        begun = cpu_seconds(worker)
        time.sleep(1)

        assert cpu_seconds(worker) - begun < 0.1
        assert client.get(f"/api/jobs/{slow['id']}").json()["state"] == "cancelled"

    def test_that_is_told_to_end_finishes_what_has_come(self, server, flags, bundles, tmp_path):
        body = {"prompt": "red", "size": "256x256", "seed": 1, "num_inference_steps": 150}
        with (
            serving(tmp_path, *flags) as other,
            other.client(timeout=60) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            url = "/v1/images/generations"
            answer = pool.submit(client.post, url, json=body | {"response_format": "file"})
            wait_until(lambda: client.get("/api/jobs").json()["jobs"], "the request has come")
            other.process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/readyz").status_code == 503, "it drains")

            image = answer.result().content

            other.process.wait(30)
        assert other.process.returncode in (0, -signal.SIGTERM)
        assert [image] == self.inline(bundles, [("text-to-image", SLOW)])


def test_a_job_that_its_cancellation_overtakes_is_not_begun(bundle):
    """A large request takes longer to an actor than the call that cancels it."""
    worker = RayWorker(NodeBundles.of_this_machine({"tiny": bundle}), SETTINGS, TEXT_LOGS)

    async def scenario():
        await worker.open()
        try:
            await worker.cancel("job")
            work = Work(job="job", model="tiny", fields={"prompt": "red", "seed": 1})
            return await worker.generate(encode(work)), worker._executor.stats().room
        finally:
            await worker._executor.close()

    assert asyncio.run(scenario()) == (b"", SETTINGS.max_batch)
