"""The pickle reader understands what torch writes, runs nothing, and stays within its limits."""

import collections
import io
import pickle
import struct
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_runtime.tensor_files.errors import FormatError
from ldm_runtime.tensor_files.pickle_machine import Limits
from ldm_runtime.tensor_files.pickle_reader import read_pickle
from ldm_runtime.tensor_files.torch_records import (
    Name,
    ParameterDictRecord,
    Stub,
    TensorRecord,
)
from tests.export import opcodes as op

SECONDS = 20  # what a hostile pickle may take on a busy 2-core machine; the usual is below 3

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=300)
)
KEYS = st.text() | st.integers(-255, 255) | st.booleans() | st.none()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)


class Unknown:
    """Stands for a training framework's class."""

    def __init__(self):
        self.state = {"best": [1, 2]}


# --- What it reads ------------------------------------------------------------------------------


@given(VALUES, st.sampled_from([1, 2, 3, 4, 5]))
def test_plain_values_read_as_pickle_would_read_them(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol=protocol)) == value


@given(st.binary(max_size=1000), st.sampled_from([3, 4, 5]))
def test_bytes_are_read_as_bytes(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol=protocol)) == value


@pytest.mark.parametrize("size", [1000, 100_000])
def test_long_collections_are_read_in_full(size):
    named = dict.fromkeys(map(str, range(size)))
    values = [list(range(size)), named, tuple(range(size)), "é" * size]

    assert read_pickle(pickle.dumps(values, protocol=2)) == values


def test_a_value_shared_in_the_pickle_is_shared_in_the_result():
    shared = [1]

    first, second = read_pickle(pickle.dumps([shared, shared], protocol=4))

    assert first is second


def test_a_list_that_contains_itself_is_read():
    endless = []
    endless.append(endless)

    result = read_pickle(pickle.dumps(endless, protocol=2))

    assert result[0] is result


def test_an_ordered_dict_becomes_a_dict_without_its_attributes():
    ordered = collections.OrderedDict(b=1, a=2)
    ordered._metadata = {"version": 1}

    result = read_pickle(pickle.dumps(ordered, protocol=2))

    assert type(result) is dict
    assert list(result.items()) == [("b", 1), ("a", 2)]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Unknown(), f"{Unknown.__module__}.Unknown"),
        ({1, 2}, "set"),
        (frozenset({1}), "set"),
        (collections.defaultdict(list, a=[1]), "collections.defaultdict"),
        (collections.deque([1]), "collections.deque"),
        (complex(1, 2), "complex"),
        (range(3), "range"),
    ],
)
def test_an_object_becomes_a_stub_with_its_name(value, name, protocol):
    result = read_pickle(pickle.dumps([value, "next"], protocol=protocol))

    assert isinstance(result[0], Stub)
    assert str(result[0].name).endswith(name)
    assert result[1] == "next"


def test_a_class_becomes_its_name_even_as_a_key():
    result = read_pickle(pickle.dumps({collections.deque: 1}, protocol=2))

    assert result == {Name(module="collections", name="deque"): 1}


def test_a_tensor_becomes_a_record_of_where_it_lies():
    record = read_pickle(op.pickled(op.tensor(op.storage("7", numel=20), offset=4)))

    assert isinstance(record, TensorRecord)
    assert (record.storage.key, record.storage.numel, record.storage.dtype) == ("7", 20, "float32")
    assert (record.dtype, record.offset, record.shape, record.stride) == (
        "float32",
        4,
        (2, 3),
        (3, 1),
    )


def test_a_parameter_is_the_tensor_it_wraps():
    parameter = op.call(
        "torch._utils._rebuild_parameter",
        op.tensor(op.storage()),
        op.boolean(True),
        op.call("collections.OrderedDict"),
    )

    assert read_pickle(op.pickled(parameter)).shape == (2, 3)


PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"


def parameter_dict(**state):
    return op.new_object(PARAMETER_DICT) + op.named(state) + b"b"


def test_a_parameter_dict_becomes_a_record_of_its_parameters():
    inner = op.dict_of([(op.text("*"), op.integer(7))])

    result = read_pickle(op.pickled(parameter_dict(training=op.boolean(True), _parameters=inner)))

    assert isinstance(result, ParameterDictRecord)
    assert result.parameters == {"*": 7}


@pytest.mark.parametrize("state", [{}, {"_parameters": op.list_of(op.text("*"))}])
def test_a_parameter_dict_without_a_dict_of_parameters_has_none(state):
    result = read_pickle(op.pickled(parameter_dict(**state)))

    assert result.parameters is None


def test_the_parameters_of_a_parameter_dict_are_not_copied_as_often_as_a_pickle_sets_them():
    inner = op.dict_of((op.integer(each % 200), op.NONE) for each in range(50_000))
    once = op.named({"_parameters": inner}) + b"q\x00" + b"b"
    again = (b"h\x00" + b"b") * 200_000

    begun = time.monotonic()
    result = read_pickle(op.pickled(op.new_object(PARAMETER_DICT) + once + again))

    assert len(result.parameters) == 200
    assert time.monotonic() - begun < SECONDS


@pytest.mark.parametrize(
    "value",
    [
        op.tensor(op.storage(kind="torch.QUInt8Storage")),
        op.tensor(op.storage(kind="evil.FloatStorage")),
        op.tensor(op.storage(), metadata=op.named({"conj": op.boolean(True)})),
    ],
    ids=["quantised", "unknown storage", "lazily conjugated"],
)
def test_a_tensor_whose_bits_mean_something_else_is_not_taken_for_a_plain_one(value):
    assert isinstance(read_pickle(op.pickled(value)), Stub)


@pytest.mark.parametrize(
    "value",
    [
        op.call("torch._utils._rebuild_parameter", op.NONE, op.boolean(True), op.NONE),
        op.call(
            "torch._tensor._rebuild_from_type_v2",
            op.global_of("torch._utils._rebuild_wrapper_subclass"),
            op.global_of("torch.Tensor"),
            op.tuple_of(op.storage()),
            op.EMPTY_DICT,
        ),
        op.call("os.path.join", op.text("a")) + op.EMPTY_TUPLE + b"R",
        op.call("os.path.join", op.text("a")) + op.EMPTY_TUPLE + b"\x81",
    ],
    ids=["parameter of nothing", "tensor subclass", "call of a result", "object of a result"],
)
def test_a_call_of_something_unknown_becomes_a_stub(value):
    assert isinstance(read_pickle(op.pickled(value)), Stub)


def test_the_oldest_call_that_rebuilds_a_tensor_is_understood():
    sizes = (op.tuple_of(op.integer(2)), op.tuple_of(op.integer(1)))
    value = op.call("torch._utils._rebuild_tensor", op.storage(), op.integer(1), *sizes)

    record = read_pickle(op.pickled(value))

    assert (record.offset, record.shape, record.stride) == (1, (2,), (1,))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (op.pickled(op.NONE, op.MARK, op.POP), None),
        (op.pickled(op.NONE, op.MARK, op.NONE, b"1"), None),
        (op.pickled(op.MARK, op.text("a"), op.integer(1), b"d"), {"a": 1}),
        (op.pickled(op.MARK, op.text("a"), op.integer(1), b"l"), ["a", 1]),
        (op.pickled(op.integer(1), op.DUP, op.TUPLE2), (1, 1)),
        (op.pickled(b"J\xff\xff\xff\xff"), -1),
    ],
)
def test_opcodes_that_python_seldom_writes_do_what_they_should(data, expected):
    assert read_pickle(data) == expected == pickle.loads(data)  # noqa: S301  written above


# --- What it never does -------------------------------------------------------------------------

ATTACKS = {
    "call": op.call,
    "new object": op.new_object,
    "new object with keywords": op.new_object_with_keywords,
    "old instance": op.old_instance,
    "old object": op.old_object,
    "call of a name from the stack": lambda name, *arguments: (
        op.stack_global_of(name) + op.tuple_of(*arguments) + b"R"
    ),
    "state of an object": lambda name, *arguments: op.build(
        op.new_object("collections.deque"), op.call(name, *arguments)
    ),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_pickle_that_names_os_system_runs_nothing(attack, tmp_path):
    witness = tmp_path / "witness"
    data = op.pickled(attack("os.system", op.text(f"touch '{witness}'")), protocol=4)

    result = read_pickle(data)

    assert isinstance(result, Stub)
    assert not witness.exists()


def test_the_attack_of_these_tests_works_on_an_unpickler_that_runs_what_it_reads(tmp_path):
    witness = tmp_path / "witness"
    data = op.pickled(op.call("os.system", op.text(f"touch '{witness}'")))

    pickle.loads(data)  # noqa: S301  the control of the test above

    assert witness.exists()


def test_a_named_module_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)

    result = read_pickle(op.pickled(op.call("trap_module.anything")))

    assert str(result.name) == "trap_module.anything"
    assert "trap_module" not in sys.modules


# --- Malformed pickles --------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", range(256))
def test_no_opcode_alone_is_a_pickle(opcode):
    with pytest.raises(FormatError):
        read_pickle(bytes([opcode]))


@pytest.mark.parametrize("protocol", [1, 2, 4])
def test_a_pickle_cut_anywhere_is_an_error(protocol):
    value = {"a": [1, 2.5, "text", (None, True), 2**70], "b": collections.OrderedDict(c=b"bytes")}
    data = pickle.dumps(value, protocol=protocol)

    for length in range(len(data)):
        with pytest.raises(FormatError):
            read_pickle(data[:length])


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (op.pickled(b"\x82\x01"), "opcode 0x82"),
        (op.pickled(b"Pid\n"), "opcode 0x50"),
        (b"\x80\x06N.", "protocol 6"),
        (op.pickled(b"h\x05"), "memo slot 5 is empty"),
        (op.pickled(b"t"), "mark"),
        (op.pickled(op.MARK, op.TUPLE1), "the stack has none"),
        (op.pickled(op.NONE, op.MARK, op.TUPLE1), "the stack has none"),
        (op.pickled(op.NONE, op.EMPTY_TUPLE, b"R"), "a NoneType is called"),
        (op.pickled(op.global_of("a.b"), op.NONE, b"R"), "arguments are a NoneType"),
        (op.pickled(op.integer(1), op.integer(2), b"\x93"), "two strings"),
        (op.pickled(op.stack_global_of("a." + "b" * 2000)), "2001 characters"),
        (op.pickled(op.NONE, op.NONE, op.APPEND), "appended to a NoneType"),
        (op.pickled(op.NONE, op.NONE, op.NONE, op.SETITEM), "set in a NoneType"),
        (op.pickled(op.EMPTY_DICT, op.MARK, op.NONE, b"u"), "a key without a value"),
        (op.pickled(op.EMPTY_LIST, op.NONE, b"b"), "set on a list"),
        (op.pickled(op.build(op.tensor(op.storage()), op.NONE)), "set on a TensorRecord"),
        (op.pickled(op.NONE, b"Q"), "not to a storage"),
        (op.pickled(b"X\x01\x00\x00\x00\xff"), "not UTF-8"),
        (op.pickled(b"Ix\n"), "not an integer"),
        (op.pickled(b"cos\nsystem"), "no end"),
    ],
)
def test_a_malformed_pickle_is_an_error_that_says_what_and_where(data, fault):
    with pytest.raises(FormatError, match=rf"({fault}).*\(at byte \d+ of the pickle\)"):
        read_pickle(data)


@pytest.mark.parametrize(
    "value",
    [
        op.tensor(op.storage(), offset=-1),
        op.tensor(op.storage(), offset=2**63),
        op.tensor(op.storage(), shape=(2, -3)),
        op.tensor(op.storage(), stride=(-3, 1)),
        op.tensor(op.storage(), stride=(1,)),
        op.tensor(op.storage(), shape=(1,) * 65, stride=(1,) * 65),
        op.tensor(op.storage(numel=-1)),
        op.tensor(op.storage(key="0" * 1000)),
        op.tensor(op.NONE),
        op.call("torch._utils._rebuild_tensor_v2"),
        op.call("torch._utils._rebuild_tensor_v2", *[op.NONE] * 1000),
        op.call("torch._utils._rebuild_tensor_v2", op.storage(), *[op.boolean(True)] * 5),
        op.call("torch._utils._rebuild_tensor", op.storage(), op.NONE, op.NONE, op.NONE),
        op.call("torch._utils._rebuild_tensor", op.NONE),
        op.call("torch._utils._rebuild_tensor_v3", op.storage(), *[op.NONE] * 6),
    ],
)
def test_a_tensor_that_torch_would_not_write_is_an_error(value):
    with pytest.raises(FormatError):
        read_pickle(op.pickled(value))


@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(data):
    _read_or_refuse(b"\x80\x04" + data)


PIECES = [
    *(bytes([code]) for code in b".NK()]}0125tlduaesRQboh\x81\x85\x86\x87\x88\x8f\x90\x91\x93\x94"),
    op.text("storage"),
    op.integer(3),
    op.global_of("torch.FloatStorage"),
    op.global_of("torch._utils._rebuild_tensor_v2"),
    op.call("collections.OrderedDict"),
    op.tensor(op.storage()),
    op.put(0),
    op.get(0),
]


@given(st.lists(st.sampled_from(PIECES), max_size=60))
def test_random_programs_are_read_or_refused(pieces):
    _read_or_refuse(op.pickled(*pieces))


@given(st.data())
def test_a_pickle_with_changed_bytes_is_read_or_refused(data):
    whole = op.pickled(op.named({"a": op.tensor(op.storage()), "b": op.list_of(op.integer(5))}))
    position = data.draw(st.integers(0, len(whole) - 1))
    changed = data.draw(st.binary(min_size=1, max_size=4))

    _read_or_refuse(whole[:position] + changed + whole[position + len(changed) :])


def _read_or_refuse(data):
    try:
        read_pickle(data)
    except FormatError:
        return


# --- Limits -------------------------------------------------------------------------------------


def test_nine_bytes_cannot_ask_for_a_memo_of_billions():
    bomb = op.pickled(op.NONE, op.put(2**32 - 1))
    assert len(bomb) == 9

    with pytest.raises(FormatError, match="memo slot 4294967295"):
        read_pickle(bomb)


@pytest.mark.parametrize(
    ("limits", "data", "fault"),
    [
        (Limits(max_bytes=100), op.pickled(op.text("x" * 100)), "more than the 100 allowed"),
        (Limits(max_opcodes=9), op.pickled(*[op.NONE] * 9), "more than 9 opcodes"),
        (Limits(max_stack=9), op.pickled(*[op.NONE] * 10), "more than 9 values"),
        (Limits(max_open_marks=9), op.pickled(op.MARK * 10, b"t" * 10), "more than 9 collections"),
        (Limits(max_memo_index=9), op.pickled(op.NONE, op.put(10)), "memo slot 10"),
        (Limits(max_string_bytes=9), op.pickled(op.text("x" * 10)), "10 bytes, more than the 9"),
        (
            Limits(max_tensors=2),
            op.pickled(op.tuple_of(*[op.tensor(op.storage())] * 3)),
            "more than 2 tensors",
        ),
    ],
)
def test_each_limit_is_kept(limits, data, fault):
    read_pickle(data)  # nothing else is wrong with it
    with pytest.raises(FormatError, match=fault):
        read_pickle(data, limits)


def test_collections_nested_too_deep_are_an_error():
    with pytest.raises(FormatError, match="1000 collections"):
        read_pickle(op.pickled(op.MARK * 1001, b"t" * 1001))


@pytest.mark.parametrize(
    "data",
    [
        b"\x8b\xff\xff\xff\x7f" + b"\xff" * 3000,
        op.pickled(b"\x8b" + (2000).to_bytes(4, "little") + b"\xff" * 2000),
        op.pickled(b"I" + b"9" * 5000 + b"\n"),
        op.pickled(b"L" + b"9" * 5000 + b"L\n"),
        op.pickled(b"\x8e" + b"\xff" * 8),
        op.pickled(b"\x8d" + b"\xff" * 8),
    ],
    ids=["long4", "long4 in full", "int", "long", "bytes", "text"],
)
def test_huge_integers_and_strings_are_refused(data):
    with pytest.raises(FormatError):
        read_pickle(data)


@pytest.mark.parametrize("key", [op.EMPTY_LIST, op.EMPTY_DICT])
def test_a_key_that_is_dear_to_hash_is_refused(key):
    with pytest.raises(FormatError, match="key of a dict"):
        read_pickle(op.pickled(op.dict_of([(key, op.NONE)])))


@pytest.mark.parametrize("key", [op.tuple_of(op.text("a")), op.text("x" * 5000)])
def test_a_key_that_nobody_looks_up_is_kept_as_a_stub(key):
    (result,) = read_pickle(op.pickled(op.dict_of([(key, op.NONE)])))

    assert isinstance(result, Stub)


@pytest.mark.parametrize("key", [2**64, -(2**64), 2**8000], ids=["64", "-64", "8000"])
def test_an_integer_of_more_than_64_bits_is_a_key_without_its_text(key):
    (result,) = read_pickle(pickle.dumps({key: None}, protocol=2))

    assert isinstance(result, Stub)


@pytest.mark.parametrize("key", [256, -256, 2**64 - 1, 2**60, -(2**61), 1e300, 1.0, float("nan")])
def test_a_number_that_a_file_could_choose_to_collide_is_keyed_by_its_text(key):
    (result,) = read_pickle(pickle.dumps({key: None}, protocol=2))

    assert isinstance(result, Name)
    assert result == next(iter(read_pickle(pickle.dumps({key: None}, protocol=2))))


def walk(number, filled, mask=2**16 - 1):
    """Count the slots that CPython's dict looks at for a key that hashes to `number`.

    Source: lookdict in Objects/dictobject.c of CPython 3.11.
    """
    slot, perturb, count = number & mask, number, 1
    while slot in filled:
        perturb >>= 5
        slot, count = (slot * 5 + perturb + 1) & mask, count + 1
    return count


def colliding_numbers():
    """Return numbers below a million: 43,000 that fill a table, and one that walks through them."""
    filled = [1]
    while len(filled) < 43_000:
        filled.append((filled[-1] * 5 + 1) % 2**16)
    among = set(filled)
    candidates = (number + 2**16 * turn for number in filled[:50] for turn in range(1, 15))
    return filled, max(candidates, key=lambda number: walk(number, among))


FILLED, WALKER = colliding_numbers()


def test_the_numbers_of_these_tests_collide():
    assert walk(WALKER, set(FILLED)) > 40_000


LONG_TUPLE = op.tuple_of(*[op.NONE] * 200_000) + op.put(0) + op.POP
DEEP_TUPLE = op.EMPTY_TUPLE + op.TUPLE1 * 300_000
LONG_TEXT = op.text("x" * 10_000_000)
BOMBS = {
    "deep tuple": DEEP_TUPLE,
    "deep list": op.EMPTY_LIST * 200_000 + op.APPEND * 199_999,
    "deep dict": op.EMPTY_DICT + (op.NONE + op.EMPTY_DICT) * 100_000 + op.SETITEM * 100_000,
    "doubling tuple": op.EMPTY_TUPLE + (op.DUP + op.TUPLE2) * 500_000,
    "deep tuple as a key": op.EMPTY_DICT + DEEP_TUPLE + op.NONE + op.SETITEM,
    "doubling tuple as a key": (
        op.EMPTY_DICT + op.EMPTY_TUPLE + (op.DUP + op.TUPLE2) * 500_000 + op.NONE + op.SETITEM
    ),
    "long tuple as arguments, often": (
        LONG_TUPLE
        + op.global_of("os.system")
        + op.get(0)
        + b"R"
        + (op.POP + op.global_of("os.system") + op.get(0) + b"R") * 200_000
    ),
    "long text as a key, often": (
        LONG_TEXT
        + op.put(0)
        + LONG_TEXT
        + op.put(1)
        + op.EMPTY_DICT
        + (op.get(0) + op.NONE + op.SETITEM + op.get(1) + op.NONE + op.SETITEM) * 100_000
    ),
    "colliding integers as keys": (
        op.EMPTY_DICT
        + op.MARK
        + b"".join(
            op.integer(index << 40) + op.NONE for index in range(1 << 19, (1 << 19) + 90_000)
        )
        + b"u"
    ),
    "integers as keys that walk through the whole table": (
        op.EMPTY_DICT
        + op.MARK
        + b"".join(op.integer(number) + op.NONE for number in FILLED)
        + b"u"
        + (op.MARK + (op.integer(WALKER) + op.NONE) * 50_000 + b"u") * 4
    ),
    "floats as keys that walk through the whole table": (
        op.EMPTY_DICT
        + op.MARK
        + b"".join(b"G" + struct.pack(">d", number) + op.NONE for number in FILLED)
        + b"u"
        + (op.MARK + (b"G" + struct.pack(">d", WALKER) + op.NONE) * 50_000 + b"u") * 4
    ),
    "slots of the memo that walk through the whole table": (
        op.NONE + b"".join(map(op.put, (*FILLED, WALKER))) + (op.get(WALKER) + op.POP) * 200_000
    ),
    "many empty dicts": op.MARK + op.EMPTY_DICT * 250_000 + b"l",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_pickle_made_to_exhaust_its_reader_is_read_in_seconds(bomb):
    start = time.monotonic()

    result = read_pickle(op.pickled(bomb))
    del result  # taking it apart must not overflow the C stack either

    assert time.monotonic() - start < SECONDS


def test_deep_values_are_taken_apart_on_a_small_stack():
    data = op.pickled(DEEP_TUPLE)
    kinds = []
    previous = threading.stack_size(256 * 1024)
    thread = threading.Thread(target=lambda: kinds.append(type(read_pickle(data))))

    thread.start()
    thread.join()

    threading.stack_size(previous)
    assert kinds == [tuple]


def test_a_pickle_of_stable_diffusion_size_with_optimizer_states_is_within_the_limits():
    number = {str(index): index for index in range(4000)}
    state = {index: {"step": 1, "exp_avg": number, "sq": (1, 2)} for index in range(4000)}
    stream = io.BytesIO()
    pickle.Pickler(stream, protocol=2).dump({"optimizer_states": [state], "state_dict": number})

    result = read_pickle(stream.getvalue())

    assert len(result["optimizer_states"][0]) == 4000


def test_more_names_than_any_framework_has_are_an_error():
    names = [op.global_of(f"a.b{index}") + op.POP for index in range(1001)]

    with pytest.raises(FormatError, match="more than 1000 different globals"):
        read_pickle(op.pickled(*names, op.NONE))
