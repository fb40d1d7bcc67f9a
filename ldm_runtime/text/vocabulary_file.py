"""Vocabulary files with one entry per line, compressed or not."""

import gzip
import zlib
from pathlib import Path


def read_vocabulary(path: Path) -> list[str]:
    r"""Return the lines of a vocabulary, without their line ends, \n or \r\n.

    Raises:
        ValueError: The file is damaged, or not UTF-8 text.
    """
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode()
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or not a vocabulary: {error}") from error
    return [line.removesuffix("\r") for line in text.rstrip().split("\n")]
