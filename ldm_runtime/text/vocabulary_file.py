"""Vocabulary files with one entry per line, compressed or not."""

import gzip
import io
import zlib
from pathlib import Path

#: More than twice CLIP's vocabulary, unpacked.
_MAX_BYTES = 8 << 20


def read_vocabulary(path: Path) -> list[str]:
    r"""Return the lines of a vocabulary, without their line ends, \n or \r\n.

    Raises:
        ValueError: The file is damaged, not UTF-8 text, or larger than any vocabulary.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    try:
        if data.startswith(b"\x1f\x8b"):
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"{path} has more than {_MAX_BYTES} bytes, which no vocabulary has")
        text = data.decode()
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or not a vocabulary: {error}") from error
    return [line.removesuffix("\r") for line in text.rstrip().split("\n")]
