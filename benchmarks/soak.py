"""Soak a server: clients, good and bad, while its workers are killed and stopped.

    python benchmarks/soak.py --seconds 600 --results benchmarks/results/soak.jsonl

Every answer is compared with the golden hash of its request, which one generator made before
without a server. Faults are killed workers, stopped workers, a full disk, clients that go away,
slow readers, malformed and oversized bodies, wrong fields and cancelled jobs, in an order that the
seed decides. Prints a line of JSON, and fails if a request is lost or an image wrong or made twice.
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from ldm_runtime import Generator
from ldm_runtime.requests.request import parse_request
from ldm_runtime.testing import write_tiny_bundle
from measuring.rows import append_line, as_line, commit, machine
from serving.running_server import Connection, RunningServer, json_of, serving

#: Answers that a client may get; all others count as lost.
_EXPECTED = frozenset({200, 202, 400, 413, 429, 503})
_PROMPTS = ("red", "blue circle", "a green square left of a red one", "nothing at all")
_SAMPLERS = ("ddim", "euler", "dpmpp_2m", "heun", "euler_ancestral", "unipc")
#: Seconds between two blows to the workers, and that a stopped one is silent before it is replaced.
_PAUSE, _STALL = 3.0, 1.5
#: Of both sides, since others compute other bits.
_BACKEND: Final = "onnxruntime"
_SLOW_READS = 20


@dataclass(kw_only=True)
class Tally:
    """What the clients saw; all of them append, which needs no lock.

    Attributes:
        statuses: Status of every answer.
        faults: Kind of every fault.
        wrong: Requests whose image was not the golden one.
        lost: Requests that got no answer, or one that is not expected, with what it was.
        seconds: Time of every good request.
        memory: Pairs of good requests so far and bytes of the server's memory.
    """

    statuses: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A request in OpenAI's form, and the hash of the file that it must bring.

    Attributes:
        body: Its fields.
        image: The file to edit, if it is an edit.
        sha256: Hash of the answer.
    """

    body: dict[str, Any]
    image: bytes | None
    sha256: str


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--results", type=Path, metavar="FILE", help="file to append the row to")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 if nothing was lost, wrong or made twice, 1 otherwise."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ldm-soak-") as folder:
        bundle = Path(folder) / "tiny"
        write_tiny_bundle(bundle)
        golden = golden_requests(bundle, args.seed)
        flags = ("--backend", _BACKEND, "--workers", args.workers, "--threads", 1)
        limits = ("--stall-seconds", _STALL, "--requests-per-minute", 1e6)
        with serving(Path(folder), (bundle, *flags, *limits)) as server:
            _check_first(server, golden[0])
            tally = soak(server, golden, args)
            row = _row(server, tally, args)
    print(as_line(row))
    if args.results is not None:
        append_line(args.results, row)
    for sentence in (*tally.lost[:5], *tally.wrong[:5]):
        print(sentence, file=sys.stderr)
    return 1 if tally.lost or tally.wrong or row["duplicate"] else 0


def golden_requests(bundle: Path, seed: int, count: int = 48) -> list[Golden]:
    """Return requests with the hashes of their files, generated one by one; a sixth are edits."""
    rng, golden = random.Random(seed), []
    upload = _large_png(seed)
    with Generator(bundle, backend=_BACKEND, threads=1) as generator:
        for number in range(count):
            fields: dict[str, Any] = {
                "prompt": rng.choice(_PROMPTS),
                "seed": rng.randrange(2**32),
                "num_inference_steps": rng.randint(2, 30),
                "sampler": rng.choice(_SAMPLERS),
                "guidance_scale": rng.choice((1.0, 3.0, 7.5)),
            }
            side = rng.choice((16, 24, 32))
            image = upload if number % 6 == 0 else None
            size = {"width": side, "height": side}
            data = generator.generate(parse_request({**fields, **size, "image": image})).encoded()
            body = {**fields, "size": f"{side}x{side}", "response_format": "file"}
            sha256 = hashlib.sha256(data).hexdigest()
            golden.append(Golden(body=body, image=image, sha256=sha256))
    return golden


def _large_png(seed: int) -> bytes:
    """Return an image of more bytes than a form's parser usually keeps in memory."""
    pixels = np.random.default_rng(seed).integers(0, 256, (620, 620, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def soak(server: RunningServer, golden: Sequence[Golden], args: argparse.Namespace) -> Tally:
    """Let clients and faults loose on a server, and return what the clients saw."""
    tally, end = Tally(), time.monotonic() + args.seconds
    threads = [
        threading.Thread(target=_client, args=(server, golden, tally, end, args.seed * 1000 + each))
        for each in range(args.clients)
    ]
    threads.append(threading.Thread(target=_blows, args=(server, tally, end, args.seed)))
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        time.sleep(min(5.0, args.seconds / 50))
        tally.memory.append((len(tally.seconds), server.memory_bytes()))
    for thread in threads:
        thread.join()
    return tally


def _check_first(server: RunningServer, wanted: Golden) -> None:
    """Ask for one image before any fault, so that a wrong set-up shows at once and not hours later.

    Raises:
        RuntimeError: It is another one than it must be.
    """
    tally = Tally()
    _ask(server, wanted, tally)
    if tally.lost or tally.wrong:
        raise RuntimeError(f"without any fault: {(tally.lost + tally.wrong)[0]}")


def _client(
    server: RunningServer, golden: Sequence[Golden], tally: Tally, end: float, seed: int
) -> None:
    """Ask for images, and now and then misbehave, until the end."""
    rng = random.Random(seed)
    bad = (_go_away, _read_slowly, _malformed, _oversized, _wrong_field, _cancel)
    while time.monotonic() < end:
        wanted = rng.choice(golden)
        act: Callable[[RunningServer, Golden, Tally], None] = _ask
        if rng.random() < 0.06:
            act = rng.choice(bad)
            tally.faults.append(act.__name__.strip("_"))
        try:
            act(server, wanted, tally)
        except OSError as error:
            tally.lost.append(f"{act.__name__}: {error!r}")


def _ask(server: RunningServer, wanted: Golden, tally: Tally) -> None:
    """Ask for an image as a patient client does: a refusal is followed by another try."""
    begun = time.monotonic()
    for _ in itertools.count():
        if wanted.image is None:
            answer = server.post("/v1/images/generations", wanted.body)
        else:
            answer = server.post_form("/v1/images/edits", wanted.body, wanted.image)
        _note(answer.status, tally, str(answer.body[:200]))
        if answer.status not in (429, 503):
            break
        if "retry-after" not in answer.headers:
            tally.lost.append(f"{answer.status} without Retry-After")
        time.sleep(0.2)
    tally.seconds.append(time.monotonic() - begun)
    if answer.status == 200 and hashlib.sha256(answer.body).hexdigest() != wanted.sha256:
        tally.wrong.append(f"{wanted.body} gave another image")


def _go_away(server: RunningServer, wanted: Golden, tally: Tally) -> None:
    connection = Connection(server.path)
    body = {**wanted.body, "num_inference_steps": 200}
    connection.request("POST", "/v1/images/generations", _encoded(body), _JSON)
    time.sleep(0.02)
    connection.close()


def _read_slowly(server: RunningServer, wanted: Golden, tally: Tally) -> None:
    connection = Connection(server.path)
    body = {**wanted.body, "stream": True, "partial_images": 3}
    del body["response_format"]
    connection.request("POST", "/v1/images/generations", _encoded(body), _JSON)
    answer = connection.getresponse()
    _note(answer.status, tally, "slow reader")
    found = b""
    for _ in range(_SLOW_READS):
        found += answer.read(64)
        time.sleep(0.05)
    found += answer.read()
    if answer.status == 200 and b"completed" not in found:
        tally.lost.append(f"a stream ended without its image: {found[-200:]!r}")
    connection.close()


def _malformed(server: RunningServer, wanted: Golden, tally: Tally) -> None:
    _expect(server, b'{"prompt": "\\ud800', 400, tally)


def _oversized(server: RunningServer, wanted: Golden, tally: Tally) -> None:
    _expect(server, _encoded({"prompt": "x" * 300_000}), 413, tally)


def _wrong_field(server: RunningServer, wanted: Golden, tally: Tally) -> None:
    _expect(server, _encoded({**wanted.body, "quality": "high"}), 400, tally)


def _cancel(server: RunningServer, wanted: Golden, tally: Tally) -> None:
    request = {"prompt": "red", "num_inference_steps": 200, "width": 64, "height": 64}
    answer = server.post("/api/jobs", {"request": request})
    _note(answer.status, tally, "a job")
    if answer.status == 202:
        path = f"/api/jobs/{json_of(answer)['id']}/cancel"
        server.post(path, {})


def _expect(server: RunningServer, body: bytes, status: int, tally: Tally) -> None:
    answer = server.post("/v1/images/generations", body)
    _note(answer.status, tally, str(answer.body[:200]))
    if answer.status != status:
        tally.lost.append(f"{answer.status} and not {status}")


def _blows(server: RunningServer, tally: Tally, end: float, seed: int) -> None:
    """Every few seconds, kill or stop a worker, or leave the server no room on the disk."""
    rng = random.Random(seed)
    while time.monotonic() < end - 2 * _STALL:
        time.sleep(rng.uniform(0.5, 1.5) * _PAUSE)
        kind = rng.choice(("kill_worker", "stop_worker", "full_disk"))
        workers = server.workers()
        if kind == "full_disk":
            _fill_disk(server.process.pid)
        elif not workers or not _signalled(rng.choice(workers), _SIGNALS[kind]):
            continue
        tally.faults.append(kind)


_SIGNALS = {"kill_worker": signal.SIGKILL, "stop_worker": signal.SIGSTOP}


def _signalled(process: int, number: signal.Signals) -> bool:
    """Send a signal, and return whether the process was there."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True


def _fill_disk(process: int) -> None:
    """For a second, let every byte that a process writes to a file be one too many."""
    unlimited = resource.prlimit(process, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    time.sleep(1.0)
    resource.prlimit(process, resource.RLIMIT_FSIZE, unlimited)


_JSON = {"Content-Type": "application/json"}


def _encoded(body: object) -> bytes:
    return json.dumps(body).encode()


def _note(status: int, tally: Tally, what: str) -> None:
    tally.statuses.append(status)
    if status not in _EXPECTED:
        tally.lost.append(f"{status}: {what}")


def _row(server: RunningServer, tally: Tally, args: argparse.Namespace) -> dict[str, Any]:
    seconds, faults = np.asarray(tally.seconds), Counter(tally.faults)
    statuses = Counter(tally.statuses)
    asked_for = 1 + statuses[200] + statuses[202] + faults["go_away"]  # one before the soak
    cancelled = server.metric("ldm_requests_total", outcome="cancelled")
    images = server.metric("ldm_images_total")
    return {
        "benchmark": "soak",
        "commit": commit(),
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {
            "seconds": args.seconds,
            "seed": args.seed,
            "clients": args.clients,
            "workers": args.workers,
        },
        "requests": len(tally.statuses),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "faults": dict(faults),
        "num_faults": len(tally.faults),
        "lost": len(tally.lost),
        "wrong": len(tally.wrong),
        "duplicate": max(0, int(images + cancelled) - asked_for),
        "worker_restarts": server.metric("ldm_worker_restarts_total"),
        "p50_seconds": round(float(np.percentile(seconds, 50)), 4),
        "p95_seconds": round(float(np.percentile(seconds, 95)), 4),
        "max_seconds": round(float(seconds.max()), 4),
        "memory_mb_per_1000_requests": _slope(tally.memory),
    }


def _slope(memory: Sequence[tuple[int, int]]) -> float | None:
    """Return the growth of the server's memory after the first third of the samples."""
    late = memory[len(memory) // 3 :]
    if len({requests for requests, _ in late}) < 2:
        return None
    requests, sizes = (np.asarray(each, dtype=float) for each in zip(*late, strict=True))
    return round(float(np.polyfit(requests, sizes, 1)[0]) * 1000 / 1e6, 4)


if __name__ == "__main__":
    sys.exit(main())
