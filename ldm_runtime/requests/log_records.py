"""The mark of log records about one request, which may quote its prompt: servers drop them."""

import logging
from collections.abc import Mapping
from types import MappingProxyType

#: `extra` of such a record.
ABOUT_REQUEST: Mapping[str, object] = MappingProxyType({"is_about_request": True})


def is_about_request(record: logging.LogRecord) -> bool:
    """Return whether a record has the mark."""
    return bool(getattr(record, "is_about_request", False))
