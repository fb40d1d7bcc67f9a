"""Pickles written opcode by opcode, because no honest pickler writes what the tests need.

Each function returns the bytes that leave one value on the stack; `pickled` wraps them up.
"""

import struct

MARK = b"("
NONE = b"N"
EMPTY_TUPLE = b")"
EMPTY_LIST = b"]"
EMPTY_DICT = b"}"
DUP = b"2"
POP = b"0"
TUPLE1 = b"\x85"
TUPLE2 = b"\x86"
APPEND = b"a"
SETITEM = b"s"
STOP = b"."


def pickled(*values, protocol=2):
    """Return a whole pickle; its result is the last of `values`."""
    return b"\x80" + bytes([protocol]) + b"".join(values) + STOP


def text(value):
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value):
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def boolean(value):
    return b"\x88" if value else b"\x89"


def tuple_of(*values):
    return MARK + b"".join(values) + b"t"


def list_of(*values):
    return EMPTY_LIST + MARK + b"".join(values) + b"e"


def dict_of(items):
    """Return a dict of encoded keys and values."""
    return EMPTY_DICT + MARK + b"".join(key + value for key, value in items) + b"u"


def named(items):
    """Return a dict with plain strings for keys."""
    return dict_of((text(key), value) for key, value in items.items())


def global_of(name):
    module, _, attribute = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def stack_global_of(name):
    module, _, attribute = name.rpartition(".")
    return text(module) + text(attribute) + b"\x93"


def call(name, *arguments):
    return global_of(name) + tuple_of(*arguments) + b"R"


def new_object(name, *arguments):
    return global_of(name) + tuple_of(*arguments) + b"\x81"


def new_object_with_keywords(name, *arguments):
    return global_of(name) + tuple_of(*arguments) + EMPTY_DICT + b"\x92"


def old_instance(name, *arguments):
    return MARK + b"".join(arguments) + b"i" + global_of(name)[1:]


def old_object(name, *arguments):
    return MARK + global_of(name) + b"".join(arguments) + b"o"


def build(target, state):
    return target + state + b"b"


def put(index):
    """Keep what the previous value is under `index`."""
    return b"r" + struct.pack("<I", index)


def get(index):
    return b"j" + struct.pack("<I", index)


def storage(key="0", kind="torch.FloatStorage", numel=6):
    return tuple_of(text("storage"), global_of(kind), text(key), text("cpu"), integer(numel)) + b"Q"


def tensor(storage, offset=0, shape=(2, 3), stride=(3, 1), metadata=b""):
    return call(
        "torch._utils._rebuild_tensor_v2",
        storage,
        integer(offset),
        tuple_of(*map(integer, shape)),
        tuple_of(*map(integer, stride)),
        boolean(False),
        call("collections.OrderedDict"),
        *([metadata] if metadata else []),
    )


def legacy_header(version=1001, system=None):
    """Return the pickles with which torch's legacy format begins."""
    little_endian = named({"little_endian": boolean(True)})
    magic = integer(0x1950A86A20F9469CFC6C)
    return pickled(magic) + pickled(integer(version)) + pickled(system or little_endian)
