"""The members of an untrusted zip archive, and their places in the file.

Only what torch writes is accepted: members stored as they are, no encryption, no comment, one
disk. The directory, every member's local header and every member's bytes are proved to lie inside
the file and apart from each other, and no two names differ in case alone, because torch's own
reader does not tell such names apart and takes the first. What is not looked at: dates, versions,
disk numbers, attributes, and the bytes of members; the caller compares a CRC where it counts.

Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.7, 4.3.12 to 4.3.16 and 4.5.3.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from ldm_runtime.tensor_files.errors import FormatError

_MAX_DIRECTORY_BYTES = 32 << 20
_MAX_MEMBERS = 100_000

_STORED = 0
_ENCRYPTED = 0x2041  # any of the three flags that mean encryption
_ZIP64_EXTRA = 1
_SEE_ZIP64 = (0xFFFF, 0xFFFFFFFF)  # in place of a number that needs more bits
_DAMAGED = "the file is damaged or incomplete, get it again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One member: `size` bytes from byte `start` of the file, whose CRC-32 should be `crc32`."""

    start: int
    size: int
    crc32: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """One kind of fixed-size record in a zip archive."""

    what: str
    signature: bytes
    layout: struct.Struct


_END = _Record(what="end record", signature=b"PK\5\6", layout=struct.Struct("<4s4H2IH"))
_LOCATOR64 = _Record(what="zip64 locator", signature=b"PK\6\7", layout=struct.Struct("<4sIQI"))
_END64 = _Record(what="zip64 end record", signature=b"PK\6\6", layout=struct.Struct("<4sQ2H2I4Q"))
_ENTRY = _Record(what="directory entry", signature=b"PK\1\2", layout=struct.Struct("<4s6H3I5H2I"))
_LOCAL = _Record(what="local header", signature=b"PK\3\4", layout=struct.Struct("<4s5H3I2H"))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Directory:
    start: int
    end: int
    num_entries: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    name: bytes
    flags: int
    method: int
    crc32: int
    size: int
    compressed_size: int
    header: int  # where the local header begins


def read_zip_directory(data: memoryview) -> Mapping[str, Member]:
    """Find the members of the archive `data`.

    Raises:
        FormatError: The archive is damaged, or is not of the kind that torch writes.
    """
    directory = _find_directory(data)
    members: dict[str, Member] = {}
    folded: set[str] = set()
    spans = [(directory.start, directory.end)]
    for entry in _read_entries(data, directory):
        name = _checked_name(entry)
        if name.casefold() in folded:
            raise FormatError(f"the archive has two members named {name!a}, case aside; {_DAMAGED}")
        folded.add(name.casefold())
        start = _data_start(data, entry)
        members[name] = Member(start=start, size=entry.size, crc32=entry.crc32)
        spans.append((entry.header, start + entry.size))
    if any(end > start for (_, end), (start, _) in pairwise(sorted(spans))):
        raise FormatError(f"members of the archive lie over each other; {_DAMAGED}")
    return members


def _unpack(record: _Record, data: memoryview, start: int) -> tuple[int, ...]:
    """Read the record at byte `start`, without its signature."""
    if not 0 <= start <= len(data) - record.layout.size:
        raise FormatError(f"the archive's {record.what} is cut off or missing; {_DAMAGED}")
    signature, *fields = record.layout.unpack_from(data, start)
    if signature != record.signature:
        raise FormatError(f"the archive has no {record.what} at byte {start}; {_DAMAGED}")
    return tuple(fields)


def _find_directory(data: memoryview) -> _Directory:
    end = len(data) - _END.layout.size
    *_, num_here, num_entries, size, start, comment_size = _unpack(_END, data, end)
    locator = end - _LOCATOR64.layout.size
    if locator >= 0 and data[locator : locator + 4] == _LOCATOR64.signature:
        end = locator - _END64.layout.size
        values = _unpack(_END64, data, end)[-4:]
        for short, long in zip((num_here, num_entries, size, start), values, strict=True):
            if short != long and short not in _SEE_ZIP64:
                raise FormatError(f"the archive's two end records disagree; {_DAMAGED}")
        num_here, num_entries, size, start = values
    if comment_size or num_here != num_entries or start + size != end:
        raise FormatError(f"the archive's end record contradicts the file; {_DAMAGED}")
    if size > _MAX_DIRECTORY_BYTES or num_entries > _MAX_MEMBERS:
        raise FormatError(f"the archive lists {num_entries} members in {size} bytes: too many")
    return _Directory(start=start, end=end, num_entries=num_entries)


def _read_entries(data: memoryview, directory: _Directory) -> Iterator[_Entry]:
    data = data[: directory.end]
    position = directory.start
    for _ in range(directory.num_entries):
        fields = _unpack(_ENTRY, data, position)
        _, _, flags, method, _, _, crc32, compressed_size, size = fields[:9]
        name_size, extra_size, comment_size, _, _, _, header = fields[9:]
        name_start = position + _ENTRY.layout.size
        extra_start = name_start + name_size
        position = extra_start + extra_size + comment_size
        extra = bytes(data[extra_start : extra_start + extra_size])
        size, compressed_size, header = _with_zip64((size, compressed_size, header), extra)
        yield _Entry(
            name=bytes(data[name_start:extra_start]),
            flags=flags,
            method=method,
            crc32=crc32,
            size=size,
            compressed_size=compressed_size,
            header=header,
        )
    if position != directory.end:
        raise FormatError(f"the archive's directory does not fill its place; {_DAMAGED}")


def _with_zip64(values: tuple[int, ...], extra: bytes) -> list[int]:
    """Replace the values that did not fit in 32 bits by those of the zip64 extra field."""
    large = _zip64_values(extra)
    full = [next(large, None) if value == _SEE_ZIP64[1] else value for value in values]
    if None in full:
        raise FormatError(f"a zip64 field is missing in the archive; {_DAMAGED}")
    return [value for value in full if value is not None]


def _zip64_values(extra: bytes) -> Iterator[int]:
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == _ZIP64_EXTRA:
            for start in range(position, min(position + size, len(extra)) - 7, 8):
                yield int.from_bytes(extra[start : start + 8], "little")
            return
        position += size


def _checked_name(entry: _Entry) -> str:
    try:
        name = entry.name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("a member of the archive has a name that is not UTF-8") from error
    if entry.flags & _ENCRYPTED:
        raise FormatError(f"member {name!a} of the archive is encrypted; decrypt the file first")
    if entry.method != _STORED or entry.size != entry.compressed_size:
        raise FormatError(
            f"member {name!a} of the archive is compressed (method {entry.method}), which torch "
            "never does; unzip it and zip it again with `zip -0 -r`"
        )
    return name


def _data_start(data: memoryview, entry: _Entry) -> int:
    """Find where a member's bytes begin, after a local header that must be of the same member."""
    _, flags, method, _, _, _, compressed_size, size, name_size, extra_size = _unpack(
        _LOCAL, data, entry.header
    )
    name_start = entry.header + _LOCAL.layout.size
    name = bytes(data[name_start : name_start + name_size])
    start = name_start + name_size + extra_size
    # A header written before its member is, says 0; one beyond 4 GiB refers to its extra field.
    later = (0, _SEE_ZIP64[1])
    same_size = size in (entry.size, *later) and compressed_size in (entry.size, *later)
    same = (flags, method, name) == (entry.flags, entry.method, entry.name) and same_size
    if not same or start + entry.size > len(data):
        raise FormatError(
            f"the archive's local header of {entry.name!a} contradicts its directory; {_DAMAGED}"
        )
    return start
