"""Checkpoints open as named lazy tensors, equal to torch's; everything else is one clear error."""

import ast
import collections
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ldm_export
import ldm_runtime
from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.checkpoint.usual_globals import _USUAL
from ldm_export.errors import CheckpointError
from ldm_runtime.errors import LdmError
from tests.export import opcodes as op
from tests.export.archives import FULL, Entry, local_header, write_archive

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


class ModelCheckpoint:
    """Stands for PyTorch Lightning's callback, by which its checkpoints key a dict."""


def saved(folder, content, **options):
    path = folder / "model.ckpt"
    torch.save(content, path, **options)
    return path


def save_legacy(content, path, **options):
    torch.save(content, path, _use_new_zipfile_serialization=False, **options)


def values(tensor):
    has_numpy = tensor.dtype not in {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
    return (tensor if has_numpy else tensor.float()).detach().numpy()


def assert_same_tensors(checkpoint, state_dict):
    assert list(checkpoint.tensors) == list(state_dict)
    for name, tensor in state_dict.items():
        lazy = checkpoint.tensors[name]
        assert lazy.name == name
        assert lazy.shape == tuple(tensor.shape)
        assert f"torch.{lazy.dtype}" == str(tensor.dtype)
        np.testing.assert_array_equal(lazy.numpy(), values(tensor), strict=True)


# --- torch archives -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
@pytest.mark.parametrize("save", [torch.save, save_legacy, safetensors.torch.save_file])
def test_every_type_and_shape_reads_as_torch_wrote_it(tmp_path, save, name, shape):
    state_dict = {"weight": torch.randn(shape).mul(100).to(DTYPES[name])}
    save(state_dict, tmp_path / "model")

    with open_checkpoint(tmp_path / "model") as checkpoint:
        assert_same_tensors(checkpoint, state_dict)
        assert checkpoint.tensors["weight"].nbytes == state_dict["weight"].nbytes


def test_views_of_shared_storages_keep_their_offsets_and_strides(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    state_dict = {
        "whole": base,
        "transposed": base.t(),
        "column": base[:, 2],
        "corner": base[2:, 3:],
        "every other": base[::2, ::3],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "last element": base[-1, -1],
        "empty end": base[4:],
        "bfloat16 view": base.bfloat16().t()[1:, ::2],
    }

    with open_checkpoint(saved(tmp_path, state_dict)) as checkpoint:
        assert_same_tensors(checkpoint, state_dict)
        assert checkpoint.tensors["transposed"].stride == (1, 6)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_parameters_buffers_and_modules_read_at_every_pickle_protocol(tmp_path, protocol):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    annotated = torch.nn.Parameter(torch.randn(3))
    annotated.note = "kept by torch as the parameter's state"
    state_dict = collections.OrderedDict(
        module.state_dict(), bare=torch.nn.Parameter(torch.randn(2)), annotated=annotated
    )
    path = saved(tmp_path, {"state_dict": state_dict}, pickle_protocol=protocol)

    with open_checkpoint(path) as checkpoint:
        assert_same_tensors(checkpoint, state_dict)


def lightning_content(state_dict):
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "global_step": 470_000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {ModelCheckpoint: {"best": np.float64(0.5), "kept": {"a", "b"}}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [np.arange(3.0), np.dtype("float32"), ModelCheckpoint()],
        "state_dict": state_dict,
    }


def test_a_checkpoint_of_a_training_framework_gives_its_state_dict_and_step(tmp_path):
    state_dict = {"model.weight": torch.randn(2, 3), "betas": torch.rand(4)}

    with open_checkpoint(saved(tmp_path, lightning_content(state_dict))) as checkpoint:
        assert_same_tensors(checkpoint, state_dict)
        assert checkpoint.global_step == checkpoint.stated.global_step == 470_000
        assert checkpoint.format == "torch"
        assert dict(checkpoint.metadata) == {}


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"epoch": 1, "state_dict": {"state_dict": {"state_dict": state}}},
        lambda state: {"model": state, "epoch": 1},
        lambda state: {"model": {"state_dict": state}},
    ],
)
def test_the_state_dict_is_found_wherever_it_is_nested(tmp_path, nest):
    state_dict = {"weight": torch.randn(2)}

    with open_checkpoint(saved(tmp_path, nest(state_dict))) as checkpoint:
        assert_same_tensors(checkpoint, state_dict)


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: state | {"state_dict": {}},
        lambda state: state | {"state_dict": {"old.weight": torch.zeros(3)}},
        lambda state: {"state_dict": state | {"state_dict": {"old.weight": torch.zeros(3)}}},
        lambda state: {"loss": torch.tensor(0.5), "state_dict": state},
        lambda state: {"state_dict": {}, "model": state, "step": 3},
    ],
)
def test_of_state_dicts_inside_each_other_the_outermost_with_parameters_counts(tmp_path, nest):
    state_dict = {"layer.weight": torch.randn(2), "scale": torch.randn(1)}

    with open_checkpoint(saved(tmp_path, nest(state_dict))) as checkpoint:
        assert_same_tensors(checkpoint, state_dict)


class Wrapped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 3)
        self.module = torch.nn.Linear(1, 1)


class Compiled(torch.nn.Module):
    """Names its module as torch.compile does, which takes seconds to import."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.DataParallel,
        lambda module: torch.nn.DataParallel(Compiled(module)),
    ],
)
def test_names_are_those_of_the_model_that_was_wrapped_whole(tmp_path, wrap):
    model = Wrapped()
    wrapped = wrap(model).state_dict()
    assert wrapped.keys() != model.state_dict().keys()

    with open_checkpoint(saved(tmp_path, {"state_dict": wrapped})) as checkpoint:
        assert_same_tensors(checkpoint, model.state_dict())


def test_a_beginning_that_only_some_names_have_is_not_a_wrapper(tmp_path):
    state_dict = {"module.weight": torch.randn(2), "scale": torch.randn(1)}

    with open_checkpoint(saved(tmp_path, state_dict)) as checkpoint:
        assert_same_tensors(checkpoint, state_dict)


def test_buffers_and_unsigned_types_of_newer_torch_are_read(tmp_path):
    state_dict = {
        "buffer": torch.nn.Buffer(torch.randn(3)),
        "uint16": torch.tensor([1, 2, 40_000], dtype=torch.uint16)[1:],
    }

    with open_checkpoint(saved(tmp_path, state_dict)) as checkpoint:
        assert_same_tensors(checkpoint, state_dict)


def test_what_is_no_tensor_is_listed_as_skipped(tmp_path):
    content = {"weight": torch.ones(1), "scale": 0.5, "nested": {"inner": torch.ones(1)}, 7: None}

    with open_checkpoint(saved(tmp_path, content)) as checkpoint:
        assert list(checkpoint.tensors) == ["weight"]
        assert checkpoint.skipped == ("scale", "nested", "<int>")


@pytest.mark.parametrize("step", [None, True, -1, 2**64, "7", 1.5])
def test_a_step_that_is_no_count_is_ignored(tmp_path, step):
    content = {"state_dict": {"weight": torch.ones(1)}, "global_step": step}

    with open_checkpoint(saved(tmp_path, content)) as checkpoint:
        assert checkpoint.global_step is None


# --- safetensors --------------------------------------------------------------------------------


def test_a_safetensors_file_gives_its_metadata(tmp_path):
    state_dict = {"a": torch.randn(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    path = tmp_path / "model.ckpt"  # the name does not matter
    safetensors.torch.save_file(state_dict, path, metadata={"made by": "test"})

    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "safetensors"
        assert dict(checkpoint.metadata) == {"made by": "test"}
        assert checkpoint.skipped == ()
        assert {name: checkpoint.tensors[name].shape for name in ("a", "b")} == {
            "a": (2, 3),
            "b": (3,),
        }


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_byte_of_a_type_of_8_bits_has_the_value_that_torch_gives_it(tmp_path, dtype):
    state_dict = {"weight": torch.arange(256, dtype=torch.uint8).view(dtype)}
    safetensors.torch.save_file(state_dict, tmp_path / "model")

    with open_checkpoint(tmp_path / "model") as checkpoint:
        assert checkpoint.tensors["weight"].nbytes == 256
        assert_same_tensors(checkpoint, state_dict)


# --- Mapping and closing ------------------------------------------------------------------------


def test_arrays_are_read_only_views_that_outlive_the_checkpoint(tmp_path):
    with open_checkpoint(saved(tmp_path, {"weight": torch.arange(1000.0)})) as checkpoint:
        array = checkpoint.tensors["weight"].numpy()

    assert not array.flags.writeable
    assert not array.flags.owndata
    np.testing.assert_array_equal(array, np.arange(1000, dtype=np.float32))


def test_reading_a_closed_checkpoint_is_an_error(tmp_path):
    checkpoint = open_checkpoint(saved(tmp_path, {"weight": torch.ones(1)}))
    checkpoint.close()

    with pytest.raises(ValueError, match="closed"):
        checkpoint.tensors["weight"].numpy()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_closed_checkpoint_is_no_longer_mapped(tmp_path):
    path = saved(tmp_path, {"weight": torch.ones(1)})
    maps = Path("/proc/self/maps")
    checkpoint = open_checkpoint(path)
    assert str(path) in maps.read_text()

    checkpoint.close()

    assert str(path) not in maps.read_text()


def write_sparse_safetensors(path, num_tensors, tensor_bytes):
    header = {
        f"model.diffusion_model.input_blocks.{index}.weight": {
            "dtype": "F32",
            "shape": [tensor_bytes // 4],
            "data_offsets": [index * tensor_bytes, (index + 1) * tensor_bytes],
        }
        for index in range(num_tensors)
    }
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + num_tensors * tensor_bytes)


def write_sparse_archive(path, num_tensors, tensor_bytes):
    records = {
        f"model.diffusion_model.input_blocks.{index}.weight": op.tensor(
            op.storage(str(index), numel=tensor_bytes // 4), shape=(tensor_bytes // 4,), stride=(1,)
        )
        for index in range(num_tensors)
    }
    holes = [Entry(name=f"a/data/{index}", hole=tensor_bytes) for index in range(num_tensors)]
    pickled = Entry(name="a/data.pkl", data=op.pickled(op.named({"state_dict": op.named(records)})))
    write_archive(path, [pickled, *holes], zip64=True)


def write_sparse_legacy(path, num_tensors, tensor_bytes):
    keys = [f"{index:04d}" for index in range(num_tensors)]
    records = {
        f"model.diffusion_model.input_blocks.{key}.weight": op.tensor(
            op.storage(key, numel=tensor_bytes // 4), shape=(tensor_bytes // 4,), stride=(1,)
        )
        for key in keys
    }
    with path.open("wb") as file:
        file.write(op.legacy_header() + op.pickled(op.named({"state_dict": op.named(records)})))
        file.write(op.pickled(op.list_of(*map(op.text, keys))))
        for _ in keys:
            file.write(struct.pack("<q", tensor_bytes // 4))
            file.seek(tensor_bytes, 1)
        file.truncate()


MEASURE = """
import re, sys
from pathlib import Path
from ldm_export.checkpoint.checkpoint import open_checkpoint

with open_checkpoint(Path(sys.argv[1])) as checkpoint:
    last = list(checkpoint.tensors.values())[-1].numpy()
    print(len(checkpoint.tensors), last.shape[0], last[-1])
    # Not ru_maxrss: that starts at the resident memory of the process that started this one.
    print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "write", [write_sparse_safetensors, write_sparse_archive, write_sparse_legacy]
)
def test_opening_five_gigabytes_takes_less_than_300_megabytes_of_memory(tmp_path, write):
    path = tmp_path / "large"
    write(path, 2000, 2_700_000)
    root = Path(*ldm_export.__path__).parent

    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    ).stdout.split()

    assert path.stat().st_size > 5e9
    assert output[:3] == ["2000", "675000", "0.0"]
    assert int(output[3]) < 300


# --- Bad files ----------------------------------------------------------------------------------

FLOATS = np.arange(6, dtype=np.float32).tobytes()
GOOD = op.pickled(op.named({"weight": op.tensor(op.storage())}))


def archive(path, pickle=GOOD, *, storage=FLOATS, others=(), **options):
    entries = [Entry(name="a/data.pkl", data=pickle), Entry(name="a/data/0", data=storage)]
    return write_archive(path, [*entries, *others], **options)


def archive_of(*entries, **options):
    return lambda path: write_archive(path, entries, **options)


def with_tensor(**options):
    storage = op.storage(**{key: options.pop(key) for key in ("key", "kind") if key in options})
    content = op.pickled(op.named({"weight": op.tensor(storage, **options)}))
    return lambda path: archive(path, content)


def with_pickle(*values):
    return lambda path: archive(path, op.pickled(*values))


def with_bytes(content):
    return lambda path: path.write_bytes(content)


def safetensors_file(header, buffer=FLOATS, size=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + buffer


def with_header(header, buffer=FLOATS, size=None):
    return with_bytes(safetensors_file(header, buffer, size))


def entry(dtype="F32", shape=(6,), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def cut(count):
    def write(path):
        archive(path)
        os.truncate(path, path.stat().st_size - count)

    return write


def compressed(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", GOOD)
        file.writestr("a/data/0", FLOATS)


PICKLE, STORAGE = Entry(name="a/data.pkl", data=GOOD), Entry(name="a/data/0", data=FLOATS)
BAD_FILES = {
    # not a checkpoint at all
    "missing": (lambda path: None, "No such file"),
    "folder": (lambda path: path.mkdir(), "not a file"),
    "pipe": (os.mkfifo, "not a file"),
    "empty": (with_bytes(b""), "is empty"),
    "one byte": (with_bytes(b"P"), "neither a torch nor a"),
    "text": (with_bytes(b"hello, this is not a model"), "neither a torch nor a"),
    "web page": (with_bytes(b"<!DOCTYPE html><html>"), "web page"),
    "git-lfs pointer": (with_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "lfs pull"),
    "gguf": (with_bytes(b"GGUF\3\0\0\0"), "a GGUF file"),
    "diffusers folder": (
        lambda path: (path.mkdir(), (path / "model_index.json").write_text("{}")),
        "a folder of diffusers",
    ),
    "bundle": (
        lambda path: (path.mkdir(), (path / "manifest.json").write_text("{}")),
        "a bundle already",
    ),
    "bare pickle": (with_bytes(GOOD), "bare pickle"),
    # archives
    "only a zip signature": (with_bytes(b"PK\3\4"), "cut off or missing"),
    "truncated by a byte": (cut(1), "no end record"),
    "truncated by half": (cut(150), "damaged or incomplete"),
    "something appended": (
        lambda path: archive(path).write_bytes(path.read_bytes() + b"x"),
        "no end record",
    ),
    "compressed": (compressed, "compressed.*zip -0"),
    "sizes of a compressed member": (
        archive_of(PICKLE, Entry(name="a/data/0", data=FLOATS, compressed_size=23)),
        "compressed",
    ),
    "encrypted": (archive_of(PICKLE, Entry(name="a/data/0", flags=0x801)), "encrypted"),
    "no pickle": (archive_of(STORAGE), "0 members named"),
    "two pickles": (
        archive_of(PICKLE, STORAGE, Entry(name="b/data.pkl", data=GOOD)),
        "2 members named",
    ),
    "a name twice": (archive_of(PICKLE, STORAGE, STORAGE), "two members named"),
    "name not UTF-8": (
        lambda path: archive(path).write_bytes(path.read_bytes().replace(b"a/data/0", b"\xff" * 8)),
        "not UTF-8",
    ),
    "local header of another member": (
        archive_of(PICKLE, Entry(name="a/data/0", data=FLOATS, local_name="a/data/1")),
        "contradicts its directory",
    ),
    "local header of another size": (
        archive_of(PICKLE, Entry(name="a/data/0", data=FLOATS, local_size=12)),
        "contradicts its directory",
    ),
    "member beyond the file": (
        archive_of(PICKLE, Entry(name="a/data/0", size=10**6, local_size=0)),
        "contradicts its directory",
    ),
    "member into the directory": (
        archive_of(PICKLE, Entry(name="a/data/0", data=FLOATS, size=25, local_size=0)),
        "over each other",
    ),
    "local header beyond the file": (
        archive_of(PICKLE, Entry(name="a/data/0", header=10**6)),
        "cut off or missing",
    ),
    "a member inside another": (
        archive_of(
            Entry(name="a/extra", data=local_header(STORAGE) + FLOATS),
            PICKLE,
            replace(STORAGE, header=30 + len("a/extra")),
        ),
        "over each other",
    ),
    "fewer entries than promised": (
        lambda path: archive(path, end={2: 3, 3: 3}),
        "directory entry is cut off",
    ),
    "more entries than promised": (
        lambda path: archive(path, end={2: 1, 3: 1}),
        "does not fill its place",
    ),
    "far too many entries": (
        lambda path: archive(path, zip64=True, end64={5: 10**9, 6: 10**9}),
        "too many",
    ),
    "two disks": (lambda path: archive(path, end={2: 1}), "contradicts the file"),
    "comment": (lambda path: archive(path, end={6: 5}), "contradicts the file"),
    "directory elsewhere": (lambda path: archive(path, end={5: 7}), "contradicts the file"),
    "two directories": (lambda path: archive(path, zip64=True, end={3: 7}), "disagree"),
    "zip64 field missing": (
        archive_of(PICKLE, Entry(name="a/data/0", size=FULL, local_size=0)),
        "zip64 field is missing",
    ),
    "big-endian": (
        lambda path: archive(path, others=[Entry(name="a/byteorder", data=b"big")]),
        "little-endian",
    ),
    # pickles
    "os.system": (with_pickle(op.call("os.system", op.text("exit 1"))), r"names os\.system"),
    "whole module": (with_pickle(op.new_object("torch.nn.Linear")), "'torch.nn.Linear'"),
    "memory bomb of 9 bytes": (with_pickle(op.NONE, op.put(2**32 - 1)), "memo slot 4294967295"),
    "pickle cut off": (lambda path: archive(path, GOOD[:-1]), "an opcode wants"),
    "pickle too large": (
        archive_of(Entry(name="a/data.pkl", hole=1 << 30), STORAGE),
        "more than the 33554432 allowed",
    ),
    "nested too deep": (with_pickle(op.MARK * 2000), "more than 1000 collections"),
    "state_dict in state_dict for ever": (
        with_pickle(op.EMPTY_DICT, op.put(0), op.text("state_dict"), op.get(0), op.SETITEM),
        "nested more than 8 deep",
    ),
    "a list": (with_pickle(op.list_of(op.tensor(op.storage()))), "type 'list'"),
    "no tensors": (with_pickle(op.named({"epoch": op.integer(1)})), "no tensors.*epoch"),
    "nothing": (with_pickle(op.EMPTY_DICT), "no tensors.*none"),
    # tensors of archives
    "storage missing": (with_tensor(key="1"), "no storage '1'"),
    "storage outside the folder": (with_tensor(key="../data.pkl"), "no storage"),
    "storage too short": (
        lambda path: archive(path, storage=FLOATS[:-1]),
        "should have 24 bytes and has 23",
    ),
    "offset outside the storage": (with_tensor(offset=1), "4 bytes beyond"),
    "offset far outside": (with_tensor(offset=2**63 - 1), "beyond its storage"),
    "shape outside the storage": (with_tensor(shape=(3, 3)), "beyond its storage"),
    "stride outside the storage": (with_tensor(stride=(4, 1)), "beyond its storage"),
    "stride that overflows": (with_tensor(stride=(2**63 - 1, 1)), "beyond its storage"),
    "a shape of petabytes over one element": (
        with_tensor(shape=(2**50,), stride=(0,)),
        "more than the whole file",
    ),
    "an empty shape of petabytes": (
        with_tensor(shape=(2**62, 0, 2**62), stride=(0, 0, 0)),
        "more than the whole file",
    ),
    "name of control characters": (
        with_pickle(op.named({"\x1b[2J": op.tensor(op.storage())})),
        r"control characters: '\\x1b",
    ),
    "name of half a character": (
        with_pickle(op.named({"\ud800": op.tensor(op.storage())})),
        "control characters",
    ),
    "name that is no text": (
        with_pickle(op.dict_of([(op.integer(1), op.tensor(op.storage()))])),
        "named by a int",
    ),
    "name of a kilobyte": (
        with_pickle(op.named({"x" * 1000: op.tensor(op.storage())})),
        "1000 characters",
    ),
    # safetensors
    "header beyond the file": (with_header({"a": entry()}, size=10**6), "1000000 bytes of"),
    "header of exabytes": (with_header({"a": entry()}, size=2**63), "more than the 16777216"),
    "header cut": (with_header({"a": entry()}, size=20), "not the JSON"),
    "header not UTF-8": (with_header(b'{"\xff": 1}'), "not the JSON"),
    "header cut to nothing": (with_header({"a": entry()}, size=0), "not the JSON"),
    "header of NaN": (with_header(b'{"a": NaN}'), "NaN is not valid JSON"),
    "header nested too deep": (with_header(b'{"a":' + b"[" * 500_000), "not the JSON"),
    "header of huge numbers": (with_header(b'{"a": ' + b"9" * 10_000 + b"}"), "not the JSON"),
    "header without tensors": (with_header({}), "no tensors"),
    "key twice": (
        with_header(json.dumps({"a": entry()}).replace("{", '{"a": 1, ', 1).encode()),
        "twice",
    ),
    "entry no object": (with_header({"a": [1]}), "lacks dtype"),
    "entry without shape": (with_header({"a": {"dtype": "F32"}}), "tensor 'a'.*lacks dtype"),
    "entry with more": (with_header({"a": entry() | {"x": 1}}), "more than dtype"),
    "unknown type": (with_header({"a": entry("F31")}), "'F31' is none of"),
    "shape of a float": (with_header({"a": entry(shape=(6.0,))}), "not sizes"),
    "shape of a bool": (with_header({"a": entry(shape=(True, 6))}), "not sizes"),
    "negative shape": (with_header({"a": entry(shape=(-2, -3))}), "not sizes"),
    "shape that overflows": (
        with_header({"a": entry(shape=(2**62, 2**62), offsets=(0, 24))}),
        "its shape takes",
    ),
    "empty shape of petabytes": (
        with_header({"a": entry(shape=(2**62, 0, 2**62), offsets=(0, 0))}, b""),
        "more than the whole file",
    ),
    "too many axes": (with_header({"a": entry(shape=(1,) * 65, offsets=(0, 4))}), "not sizes"),
    "size and shape differ": (with_header({"a": entry(shape=(5,))}), "24 bytes.*takes 20"),
    "offsets reversed": (with_header({"a": entry(offsets=(24, 0))}), "-24 bytes"),
    "offsets outside": (with_header({"a": entry(offsets=(8, 32))}), "ends 8 bytes early"),
    "tensors over each other": (
        with_header({"a": entry(), "b": entry(shape=(1,), offsets=(20, 24))}),
        "'b' overlaps",
    ),
    "gap at the start": (
        with_header({"a": entry(shape=(5,), offsets=(4, 24))}),
        "'a' follows a gap",
    ),
    "hole at the end": (with_header({"a": entry(shape=(5,), offsets=(0, 20))}), "end at byte"),
    "safetensors cut off": (with_header({"a": entry()}, FLOATS[:-1]), "ends 1 byte early"),
    "safetensors name of control characters": (
        with_header({"\x1b[2J": entry()}),
        r"control characters: '\\x1b",
    ),
    "metadata no object": (with_header({"__metadata__": 1, "a": entry()}), "not a JSON object"),
    "metadata no text": (
        with_header({"__metadata__": {"x": 1}, "a": entry()}),
        "other than strings",
    ),
    "metadata of half a character": (
        with_header({"__metadata__": {"x": "\ud800"}, "a": entry()}),
        "half a character",
    ),
}


@pytest.mark.parametrize(("write", "fault"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_error_that_names_file_and_fault(tmp_path, write, fault):
    path = tmp_path / "bad_model.ckpt"
    write(path)

    with pytest.raises(CheckpointError, match=rf"(?s)bad_model\.ckpt: .*{fault}") as caught:
        open_checkpoint(path)

    assert caught.value.path == path
    assert isinstance(caught.value, LdmError)
    assert "\n" not in str(caught.value)


def test_the_files_of_these_tests_are_bad_only_where_they_are_meant_to_be(tmp_path):
    for name, write in {
        "archive": archive,
        "zip64": lambda path: archive(path, zip64=True),
        "zip64 after another field": archive_of(
            PICKLE,
            Entry(
                name="a/data/0",
                data=FLOATS,
                size=FULL,
                extra=struct.pack("<2H3s2H2Q", 0x5455, 3, b"xyz", 1, 16, 24, 24),
            ),
        ),
        "tensor": with_tensor(),
        "safetensors": with_header({"a": entry()}),
    }.items():
        write(tmp_path / name)

        with open_checkpoint(tmp_path / name) as checkpoint:
            (tensor,) = checkpoint.tensors.values()
            np.testing.assert_array_equal(tensor.numpy().ravel(), np.arange(6, dtype=np.float32))


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    path = tmp_path / "secret.ckpt"
    archive(path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")

    with pytest.raises(CheckpointError, match=r"secret\.ckpt: cannot be opened"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "remote"),
    [
        ("runwayml/stable-diffusion-v1-5", True),
        ("https://host.example/model.ckpt", True),
        ("models/absent.ckpt", False),
        ("absent", False),
    ],
)
def test_a_name_on_a_hub_is_not_fetched(name, remote):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(Path(name))

    assert str(caught.value).count("No such file or directory") == 1
    assert ("nothing is fetched, so download the file first" in str(caught.value)) is remote


HOSTILE = ["os.system", "posix.system", "subprocess.Popen", "builtins.eval", "os.path.join"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_checkpoint_that_names_what_runs_programs_is_refused_and_runs_nothing(tmp_path, name):
    witness = tmp_path / "witness"
    attack = op.call(name, op.text(f"touch '{witness}'"))
    content = op.named(
        {"callbacks": attack, "state_dict": op.named({"a": op.tensor(op.storage())})}
    )
    path = archive(tmp_path / "model.ckpt", op.pickled(content))

    with pytest.raises(CheckpointError, match=rf"model\.ckpt: .*names {re.escape(name)}, which"):
        open_checkpoint(path)

    assert os.listdir(tmp_path) == ["model.ckpt"]


def good_files(folder):
    state_dict = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(lightning_content(state_dict), folder / "torch")
    save_legacy(lightning_content(state_dict), folder / "legacy")
    safetensors.torch.save_file(state_dict, folder / "safetensors", metadata={"x": "y"})
    write_archive(
        folder / "zip64",
        [Entry(name="a/data.pkl", data=GOOD), Entry(name="a/data/0", data=FLOATS)],
        zip64=True,
    )
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def good_contents(tmp_path_factory):
    return good_files(tmp_path_factory.mktemp("good"))


FUZZ = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(st.sampled_from([b"", b"PK\3\4", b"\x20\0\0\0\0\0\0\0{"]), st.binary(max_size=300))
def test_random_bytes_only_ever_raise_the_checkpoint_error(tmp_path, head, rest):
    _open_or_refuse(tmp_path / "fuzz", head + rest)


@FUZZ
@given(st.data())
def test_changed_files_only_ever_raise_the_checkpoint_error(tmp_path, good_contents, data):
    content = bytearray(data.draw(st.sampled_from(good_contents)))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        changed = data.draw(st.binary(max_size=9))
        kept = data.draw(st.sampled_from([0, 1, len(changed)]))
        content[position : position + kept] = changed

    _open_or_refuse(tmp_path / "fuzz", bytes(content))


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_a_file_cut_anywhere_is_refused(tmp_path, good_contents, which):
    content = good_contents[which]

    for length in range(0, len(content), 1 + len(content) // 200):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="cut: "):
            open_checkpoint(tmp_path / "cut")


def _open_or_refuse(path, content):
    path.write_bytes(content)
    try:
        with open_checkpoint(path) as checkpoint:
            for tensor in checkpoint.tensors.values():
                np.isnan(tensor.numpy()).sum()
    except CheckpointError as error:
        message = str(error)
    else:
        message = path.name
    assert path.name in message


# --- The promise of the packages ----------------------------------------------------------------

UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
UNSAFE_CALLS = {"load", "loads", "hub", "load_file"}


def sources():
    for package in (ldm_export, ldm_runtime):
        for folder in package.__path__:
            yield from sorted(Path(folder).rglob("*.py"))


def unsafe_lines(source):
    """Yield what could unpickle: imports of unpicklers, and any `torch.load` or its kin."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found = {name.name.partition(".")[0] for name in names} & UNSAFE_MODULES
            case ast.ImportFrom(module=str(module), names=names):
                found = {module.partition(".")[0]} & UNSAFE_MODULES
                if module.partition(".")[0] == "torch":
                    found |= {name.name for name in names} & UNSAFE_CALLS
            case ast.Attribute(value=ast.Name(id="torch"), attr=attribute):
                found = {attribute} & UNSAFE_CALLS
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=False)):
                continue
            case ast.keyword(arg="allow_pickle"):
                found = {"allow_pickle"}
            case _:
                continue
        yield from (f"line {node.lineno}: {name}" for name in sorted(found))


@pytest.mark.parametrize(
    "path", list(sources()), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_no_source_file_can_unpickle(path):
    assert list(unsafe_lines(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, _pickle as p",
        "from pickle import loads",
        "import torch\ntorch.load(path, weights_only=True)",
        "from torch import load",
        "read = torch.load",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
    ],
)
def test_the_search_for_unpickling_finds_it(source):
    assert list(unsafe_lines(source)) != []


def test_names_that_differ_in_case_alone_are_refused_as_torch_takes_the_first_of_them(tmp_path):
    entries = [
        Entry(name="archive/DATA.PKL", data=op.pickled(op.text("upper case"))),
        Entry(name="archive/data.pkl", data=op.pickled(op.text("lower case"))),
        Entry(name="archive/version", data=b"3"),
    ]
    path = write_archive(tmp_path / "model.ckpt", entries)

    assert torch.load(path, weights_only=True) == "upper case"
    with pytest.raises(CheckpointError, match=r"two members named 'archive/data\.pkl', case aside"):
        open_checkpoint(path)


@pytest.mark.parametrize("names", [("b/DATA.PKL", "a/data.pkl"), ("a/DATA.PKL",)])
def test_a_pickle_that_torch_would_read_by_a_name_in_capitals_is_refused(tmp_path, names):
    entries = [Entry(name=name, data=GOOD) for name in names]
    path = write_archive(tmp_path / "model.ckpt", entries)

    with pytest.raises(CheckpointError, match=r"with \d members? named \*/data\.pkl"):
        open_checkpoint(path)


def test_a_pickle_that_is_not_what_its_archive_says_is_refused(tmp_path):
    path = write_archive(tmp_path / "model.ckpt", [Entry(name="x/data.pkl", data=GOOD, crc32=7)])

    with pytest.raises(CheckpointError, match=r"data\.pkl does not have the CRC-32"):
        open_checkpoint(path)


def test_a_tensor_of_nine_axes_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros((1,) * 9)}, path)

    with pytest.raises(CheckpointError, match="its shape or its offsets are not sizes"):
        open_checkpoint(path)


# --- Names in pickles ----------------------------------------------------------------------------


def test_a_file_that_torch_wrote_for_tensors_alone_names_nothing_unusual(tmp_path):
    module = torch.nn.BatchNorm2d(2).half()
    tensors = {name: torch.zeros(2, dtype=dtype) for name, dtype in DTYPES.items()}
    parts = {"parameter": torch.nn.Parameter(torch.zeros(2)), "complex": torch.zeros(2) * 1j}
    settings = {"size": torch.Size([2]), "dtype": torch.float16, "device": torch.device("cpu")}
    content = {"state_dict": tensors | parts | dict(module.state_dict()), "kept": {1, 2}}

    for protocol in (2, 5):
        path = saved(tmp_path, content | settings, pickle_protocol=protocol)
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.unusual_globals == ()


def test_the_names_that_count_as_usual_are_a_part_of_those_that_torch_lets_its_own_reader_load():
    from torch._weights_only_unpickler import _get_allowed_globals

    assert len(_USUAL) > 40
    assert _get_allowed_globals().keys() >= _USUAL - {"__builtin__.set"}


@pytest.mark.parametrize(
    "name",
    [
        *("pickle.loads", "marshal.loads", "io.open", "builtins.getattr", "operator.attrgetter"),
        *("pip.main", "torch.load", "timeit.timeit", "cProfile.run", "types.CodeType"),
        *("code.InteractiveInterpreter", "_io.FileIO", "numpy.testing.runstring"),
        "torch.serialization.load",
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda name: op.call(name, op.text("x")),
        op.global_of,
        op.stack_global_of,
        op.old_object,
        op.old_instance,
        op.new_object,
    ],
)
def test_a_name_that_torch_does_not_write_is_listed_however_it_is_used(tmp_path, name, use):
    weights = op.named({"weight": op.tensor(op.storage())})
    path = archive(tmp_path / "model.ckpt", op.pickled(use(name), op.POP, weights))

    with open_checkpoint(path) as checkpoint:
        assert checkpoint.unusual_globals == (name,)
