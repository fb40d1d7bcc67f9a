"""The main function of a worker process."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from ldm_runtime.errors import LdmError
from ldm_serve.executors.inline import run
from ldm_serve.executors.messages import decode_order, encode
from ldm_serve.executors.open_models import OpenModels
from ldm_serve.executors.worker import Worker
from ldm_serve.logs import show_logs
from ldm_serve.settings import EngineSettings, LogSettings

_LOGGER = logging.getLogger(__name__)
# Numbers of prctl(2).
_SET_PARENT_DEATH_SIGNAL, _SET_NO_NEW_PRIVILEGES = 1, 38


def work(
    connection: Connection,
    bundles: Mapping[str, Path],
    settings: EngineSettings,
    logs: LogSettings,
) -> None:
    """Serve the process at the other end of a connection, until it quits or dies.

    Args:
        connection: Brings orders and takes reports.
        bundles: Folder of every model; the first is opened at once.
        settings: How they are opened.
        logs: What is said on stderr.
    """
    # Ctrl-C reaches the whole group, and SIGTERM all of a service: the parent drains.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _tie_to_parent()
    show_logs(logs, "worker")
    models = OpenModels(bundles, settings)
    try:
        with Worker(models, lambda report: connection.send_bytes(encode(report))) as worker:
            worker.open(next(iter(bundles)))
            run(
                worker,
                lambda: decode_order(connection.recv_bytes()),
                lambda: not connection.poll(),
            )
    except (EOFError, BrokenPipeError, ConnectionResetError):
        _LOGGER.warning("the server has ended")
    except LdmError as error:
        _LOGGER.error("%s", error)
        sys.exit(1)


def _tie_to_parent() -> None:
    """Let the kernel end this process with its parent, and deny it new privileges."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    library = ctypes.CDLL(None)
    library.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    library.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if os.getppid() != parent:  # it died in between
        sys.exit(1)
