"""Messages of a server and its workers on stderr, as text or as JSON, a line each."""

import json
import logging
from datetime import UTC, datetime
from typing import Literal

from ldm_runtime.cli.messages import MessageFormatter
from ldm_runtime.requests.log_records import is_about_request
from ldm_serve.settings import LogSettings

#: Who writes a message.
Process = Literal["server", "worker"]


def show_logs(settings: LogSettings, process: Process) -> None:
    """Show the messages of this process on stderr, in place of what showed them before.

    Args:
        settings: Which, and how.
        process: Who writes them.
    """
    handler = logging.StreamHandler()
    is_json = settings.format == "json"
    handler.setFormatter(_JsonFormatter(process) if is_json else _TextFormatter(process))
    if settings.leaves_out_requests:
        handler.addFilter(lambda record: not is_about_request(record))
    logging.basicConfig(level=settings.level, handlers=[handler], force=True)
    logging.getLogger("ldm_serve").setLevel(settings.own_level)


def values(**fields: object) -> dict[str, object]:
    """Return the `extra` of a message whose values are fields of their own in JSON."""
    return {"values": fields}


class _TextFormatter(MessageFormatter):
    """Writes lines such as "worker: warning: no compiled models are kept"."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._prefix = "" if process == "server" else f"{process}: "

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        return self._prefix + super().formatMessage(record)


class _JsonFormatter(logging.Formatter):
    """Writes JSON objects: `time`, `level`, `process`, `logger`, `message`, and its values."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        fields = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "values", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)
