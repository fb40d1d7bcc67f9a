"""Zip archives written byte by byte, so that any field of them can lie."""

import struct
import zlib
from dataclasses import dataclass, replace

FULL = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One member as its directory describes it; `hole` bytes of nothing follow `data`."""

    name: str
    data: bytes = b""
    hole: int = 0
    flags: int = 0x800
    method: int = 0
    size: int | None = None
    compressed_size: int | None = None
    crc32: int | None = None
    header: int | None = None
    local_name: str | None = None
    local_size: int | None = None
    extra: bytes = b""

    @property
    def true_size(self):
        return len(self.data) + self.hole


def write_archive(path, entries, *, zip64=False, end=None, end64=None):
    """Write `entries` in order; `end` and `end64` replace fields of the end records by position."""
    with path.open("wb") as file:
        placed = []
        for entry in entries:
            placed.append(
                replace(entry, header=file.tell() if entry.header is None else entry.header)
            )
            file.write(local_header(entry))
            file.write(entry.data)
            file.seek(entry.hole, 1)
        start = file.tell()
        file.write(b"".join(_directory_entry(entry, zip64=zip64) for entry in placed))
        size = file.tell() - start
        if zip64:
            fields = [44, 45, 45, 0, 0, len(entries), len(entries), size, start]
            file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", *_changed(fields, end64)))
            file.write(struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1))
        fields = [0, 0, len(entries), len(entries), size, start, 0]
        if zip64:
            fields = [0, 0, 0xFFFF, 0xFFFF, FULL, FULL, 0]
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", *_changed(fields, end)))
    return path


def local_header(entry):
    name = (entry.local_name or entry.name).encode()
    size = min(entry.true_size, FULL) if entry.local_size is None else entry.local_size
    fields = (20, entry.flags, entry.method, 0, 0, 0, size, size, len(name), 0)
    return struct.pack("<4s5H3I2H", b"PK\3\4", *fields) + name


def _directory_entry(entry, *, zip64):
    name = entry.name.encode()
    size = entry.true_size if entry.size is None else entry.size
    packed = size if entry.compressed_size is None else entry.compressed_size
    extra, header = entry.extra, entry.header
    if zip64:
        extra = struct.pack("<2H3Q", 1, 24, size, packed, header)
        size = packed = header = FULL
    crc32 = zlib.crc32(entry.data) if entry.crc32 is None else entry.crc32
    fields = (20, 20, entry.flags, entry.method, 0, 0, crc32, packed, size, len(name), len(extra))
    return struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields, 0, 0, 0, 0, header) + name + extra


def _changed(fields, changes):
    return [(changes or {}).get(position, value) for position, value in enumerate(fields)]
