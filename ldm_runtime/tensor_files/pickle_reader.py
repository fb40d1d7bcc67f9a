"""A reader of the pickles inside torch files that imports nothing and calls nothing.

A pickle is a program for a stack machine, and `pickle.load` runs it: a global becomes an imported
object, REDUCE calls it. Here a global is a `Name`, two strings and no more. Calling one of the few
names with which torch rebuilds tensors yields a `TensorRecord`: numbers that say where the tensor
lies. Calling any other name yields a `Stub`, which remembers the name and drops the arguments; one
class of torch that holds tensors, `ParameterDict`, yields a record that refers to them.

So a pickle can do nothing but cost time and memory, and `Limits` bounds both:

* Every opcode is one bounded step, and bytes are copied once, so work and memory are linear in the
  size of the pickle and the number of opcodes.
* Nothing here walks, hashes, compares or prints what was built. A value may therefore be nested
  as deeply, or refer to itself as often, as its maker liked, and callers must not walk it either.
* Dict keys come from a closed list of types that hash in constant time. Python hashes an integer to
  itself, so that a file can choose keys which all collide; beyond 8 bits, numbers are therefore
  keyed by their text, whose hash depends on a secret of the process. The memo, whose numbers a
  file chooses as well, is a list.

The opcodes are those that Python writes in protocols 1 to 5, without the ones that torch files
cannot hold (text persistent ids, extension codes, out-of-band buffers). Source: Lib/pickletools.py
of CPython 3.11, which documents each of them.
"""

import struct
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ldm_runtime.tensor_files.errors import FormatError
from ldm_runtime.tensor_files.pickle_machine import MAX_LINE_BYTES, Limits, Machine
from ldm_runtime.tensor_files.torch_records import (
    PARAMETER_DICT,
    SET,
    Name,
    ParameterDictRecord,
    StorageRecord,
    Stub,
    TensorRecord,
    record_of_call,
    record_of_reference,
)

_MAX_INT_BYTES = 1024
_MAX_INT_KEY = 2**8  # a chain of colliding keys is no longer than twice this
_MAX_KEY_BITS = 64  # of integers; the text of a longer one would be twice as long as the integer
_MAX_KEY_LENGTH = 4096  # equal keys are compared to the last character, every time one is set


@dataclass(frozen=True, kw_only=True)
class PickleContents:
    """The contents of a pickle.

    Attributes:
        root: Its value: plain None, bool, int, float, str, bytes, tuple, list and dict, and the
            inert records of `torch_records`. It may be nested very deeply or contain itself: do not
            recurse into it.
        globals: Every global that it names, called or not.
        storages: The first reference to every storage, by the storage's key.
        size: Bytes up to its end; others may follow.
    """

    root: object
    globals: frozenset[Name]
    storages: Mapping[str, StorageRecord]
    size: int


def read_pickle(data: bytes, limits: Limits | None = None, refused: Container[str] = ()) -> object:
    """Read one pickle and return the root of its contents; see `read_pickle_contents`."""
    return read_pickle_contents(data, limits, refused).root


def read_pickle_contents(
    data: bytes, limits: Limits | None = None, refused: Container[str] = ()
) -> PickleContents:
    """Read one pickle.

    Args:
        data: The pickle, and perhaps more behind it.
        limits: Limits of its cost.
        refused: Names of globals, and of modules, that make it an error. They would be as inert as
            all others, but only an attacker writes them.

    Raises:
        CutOffError: `data` ends before the pickle does.
        FormatError: The pickle is malformed, exceeds `limits` or has a name that is `refused`, or
            torch would not have written it.
    """
    machine = Machine(data, limits or Limits(), refused)
    for _ in range(machine.limits.max_opcodes):
        opcode = machine.number(1)
        if opcode == _STOP:
            return PickleContents(
                root=machine.pop(),
                globals=frozenset(machine.globals),
                storages=MappingProxyType(machine.storages),
                size=machine.position,
            )
        handler = _HANDLERS.get(opcode)
        if handler is None:
            raise machine.fault(f"opcode 0x{opcode:02x} has no place in a torch file")
        handler(machine)
        if len(machine.stack) > machine.limits.max_stack:
            raise machine.fault(f"more than {machine.limits.max_stack} values on the stack")
    raise machine.fault(f"more than {machine.limits.max_opcodes} opcodes")


_Handler = Callable[[Machine], None]

# --- Values ---------------------------------------------------------------------------------------


def _constant(value: object) -> _Handler:
    def push(machine: Machine) -> None:
        machine.stack.append(value)

    return push


def _fresh(make: Callable[[], object]) -> _Handler:
    def push(machine: Machine) -> None:
        machine.stack.append(make())

    return push


def _integer(width: int) -> _Handler:
    def push(machine: Machine) -> None:
        machine.stack.append(machine.number(width))

    return push


def _text(width: int) -> _Handler:
    def push(machine: Machine) -> None:
        raw = machine.counted(width, machine.limits.max_string_bytes)
        machine.stack.append(machine.text(raw))

    return push


def _bytes(width: int) -> _Handler:
    def push(machine: Machine) -> None:
        machine.stack.append(machine.counted(width, machine.limits.max_string_bytes))

    return push


def _long_integer(width: int) -> _Handler:
    def push(machine: Machine) -> None:
        raw = machine.counted(width, _MAX_INT_BYTES)
        machine.stack.append(int.from_bytes(raw, "little", signed=True))

    return push


def _signed_integer(machine: Machine) -> None:
    machine.stack.append(int.from_bytes(machine.take(4), "little", signed=True))


def _float(machine: Machine) -> None:
    machine.stack.append(struct.unpack(">d", machine.take(8))[0])


def _decimal_integer(machine: Machine) -> None:
    text = machine.line()
    if text in ("00", "01"):  # how protocol 1 writes False and True
        machine.stack.append(text == "01")
        return
    try:
        machine.stack.append(int(text.removesuffix("L")))
    except ValueError as error:
        raise machine.fault(f"{text[:40]!r} is not an integer") from error


# --- Stack, memo and framing ----------------------------------------------------------------------


def _protocol(machine: Machine) -> None:
    protocol = machine.number(1)
    if protocol > 5:
        raise machine.fault(f"pickle protocol {protocol} is newer than 5")


def _frame(machine: Machine) -> None:
    machine.take(8)  # a hint for reading ahead; the data is all here


def _mark(machine: Machine) -> None:
    if len(machine.marks) >= machine.limits.max_open_marks:
        raise machine.fault(f"more than {machine.limits.max_open_marks} collections are open")
    machine.marks.append(len(machine.stack))


def _pop(machine: Machine) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.pop()


def _pop_mark(machine: Machine) -> None:
    machine.pop_to_mark()


def _duplicate(machine: Machine) -> None:
    machine.stack.append(machine.top())


def _memoize(machine: Machine, index: int) -> None:
    if index > machine.limits.max_memo_index:
        raise machine.fault(
            f"memo slot {index} is beyond the {machine.limits.max_memo_index} allowed"
        )
    machine.memoize(index)


def _put(width: int) -> _Handler:
    def put(machine: Machine) -> None:
        _memoize(machine, machine.number(width))

    return put


def _put_next(machine: Machine) -> None:
    _memoize(machine, machine.num_memoized)


def _get(width: int) -> _Handler:
    def get(machine: Machine) -> None:
        machine.stack.append(machine.recall(machine.number(width)))

    return get


# --- Collections ----------------------------------------------------------------------------------


def _tuple_of(count: int) -> _Handler:
    def push(machine: Machine) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(values)))

    return push


def _tuple(machine: Machine) -> None:
    machine.stack.append(tuple(machine.pop_to_mark()))


def _list(machine: Machine) -> None:
    machine.stack.append(machine.pop_to_mark())


def _dict(machine: Machine) -> None:
    items = machine.pop_to_mark()
    target: dict[object, object] = {}
    _set_items(machine, target, items)
    machine.stack.append(target)


def _frozen_set(machine: Machine) -> None:
    machine.pop_to_mark()
    machine.stack.append(Stub(name=SET))


def _append(machine: Machine) -> None:
    value = machine.pop()
    _extend(machine, [value])


def _appends(machine: Machine) -> None:
    _extend(machine, machine.pop_to_mark())


def _extend(machine: Machine, values: list[object]) -> None:
    target = machine.top()
    if isinstance(target, list):
        target.extend(values)
    elif not isinstance(target, Stub):
        raise machine.fault(f"values are appended to a {type(target).__name__}")


def _set_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    _set_items(machine, machine.top(), [key, value])


def _set_many_items(machine: Machine) -> None:
    items = machine.pop_to_mark()
    _set_items(machine, machine.top(), items)


def _set_items(machine: Machine, target: object, items: list[object]) -> None:
    """Fill a dict; what a `Stub` would have kept is dropped."""
    if len(items) % 2:
        raise machine.fault("a dict is given a key without a value")
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_safe_key(machine, key)] = value
    elif not isinstance(target, Stub):
        raise machine.fault(f"items are set in a {type(target).__name__}")


def _safe_key(machine: Machine, key: object) -> object:
    """Return `key` if it hashes and compares in constant time, else an inert stand-in."""
    is_long = isinstance(key, int) and key.bit_length() > _MAX_KEY_BITS
    if is_long or (isinstance(key, (str, bytes)) and len(key) > _MAX_KEY_LENGTH):
        return Stub(name=Name(module="builtins", name=type(key).__name__))
    if isinstance(key, float) or (isinstance(key, int) and not -_MAX_INT_KEY < key < _MAX_INT_KEY):
        text = key.hex() if isinstance(key, float) else f"{key:#x}"
        return Name(module=f"builtins.{type(key).__name__}", name=text)
    if key is None or isinstance(key, (str, bytes, int, Name, Stub)):
        return key
    if isinstance(key, (tuple, StorageRecord, TensorRecord)):
        return Stub(name=Name(module="builtins", name=type(key).__name__))
    raise machine.fault(f"a {type(key).__name__} is the key of a dict")


# --- Globals and calls: where a pickle would run code ---------------------------------------------


def _global(machine: Machine) -> None:
    module, name = machine.line(), machine.line()
    _push_name(machine, module, name)


def _stack_global(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise machine.fault("a global is named by something other than two strings")
    if len(name) + len(module) > MAX_LINE_BYTES:
        raise machine.fault(f"a global has a name of {len(name) + len(module)} characters")
    _push_name(machine, module, name)


def _push_name(machine: Machine, module: str, name: str) -> None:
    if module.partition(".")[0] in machine.refused or f"{module}.{name}" in machine.refused:
        raise machine.fault(
            f"names {module}.{name}, which runs programs or touches files and is in no honest "
            "checkpoint; nothing was run, but do not trust where this file is from"
        )
    value = Name(module=module, name=name)
    machine.globals.add(value)
    if len(machine.globals) > machine.limits.max_globals:
        raise machine.fault(f"more than {machine.limits.max_globals} different globals")
    machine.stack.append(value)


def _reduce(machine: Machine) -> None:
    arguments = machine.pop_tuple()
    callee = _callee(machine, machine.pop())
    if isinstance(callee, Stub):
        machine.stack.append(callee)
        return
    try:
        record = record_of_call(callee, arguments)
    except FormatError as error:
        raise machine.fault(str(error)) from error
    machine.num_tensors += isinstance(record, TensorRecord)
    if machine.num_tensors > machine.limits.max_tensors:
        raise machine.fault(f"more than {machine.limits.max_tensors} tensors")
    machine.stack.append(record)


def _persistent_id(machine: Machine) -> None:
    try:
        record = record_of_reference(machine.pop())
    except FormatError as error:
        raise machine.fault(str(error)) from error
    if isinstance(record, StorageRecord):
        machine.storages.setdefault(record.key, record)
    machine.stack.append(record)


def _new_object(machine: Machine) -> None:
    machine.pop_tuple()
    _push_stub(machine, machine.pop())


def _new_object_with_keywords(machine: Machine) -> None:
    machine.pop()
    _new_object(machine)


def _instance(machine: Machine) -> None:
    machine.pop_to_mark()
    _global(machine)
    _push_stub(machine, machine.pop())


def _object(machine: Machine) -> None:
    values = machine.pop_to_mark()
    _push_stub(machine, values[0] if values else None)


def _build(machine: Machine) -> None:
    """Drop the attributes of an object, except for the parameters of a `ParameterDict`.

    Nothing is needed of a state dict's `_metadata`.
    """
    state = machine.pop()
    target = machine.top()
    if isinstance(target, ParameterDictRecord):
        target.take_state(state)
    elif not isinstance(target, (dict, Stub)):
        raise machine.fault(f"attributes are set on a {type(target).__name__}")


def _callee(machine: Machine, value: object) -> Name | Stub:
    if not isinstance(value, (Name, Stub)):
        raise machine.fault(f"a {type(value).__name__} is called")
    return value


def _push_stub(machine: Machine, value: object) -> None:
    callee = _callee(machine, value)
    if callee == PARAMETER_DICT:
        machine.stack.append(ParameterDictRecord())
    else:
        machine.stack.append(callee if isinstance(callee, Stub) else Stub(name=callee))


_STOP = ord(".")
_HANDLERS: Mapping[int, _Handler] = MappingProxyType(
    {
        ord(opcode): handler
        for opcode, handler in {
            b"N": _constant(None),
            b"\x88": _constant(True),
            b"\x89": _constant(False),
            b")": _constant(()),
            b"]": _fresh(list),
            b"}": _fresh(dict),
            b"\x8f": _fresh(lambda: Stub(name=SET)),
            b"K": _integer(1),
            b"M": _integer(2),
            b"J": _signed_integer,
            b"I": _decimal_integer,
            b"L": _decimal_integer,
            b"\x8a": _long_integer(1),
            b"\x8b": _long_integer(4),
            b"G": _float,
            b"\x8c": _text(1),
            b"X": _text(4),
            b"\x8d": _text(8),
            b"C": _bytes(1),
            b"B": _bytes(4),
            b"\x8e": _bytes(8),
            b"\x96": _bytes(8),
            b"\x80": _protocol,
            b"\x95": _frame,
            b"(": _mark,
            b"0": _pop,
            b"1": _pop_mark,
            b"2": _duplicate,
            b"q": _put(1),
            b"r": _put(4),
            b"\x94": _put_next,
            b"h": _get(1),
            b"j": _get(4),
            b"\x85": _tuple_of(1),
            b"\x86": _tuple_of(2),
            b"\x87": _tuple_of(3),
            b"t": _tuple,
            b"l": _list,
            b"d": _dict,
            b"\x91": _frozen_set,
            b"a": _append,
            b"e": _appends,
            b"\x90": _appends,
            b"s": _set_item,
            b"u": _set_many_items,
            b"c": _global,
            b"\x93": _stack_global,
            b"R": _reduce,
            b"Q": _persistent_id,
            b"\x81": _new_object,
            b"\x92": _new_object_with_keywords,
            b"i": _instance,
            b"o": _object,
            b"b": _build,
        }.items()
    }
)
