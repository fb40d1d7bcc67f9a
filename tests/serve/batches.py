"""Batches whose images are hashes: runs of `BatchRun` without a model, for tests of its folder."""

import asyncio
import hashlib
import os
import signal
import sys
import tempfile
from pathlib import Path

import msgspec

from ldm_runtime.progress import Silent
from ldm_serve.batch.folder import BatchFolder
from ldm_serve.batch.run import BatchRun
from ldm_serve.batch.units import BatchModel, RequestFile
from ldm_serve.executors.contract import ExecutorStats
from ldm_serve.executors.messages import Failed, Finished


def image_of(fields):
    """Return the file that the executor of hashes makes of the fields of a request."""
    return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).digest()


class HashExecutor:
    """An executor whose images are hashes; requests whose prompt is "fail" do.

    Args:
        room: Most images at once.
    """

    def __init__(self, room=4):
        self._room = room
        self.running, self.most_running, self.submitted = set(), 0, []
        self.is_closed = False

    async def start(self, report, changed):
        self._report, self._changed = report, changed

    def submit(self, work):
        self.running.add(work.job)
        self.submitted.append(work.job)
        self.most_running = max(self.most_running, len(self.running))
        asyncio.get_running_loop().call_soon(self._finish, work)

    def cancel(self, job):
        self.running.discard(job)

    def stats(self):
        room = self._room - len(self.running)
        return ExecutorStats(is_ready=True, room=room, workers=1, restarts=0)

    async def close(self):
        self.is_closed = True

    def _finish(self, work):
        self.running.remove(work.job)
        if work.fields.get("prompt") == "fail":
            failed = Failed(job=work.job, status=500, code="internal_error", message="it failed")
            self._report(failed)
        else:
            self._report(
                Finished(
                    job=work.job,
                    images=[image_of(work.fields)],
                    seeds=[work.fields["seed"]],
                    metadata=[{}],
                    infotexts=[None],
                    timings={"total": 0.25},
                )
            )
        self._changed()


def run_batch(requests, out, bundle, executor=None, **options):
    """Run a batch of a bundle, or of a `BatchModel`, and return its counts."""
    executor = HashExecutor() if executor is None else executor
    model = bundle if isinstance(bundle, BatchModel) else BatchModel.of_bundle(bundle)
    with BatchFolder(out) as folder:
        units = RequestFile(requests, model, folder.seed)
        run = BatchRun(units, folder, model="model", **options)
        if missing := run.survey():
            asyncio.run(run.generate(executor, missing, Silent()))
        return run.counts


def results_of(out):
    """Return the lines of `results.jsonl`."""
    return [msgspec.json.decode(line) for line in (out / "results.jsonl").read_bytes().splitlines()]


def files_of(out):
    """Return the contents of all files but the log, hidden ones included, by path."""
    paths = (each for each in sorted(out.rglob("*")) if each.is_file())
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in paths
        if path.name != "results.jsonl"
    }


def kill_at_every_change(requests, bundle):
    """Kill runs at their first change on disk, their second, and so on; complete each.

    Writes how many there were. It forks, so the process must have one thread.
    """
    with tempfile.TemporaryDirectory() as folder:
        for point in range(1, 1000):
            out = Path(folder) / str(point)
            is_over = _forked(
                lambda out=out, point=point: _killed_run(point, requests, out, bundle)
            )
            run_batch(requests, out, bundle)
            _check_complete(requests, out, bundle)
            if is_over:
                sys.stdout.write(f"{point - 1}\n")
                return


def _forked(function):
    """Return whether a function ends in a process that may be killed."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def _killed_run(point, requests, out, bundle):
    changes = 0

    def count_changes(event, arguments):
        nonlocal changes
        is_change = event in {"open", "os.rename", "os.mkdir", "os.remove", "os.truncate"}
        if is_change and str(arguments[0]).startswith(str(out)):
            changes += 1
            if changes == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_changes)
    run_batch(requests, out, bundle)


def _check_complete(requests, out, bundle):
    """Check that a folder has every image, one result line for each, and nothing else."""
    from ldm_runtime.requests.request_json import request_to_fields

    with BatchFolder(out) as folder:
        units = list(RequestFile(requests, BatchModel.of_bundle(bundle), folder.seed))
    images = {
        f"{unit.name[:2]}/{unit.name}.png": image_of(request_to_fields(unit.request.as_request()))
        for unit in units
    }
    files = files_of(out)
    del files["batch.json"]
    assert files == images
    lines = {(each["line"], each["image"]): each for each in results_of(out)}
    assert lines.keys() == {(unit.line, unit.image) for unit in units}
    assert len(results_of(out)) == len(units)
    for line in lines.values():
        assert line["sha256"] == hashlib.sha256(images[line["path"]]).hexdigest()


if __name__ == "__main__":
    kill_at_every_change(Path(sys.argv[1]), Path(sys.argv[2]))
