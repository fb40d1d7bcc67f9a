"""Fixtures of the server's tests: bundles, and servers in processes of their own."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")

import httpx2

from ldm_runtime.testing import write_tiny_bundle

TASKS = ("text-to-image", "class-to-image", "semantic-synthesis")


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """Folder with the tiny bundles of some tasks, called after them; do not change them."""
    folder = tmp_path_factory.mktemp("bundles")
    for task in TASKS:
        write_tiny_bundle(folder / task, task)
    return folder


@pytest.fixture(scope="session")
def bundle(bundles):
    """The tiny text-to-image bundle."""
    return bundles / "text-to-image"


@dataclass(frozen=True)
class RunningServer:
    """A server in a process of its own, which listens on a Unix domain socket."""

    process: subprocess.Popen
    socket: Path
    messages: Path

    def client(self, **options):
        """Return an HTTP client of the server."""
        transport = httpx2.HTTPTransport(uds=str(self.socket))
        return httpx2.Client(transport=transport, base_url="http://localhost", **options)

    def wait_until_ready(self, seconds=60):
        end = time.monotonic() + seconds
        with self.client() as client:
            while time.monotonic() < end:
                assert self.process.poll() is None, self.messages.read_text()
                if self.socket.exists() and client.get("/readyz").status_code == 200:
                    return
                time.sleep(0.05)
        raise TimeoutError(self.messages.read_text())

    def workers(self):
        """Return the identifiers of the worker processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [
            int(pid)
            for pid in children.split()
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]


@contextmanager
def serving(folder, *arguments, environment=None):
    """Run `ldm serve` until the end of the block."""
    socket, messages = folder / "s", folder / "messages.txt"
    command = [sys.executable, "-m", "ldm_runtime", "serve", "--uds", str(socket)]
    with messages.open("w") as file:
        process = subprocess.Popen(
            [*command, "--threads", "1", "-v", *map(str, arguments)],
            stderr=file,
            env={**os.environ, **(environment or {})},
            cwd=folder,
        )
    server = RunningServer(process, socket, messages)
    try:
        server.wait_until_ready()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()


@pytest.fixture(scope="session")
def server(bundles, tmp_path_factory):
    """A server of all tiny bundles, for tests that leave it as it is."""
    with serving(tmp_path_factory.mktemp("s"), *(bundles / task for task in TASKS)) as server:
        yield server


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def ask(server):
    """OpenAI's client; calls are not repeated, so that a refusal is seen."""
    import openai  # which the environment of Ray's tests has not

    with openai.OpenAI(
        base_url="http://localhost/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx2.Client(transport=httpx2.HTTPTransport(uds=str(server.socket))),
    ) as client:
        yield client
