"""What people take for a checkpoint, or get in place of one, is called by its name."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.detection.detect import detect
from ldm_export.detection.inspection import inspect_checkpoint
from ldm_export.disk_space import full_disk_named
from ldm_export.errors import CheckpointError, ExportError, UnknownModelError
from ldm_export.source import ExportOptions, open_source
from tests.export.sd_layout import TINY, checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
PAGE = b"<!DOCTYPE html><html><head><title>Log in</title></head></html>"
INDEX = json.dumps(
    {"metadata": {"total_size": 7}, "weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}
).encode()
#: Content of a file, and words of the sentence about it.
MISTAKEN = {
    "pointer": (POINTER, "a git-lfs pointer"),
    "page": (PAGE, "a web page; the download went wrong"),
    "page after a mark": (b"\xef\xbb\xbf" + PAGE, "a web page; the download went wrong"),
    "page after blanks": (b"\n\r\n  " + PAGE, "a web page; the download went wrong"),
    "error of a store": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "page"),
    "error in JSON": (b'{"error":"Invalid credentials"}', "JSON .*Invalid credentials.* get the"),
    "error in words": (b"Access to model x/y is restricted.\n", "text .*restricted.* get the file"),
    "index": (INDEX, "the index of one in several files; join its parts into one file first"),
    "quantised": (b"GGUF\3\0\0\0", "a GGUF file"),
    "empty": (b"", "is empty; get the file again"),
}


@pytest.mark.parametrize("name", MISTAKEN)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_the_export_and_the_inspection_say_the_same_of_it(tmp_path, name, suffix):
    content, words = MISTAKEN[name]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=words) as exported:
        open_checkpoint(path)
    with pytest.raises(CheckpointError) as inspected:
        inspect_checkpoint(path)

    assert str(inspected.value) == str(exported.value)


@pytest.mark.parametrize("missing", [2, 5000])
def test_a_safetensors_file_that_was_cut_says_how_much_is_missing(tmp_path, missing):
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.randn(64, 32), "b.weight": torch.randn(64, 32)}, path)
    path.write_bytes(path.read_bytes()[:-missing])

    with pytest.raises(CheckpointError, match=rf"ends {missing} bytes early.* download it again"):
        open_checkpoint(path)


def test_a_textual_inversion_is_called_one_in_either_format(tmp_path):
    path = tmp_path / "inversion.pt"
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.randn(1, 768)}}, path)

    with pytest.raises(CheckpointError, match="is a textual inversion embedding and not a model"):
        open_checkpoint(path)
    with pytest.raises(UnknownModelError, match="textual inversion embedding"):
        detect({"<cat-toy>": checkpoint(TINY)["betas"]})


def test_one_part_of_several_is_called_so(tmp_path):
    path = tmp_path / "model-00002-of-00003.safetensors"
    save_file({"a.weight": torch.randn(4)}, path)

    with open_checkpoint(path) as part, pytest.raises(CheckpointError, match="is part 2 of 3 of"):
        open_source(ExportOptions(checkpoint=path, out=tmp_path / "out"), part, hashed=False)
    assert "is part 2 of 3" in inspect_checkpoint(path)["problem"]
    whole = path.rename(tmp_path / "model-00001-of-00001.safetensors")
    assert "part" not in inspect_checkpoint(whole)["problem"]


def test_a_full_disk_is_one_sentence_with_the_space_it_takes(tmp_path):
    out = Path(tmp_path / "engines")

    with (
        pytest.raises(ExportError, match=r"no space left .* about 2,500 MB, .* MB are free; make"),
        full_disk_named(out, 2_500_000_000),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", str(out))
    with pytest.raises(PermissionError), full_disk_named(out, 1):
        raise PermissionError(errno.EACCES, "Permission denied", str(out))
