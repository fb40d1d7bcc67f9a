"""A server in a process of its own, which listens on a Unix domain socket."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_READY_SECONDS = 300.0


class Connection(http.client.HTTPConnection):
    """A connection to a Unix domain socket."""

    def __init__(self, path: Path, timeout: float = 120.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer: its status, headers in lower case, and body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class RunningServer:
    """A server.

    Attributes:
        process: Its process.
        path: Its socket.
    """

    process: subprocess.Popen[bytes]
    path: Path

    def get(self, path: str) -> Answer:
        """Return the answer to a GET."""
        return self._call("GET", path, b"", {})

    def post(self, path: str, body: object) -> Answer:
        """Return the answer to a POST of JSON, or of bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._call("POST", path, data, {"Content-Type": "application/json"})

    def post_form(self, path: str, fields: Mapping[str, object], image: bytes) -> Answer:
        """Return the answer to a POST of a form with an image."""
        boundary = "part-of-the-form"
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        ]
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="i.png"\r\n'
        head += "Content-Type: image/png\r\n\r\n"
        data = "".join([*parts, head]).encode() + image + f"\r\n--{boundary}--\r\n".encode()
        kind = f"multipart/form-data; boundary={boundary}"
        return self._call("POST", path, data, {"Content-Type": kind})

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over its labels, or over the lines that have some of them."""
        text = self.get("/metrics").body.decode()
        lines = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        return sum(float(value) for found, value in lines if wanted <= set(found.split(",")))

    def workers(self) -> list[int]:
        """Return the identifiers of the worker processes."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(each) for each in children if _is_worker(each)]

    def memory_bytes(self) -> int:
        """Return the resident memory of the process that answers HTTP."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024

    def _call(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        connection = Connection(self.path)
        try:
            connection.request(method, path, body or None, dict(headers))
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(status=answer.status, headers=found, body=answer.read())
        finally:
            connection.close()


@contextmanager
def serving(folder: Path, arguments: Sequence[object]) -> Iterator[RunningServer]:
    """Run `ldm serve` until the end of the block.

    Args:
        folder: An empty folder, for its socket and its messages.
        arguments: Those of the command.

    Raises:
        RuntimeError: It does not start.
    """
    path, messages = folder / "s", folder / "messages.txt"
    command = [sys.executable, "-m", "ldm_runtime", "serve", "--uds", str(path)]
    with messages.open("wb") as file:
        process = subprocess.Popen(
            [*command, *map(str, arguments)], stderr=file, env=_environment()
        )
    server = RunningServer(process=process, path=path)
    try:
        _wait_until_ready(server, messages)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def json_of(answer: Answer) -> Any:  # noqa: ANN401  (JSON)
    """Return the JSON of an answer."""
    return json.loads(answer.body)


def _environment() -> dict[str, str]:
    """Return an environment in which this checkout is imported."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _wait_until_ready(server: RunningServer, messages: Path) -> None:
    end = time.monotonic() + _READY_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        if server.path.exists() and server.get("/readyz").status == 200:
            return
        time.sleep(0.05)
    raise RuntimeError(f"the server does not start: {messages.read_text()[-2000:]}")


def _is_worker(pid: str) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return False
