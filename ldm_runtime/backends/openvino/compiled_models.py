"""Compiled models of OpenVINO: for a few shapes in memory, and in this user's cache folder.

A compiled model is code for the shapes, the precision and the processor that it was compiled for.
On disk it lies in a folder of its graph's and weights' hashes and of OpenVINO's version, below the
user's own cache folder, and is read only if no one else can write there: see `engines.trust`.
"""

import hashlib
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from ldm_runtime.backends.openvino.library import load_openvino
from ldm_runtime.engines.trust import cache_folder, is_own_folder

_LOGGER = logging.getLogger(__name__)
_FOLDER = "openvino"
#: Most bytes of compiled models on disk; the components that were opened longest ago go first. One
#: holds the weights once more, those of Stable Diffusion 1.5's UNet in bf16 in 1.7 GB.
MOST_BYTES = 20_000_000_000

Key = TypeVar("Key")
Value = TypeVar("Value")


class Latest(Generic[Key, Value]):
    """The values that were used last, made when they are first needed.

    Args:
        make: Makes the value of a key.
        count: How many are kept.
    """

    def __init__(self, make: Callable[[Key], Value], count: int) -> None:
        self._make, self._count = make, count
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = Lock()

    def __getitem__(self, key: Key) -> Value:
        with self._lock:
            if key not in self._values:
                while len(self._values) >= self._count:  # before, so that both never coexist
                    self._values.popitem(last=False)
                self._values[key] = self._make(key)
            self._values.move_to_end(key)
            return self._values[key]


def cache_for(hashes: Iterable[str]) -> Path | None:
    """Return the folder of a component's compiled models; None without one that is safe.

    Args:
        hashes: SHA-256 of everything that they are compiled from.
    """
    version = load_openvino().__version__
    key = hashlib.sha256("\n".join([version, *hashes]).encode()).hexdigest()
    parent = cache_folder() / _FOLDER
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        (parent / key).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        _LOGGER.warning(
            "%s cannot be written (%s), so that models are compiled again in every process; set "
            "XDG_CACHE_HOME to a folder that can",
            parent,
            error.strerror,
        )
        return None
    if not (is_own_folder(parent) and is_own_folder(parent / key)):
        _LOGGER.warning(
            "%s can be written by others, so that no compiled model is read from it; "
            "run `chmod -R go-w %s`",
            parent,
            parent,
        )
        return None
    os.utime(parent / key)
    _remove_oldest(parent, but=key)
    return parent / key


def _remove_oldest(parent: Path, but: str) -> None:
    """Remove the folders that were used longest ago until the others have few enough bytes."""
    folders = sorted(parent.iterdir(), key=lambda each: each.stat().st_mtime)
    sizes = {each: sum(file.stat().st_size for file in each.iterdir()) for each in folders}
    excess = sum(sizes.values()) - MOST_BYTES
    for folder in folders:
        if excess > 0 and folder.name != but:
            shutil.rmtree(folder, ignore_errors=True)  # another process may use it
            excess -= sizes[folder]
