"""Messages of the commands on stderr: the one place where text that a file brought is escaped."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ldm_runtime.escaping import printable
from ldm_runtime.progress import Progress, Silent, reporting_to

_PACKAGES = ("ldm_runtime", "ldm_export")


def say(line: str) -> None:
    """Print one line to stderr, with whatever could steer a terminal escaped."""
    if sys.stderr is not None:  # as by `2>&-`; print would take stdout for it
        print(printable(line), file=sys.stderr)


def flush_stdout() -> None:
    """Write out what stdout holds; a stdout that was closed from the start holds nothing.

    Raises:
        OSError: Its disk is full, or the reader of its pipe has closed it.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def give_up_stdout() -> None:
    """Drop what stdout holds and cannot write, so that Python does not try again as it ends."""
    try:
        flush_stdout()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_any_text() -> None:
    """Escape on stdout what its encoding lacks, as Python does on stderr, instead of failing."""
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper) and "surrogateescape" not in (stream.errors or ""):
        stream.reconfigure(errors="backslashreplace")


def add_message_flags(parser: argparse._ActionsContainer) -> None:
    """Add `--quiet` and `--verbose`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "-q", "--quiet", action="store_true", help="say nothing but errors: no progress, no warning"
    )
    group.add_argument("-v", "--verbose", action="store_true", help="say more of what is done")


def show_messages(
    args: argparse.Namespace, usual: int | None = None, *, repeats: bool = False
) -> None:
    """Show log messages on stderr; errors alone if quiet, and all if verbose.

    Args:
        args: Arguments with the flags of `add_message_flags`.
        usual: The level from which on messages of our packages are shown otherwise; None is that of
            all others, warnings.
        repeats: Whether a message is shown as often as it is logged, and not once, as by commands
            that run on: a fault that comes back is news, and what was shown would fill the memory.
    """
    handler = logging.StreamHandler()
    if not repeats:
        handler.addFilter(_Once())
    handler.setFormatter(MessageFormatter())
    handler.setLevel(logging.ERROR if args.quiet else logging.DEBUG)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    level = logging.DEBUG if args.verbose else usual
    if level is not None:
        for package in _PACKAGES:
            logging.getLogger(package).setLevel(level)


@contextmanager
def reporting(args: argparse.Namespace) -> Iterator[Progress]:
    """Report progress to stderr unless the command is quiet, or stderr is closed."""
    if args.quiet or sys.stderr is None:
        yield Silent()
        return
    with reporting_to(sys.stderr) as progress:
        yield progress


class MessageFormatter(logging.Formatter):
    """A formatter of printable messages such as "warning: the prompt is too long"."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        """Return the line of a record; a traceback after it is Python's own."""
        return f"{record.levelname.lower()}: {printable(record.message)}"


class _Once(logging.Filter):
    """Shows a message the first time only: every image of a command logs the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._shown
        self._shown.add(message)
        return is_new
