"""The Ray cluster of a batch or a server: connected to with token authentication, or not at all.

Ray is imported at this one place, because its authentication and its usage statistics are decided
when it is. All who reach a cluster without authentication can run code on its nodes
(CVE-2023-48022), hence Ray has tokens from 2.52 on:
https://docs.ray.io/en/latest/ray-security/token-auth.html
"""

import io
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any

from ldm_runtime.errors import RequestError
from ldm_serve.errors import ClusterError

_LOGGER = logging.getLogger(__name__)

#: Seconds that the head of a cluster may take to take a connection.
_CONNECT_SECONDS = 10.0
_MODE = "RAY_AUTH_MODE"
_DEFAULTS = {_MODE: "token", "RAY_USAGE_STATS_ENABLED": "0"}
_TOKEN_ADVICE = (
    "start every node with RAY_AUTH_MODE=token and one token, and give it here in RAY_AUTH_TOKEN, "
    "RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
)


def _load() -> Any:  # noqa: ANN401  (its types are not installed where this package is checked)
    """Import Ray, with a token and without usage statistics unless the environment says so."""
    if "ray" not in sys.modules:  # else this is a worker of a cluster that has decided
        for name, value in _DEFAULTS.items():
            if not os.environ.get(name):
                os.environ[name] = value
    library = import_module("ray")
    import_module("ray.exceptions")
    return library


ray: Any = _load()


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect this process to a cluster for the time of the block.

    What Ray would print goes to the log: standard output has results alone.

    Args:
        address: Host and port of its head, as in "10.0.0.5:6379"; this machine is one of its nodes.

    Raises:
        RequestError: It is not such an address, or there is no token.
        ClusterError: No cluster with this token answers there.
    """
    host, port = _parts(address)
    _refuse_without_token(host)
    _check_answer(host, port)
    _connect(address)
    with redirect_stdout(_Messages()):
        try:
            for node_address in live_nodes().values():
                _refuse_without_token(node_address)
            yield
        finally:
            ray.shutdown()  # prints what it has held back


def live_nodes(cpus: float = 0, gpus: float = 0) -> dict[str, str]:
    """Return the addresses of the nodes that live and have so much, by their identifiers."""
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"]
        and node["Resources"].get("CPU", 0) >= cpus
        and node["Resources"].get("GPU", 0) >= gpus
    }


def this_node() -> str:
    """Return the identifier of the node that an actor runs on."""
    return str(ray.get_runtime_context().get_node_id())


def sentence(error: Exception) -> str:
    """Return what a message says of an error of a call, of which Ray tells in many lines."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if not lines:
        return type(cause).__name__
    if cause is not error or len(lines) == 1:
        return lines[0]
    if "never ran" in lines[-1]:  # this process has a token, and the nodes know of none
        return f"it could not be reached from the start; {_TOKEN_ADVICE}"
    place = ", ".join(line for line in lines if line.startswith(("pid: ", "ip: ")))
    text = lines[-1].split(". ")[0].rstrip(".")
    return f"{text} ({place})" if place else text


def _connect(address: str) -> None:
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except ray.exceptions.AuthenticationError as error:
        raise RequestError(
            "address", f"no token for the Ray cluster at {address}; {_TOKEN_ADVICE}"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster with this token and a node on this machine answers at {address}: "
            f"{sentence(error)}; give the address and the token of one"
        ) from error
    finally:
        if signal.getsignal(signal.SIGTERM) is not terminated:  # Ray's exits with an error
            signal.signal(signal.SIGTERM, terminated)


class _Messages(io.TextIOBase):
    """A text stream into the log."""

    def write(self, text: str) -> int:
        """Log a text that is not empty."""
        if text.strip():
            _LOGGER.info("%s", text.strip())
        return len(text)


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal():
        raise RequestError(
            "address", f"{address!r} is not HOST:PORT; give the head of a running Ray cluster"
        )
    return host.strip("[]"), int(port)


def _check_answer(host: str, port: int) -> None:
    """Try the port: Ray would do so for minutes."""
    try:
        socket.create_connection((host, port), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {host}:{port}: {error}; give the address of its head"
        ) from error


def _refuse_without_token(host: str) -> None:
    if os.environ[_MODE].lower() != "token" and not _is_loopback(host):
        raise RequestError(
            "address",
            f"the Ray cluster at {host} can be reached from other machines, and "
            f"{_MODE}={os.environ[_MODE]} leaves it open to all of them; {_TOKEN_ADVICE}",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
