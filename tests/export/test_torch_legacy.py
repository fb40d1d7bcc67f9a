"""torch's legacy format reads as torch itself reads it; whatever is wrong in it is one sentence."""

import io
import re
import struct
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.errors import CheckpointError
from tests.export import opcodes as op

FLOATS = np.arange(6, dtype="<f4").tobytes()


class ModelCheckpoint:
    """Stands for PyTorch Lightning's callback, by which its checkpoints key a dict."""


def saved(folder, content, **options):
    path = folder / "model.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=False, **options)
    return path


def values(tensor):
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def assert_read_as(state_dict, path):
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "torch-legacy"
        assert list(checkpoint.tensors) == list(state_dict)
        for name, tensor in state_dict.items():
            lazy = checkpoint.tensors[name]
            assert (lazy.shape, lazy.stride) == (tuple(tensor.shape), tensor.stride())
            assert f"torch.{lazy.dtype}" == str(tensor.dtype)
            np.testing.assert_array_equal(lazy.numpy(), values(tensor), strict=True)


# --- What torch writes --------------------------------------------------------------------------


def many_kinds():
    base = torch.arange(24.0).reshape(4, 6)
    empty = torch.empty(0)
    return {
        "whole": base,
        "transposed": base.t(),
        "corner of the same": base[2:, 3:],
        "every other": base[::2, ::3],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": empty,
        "empty of another type": empty.view(torch.int32),
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(5).bfloat16()[1:],
        "int64": torch.arange(3),
        "flags": torch.tensor([True, False, True]),
        "complex": torch.randn(2) * 1j,
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_kind_of_tensor_reads_as_torch_reads_it(tmp_path, protocol):
    path = saved(tmp_path, many_kinds(), pickle_protocol=protocol)
    theirs = torch.load(path, weights_only=protocol == 2)  # torch's safe reader is for protocol 2

    assert_read_as(theirs, path)


def test_a_type_is_read_that_torch_can_write_so_and_not_load(tmp_path):
    state_dict = {"layer.weight": torch.tensor([1, 2, 40_000], dtype=torch.uint16)[1:]}
    path = saved(tmp_path, state_dict)

    assert_read_as(state_dict, path)


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: state,
        lambda state: {"epoch": 1, "state_dict": {"state_dict": state}},
        lambda state: {"epoch": 1, "model": state},
    ],
)
def test_the_state_dict_is_found_wherever_it_is_nested(tmp_path, nest):
    state_dict = {"layer.weight": torch.randn(2), "scale": torch.randn(1)}

    assert_read_as(state_dict, saved(tmp_path, nest(state_dict)))


def test_a_checkpoint_of_a_training_framework_gives_its_state_dict_step_and_names(tmp_path):
    state_dict = {"layer.weight": torch.nn.Parameter(torch.randn(3)), "betas": torch.rand(4)}
    content = {
        "global_step": 470_000,
        "callbacks": {ModelCheckpoint: {"best": np.float64(0.5), "kept": {"a", "b"}}},
        "optimizer_states": [
            {"state": {0: {"step": torch.ones(1).int(), "exp_avg": torch.ones(3)}}}
        ],
        "module": torch.nn.Linear,  # torch keeps its source text in the file
        "state_dict": state_dict,
    }
    path = saved(tmp_path, content)

    assert_read_as(state_dict, path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.global_step == 470_000
        assert "torch.nn.modules.linear.Linear" in checkpoint.unusual_globals


def test_a_file_of_tensors_alone_names_nothing_unusual(tmp_path):
    with open_checkpoint(saved(tmp_path, many_kinds())) as checkpoint:
        assert checkpoint.unusual_globals == ()


def test_a_whole_module_is_called_by_its_class(tmp_path):
    path = saved(tmp_path, torch.nn.Linear(2, 3))

    with pytest.raises(CheckpointError, match=r"an object of type 'torch\.nn\..*Linear'"):
        open_checkpoint(path)


# --- What it does not write ---------------------------------------------------------------------


def legacy(*, pickle=None, keys=("0",), storages=None, **header):
    """Return a file that is sound unless an argument says otherwise."""
    content = op.named({"weight": op.tensor(op.storage())}) if pickle is None else pickle
    listed = keys if isinstance(keys, bytes) else op.list_of(*map(op.text, keys))
    elements = struct.pack("<q", 6) + FLOATS if storages is None else storages
    return op.legacy_header(**header) + op.pickled(content) + op.pickled(listed) + elements


def reference(*rest):
    """Return a reference to a storage as old versions of torch wrote it, with a sixth part."""
    kind = op.global_of("torch.FloatStorage")
    head = (op.text("storage"), kind, op.text("0"), op.text("cpu"), op.integer(6))
    return op.tuple_of(*head, *rest) + b"Q"


def two(first, second):
    return op.named({"weight": op.tensor(first), "other": op.tensor(second)})


TOO_LONG = op.text("x" * 1024) * 9000
BAD_FILES = {
    "version": (legacy(version=1002), "not of version 1001"),
    "big-endian": (
        legacy(system=op.named({"little_endian": op.boolean(False)})),
        "does not say that a little-endian machine",
    ),
    "no byte order": (legacy(system=op.EMPTY_DICT), "does not say that a little-endian machine"),
    "no description": (legacy(system=op.EMPTY_LIST), "does not say that a little-endian machine"),
    "a long header": (
        legacy(system=op.text("x" * 5000)),
        "description .* than the 4096 bytes allowed",
    ),
    "a slow header": (legacy(system=op.NONE * 300), "description .*: more than 200 opcodes"),
    "os.system": (legacy(pickle=op.call("os.system", op.text("x"))), r"pickle: names os\.system"),
    "os.system in the list": (
        legacy(keys=op.call("os.system", op.text("x"))),
        r"list of storages: names os\.system",
    ),
    "a reference of old": (
        legacy(pickle=op.named({"a": op.tensor(reference(op.tuple_of(op.text("1"))))})),
        "view of another one",
    ),
    "no list": (legacy(keys=op.NONE), "list of storages is a NoneType"),
    "a list of numbers": (legacy(keys=op.list_of(op.integer(0))), "one that no tensor refers to"),
    "a list of lists": (legacy(keys=op.list_of(op.EMPTY_LIST)), "one that no tensor refers to"),
    "a key twice": (legacy(keys=("0", "0")), "has one twice"),
    "an unknown key": (legacy(keys=("0", "1")), "one that no tensor refers to"),
    "a slow list": (legacy(keys=op.list_of(*[op.NONE] * 200_000)), "more than 200000 opcodes"),
    "a long list": (legacy(keys=op.list_of(TOO_LONG)), "than the 8388608 bytes allowed"),
    "storage missing": (legacy(keys=(), storages=b""), "'weight': the file has no storage '0'"),
    "storage longer": (legacy(storages=struct.pack("<q", 7) + FLOATS), "6 elements and has 7"),
    "storage shorter": (legacy(storages=struct.pack("<q", 5) + FLOATS), "6 elements and has 5"),
    "length below 0": (legacy(storages=struct.pack("<q", -1) + FLOATS), "6 elements and has -1"),
    "storage cut": (
        legacy()[:-1],
        r"ends at byte \d+, and its storage '0' at byte \d+: it is incomplete",
    ),
    "length cut": (legacy(storages=b"\6"), "and its storage '0' at byte"),
    "more behind it": (legacy() + b"x", "and its last storage at byte"),
    "two files": (legacy() * 2, "and its last storage at byte"),
    "of petabytes": (
        legacy(pickle=op.named({"weight": op.tensor(op.storage(numel=2**60))})),
        "and its storage '0' at byte",
    ),
    "quantised": (
        legacy(pickle=op.named({"a": op.tensor(op.storage(kind="torch.QUInt8Storage"))})),
        "as of quantised tensors",
    ),
    "of two types": (
        legacy(pickle=two(op.storage(), op.storage(kind="torch.IntStorage"))),
        "'other': storage '0' has 6 elements of int32 here and 6 of float32 elsewhere",
    ),
    "of two lengths": (
        legacy(pickle=two(op.storage(), op.storage(numel=5))),
        "'other': storage '0' has 5 elements of float32 here and 6",
    ),
    "tensor outside": (
        legacy(pickle=op.named({"a": op.tensor(op.storage(), offset=1)})),
        "4 bytes beyond its storage",
    ),
    "no tensors": (
        legacy(pickle=op.named({"epoch": op.integer(1)}), keys=(), storages=b""),
        "no tensors.*epoch",
    ),
}


@pytest.mark.parametrize(("content", "fault"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_error_that_names_file_and_fault(tmp_path, content, fault):
    path = tmp_path / "bad_model.ckpt"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=rf"(?s)bad_model\.ckpt: .*{fault}") as caught:
        open_checkpoint(path)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("storage", [op.storage(), reference(op.NONE)])
def test_the_file_of_these_tests_is_bad_only_where_it_is_meant_to_be(tmp_path, storage):
    path = tmp_path / "model.ckpt"
    path.write_bytes(legacy(pickle=op.named({"weight": op.tensor(storage)})))

    assert_read_as({"weight": torch.arange(6.0).reshape(2, 3)}, path)


def test_a_file_that_ends_inside_its_pickle_is_called_incomplete_and_not_harmful(tmp_path):
    path = saved(tmp_path, {"layer.weight": torch.randn(2)})
    content = path.read_bytes()
    ends = [content.index(each) + 3 for each in (b"layer", b"torch._utils", b"FloatStorage")]

    for end in ends:
        path.write_bytes(content[:end])
        with pytest.raises(CheckpointError, match=r"ends inside its pickle: .* download it again"):
            open_checkpoint(path)


def test_the_tar_of_the_oldest_torch_is_called_by_its_name(tmp_path):
    path = tmp_path / "model.ckpt"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())

    with pytest.raises(CheckpointError, match=r"a tar archive, which torch before 0\.1\.10 wrote"):
        open_checkpoint(path)


@pytest.fixture(scope="module")
def good_content(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    kinds = ("whole", "corner of the same", "half", "int64", "parameter")
    state_dict = {f"layer.{name}": many_kinds()[name] for name in kinds}
    return saved(folder, {"global_step": 3, "state_dict": state_dict}).read_bytes()


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_a_changed_file_is_refused_or_reads_as_torch_reads_it(tmp_path, good_content, data):
    content = bytearray(good_content)
    for _ in range(data.draw(st.integers(1, 2))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "changed.ckpt"
    path.write_bytes(content)

    try:
        theirs = torch.load(path, weights_only=True)["state_dict"]
    except Exception:  # noqa: BLE001  torch has an error of its own for every fault
        theirs = {}
    try:
        ours = open_checkpoint(path)
    except CheckpointError as error:
        message = str(error)
    else:
        message = "changed.ckpt: read"
        with ours:
            for name, tensor in theirs.items():
                np.testing.assert_array_equal(ours.tensors[name].numpy(), values(tensor))
    assert re.search(r"changed\.ckpt: [^\n]+$", message)
