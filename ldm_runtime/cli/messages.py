"""Messages of the commands on stderr: the one place where text that a file brought is escaped."""

import logging
import sys

from ldm_runtime.escaping import printable


def say(line: str) -> None:
    """Print one line to stderr, with whatever could steer a terminal escaped."""
    print(printable(line), file=sys.stderr)


class PrintableFormatter(logging.Formatter):
    """A formatter of log records whose messages are printable."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        """Return the line of a record; a traceback after it is Python's own."""
        return printable(super().formatMessage(record))
