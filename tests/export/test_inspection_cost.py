"""The cost of `ldm inspect` on files that use up every limit: the two figures of SECURITY.md."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export import opcodes as op

ROOT = Path(__file__).parents[2]
#: The peak is that of `/proc`: `ru_maxrss` begins with what the parent had.
CODE = """
import resource, sys
from pathlib import Path
from ldm_runtime.cli import main
sys.argv[0] = "ldm"
status = main(["inspect", sys.argv[1]])
usage = resource.getrusage(resource.RUSAGE_SELF)
lines = Path("/proc/self/status").read_text().splitlines()
(peak,) = (int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:"))
print(status, usage.ru_utime + usage.ru_stime, peak, file=sys.stderr)
"""


def promised():
    """Return the seconds and megabytes that SECURITY.md names."""
    words = " ".join((ROOT / "SECURITY.md").read_text().split())
    seconds, megabytes = re.search(
        r"at most (\d+) s of a core and (\d+) MB of memory", words
    ).groups()
    return int(seconds), int(megabytes)


def safetensors_with(header):
    return struct.pack("<Q", len(header)) + header


def many_entries(path):
    """A header of 16 MiB: as many tensors as fit, of no bytes and eight axes."""
    entry = {"dtype": "F32", "shape": [0] * 8, "data_offsets": [0, 0]}
    header = json.dumps({f"t{number}": entry for number in range(195_000)}, separators=(",", ":"))
    path.write_bytes(safetensors_with(header.encode()))


def many_lists(path):
    """A header of 16 MiB that takes most memory once it is decoded."""
    path.write_bytes(safetensors_with(b'{"a":[' + b"[]," * ((16 << 20) // 3 - 9) + b"[]]}"))


def many_opcodes(path):
    """Two million opcodes, all of which make something, and a list of storages of its limit."""
    values = op.EMPTY_TUPLE + (op.DUP + op.TUPLE2) * 999_990
    keys = op.list_of(*[op.text("0")] * 199_990)
    path.write_bytes(op.legacy_header() + op.pickled(values) + op.pickled(keys))


def long_yaml(path):
    """A small model with 64 KiB of YAML next to it, all of it in small pieces."""
    path.write_bytes(safetensors_with(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'))
    pieces = ",".join(["[1]"] * 16_000)
    path.with_suffix(".yaml").write_text(f"model: {{params: {{a: [{pieces}]}}}}")


@pytest.mark.slow
@pytest.mark.parametrize("write", [many_entries, many_lists, many_opcodes, long_yaml])
def test_no_file_costs_more_than_is_promised(tmp_path, write):
    seconds, megabytes = promised()
    path = tmp_path / "model.safetensors"
    write(path)

    done = subprocess.run(
        [sys.executable, "-c", CODE, str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )

    *said, figures = done.stderr.splitlines()
    status, spent, peak = map(float, figures.split())
    assert status in (0, 1)
    assert len(said) <= 1
    assert spent < seconds
    assert peak < megabytes
