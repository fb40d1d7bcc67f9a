"""Threads and memory follow the limits of this process: its affinity and its control groups."""

import math
import sys

import pytest

from ldm_runtime.backends import get_backend
from ldm_runtime.backends.contract import RunOptions
from ldm_runtime.backends.control_groups import ControlGroups
from ldm_runtime.backends.processor_features import why_not_int8
from ldm_runtime.backends.processors import default_threads, usable_processors

V2 = "0::/app/worker\n"
V1 = "12:pids:/docker/1a\n5:cpu,cpuacct:/docker/1a\n3:memory:/docker/1a\n0::/\n"


@pytest.fixture
def groups_of(tmp_path):
    """Returns control groups from the file that names them, and the files of a mount."""

    def make(membership, **files):
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "mount" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return ControlGroups(root=tmp_path / "mount", membership=tmp_path / "membership")

    return make


@pytest.mark.parametrize(
    ("membership", "files", "processors"),
    [
        (V2, {}, math.inf),
        (V2, {"app/worker/cpu.max": "max 100000"}, math.inf),
        (V2, {"app/worker/cpu.max": "150000 100000"}, 1.5),
        (V2, {"app/worker/cpu.max": "max 100000", "app/cpu.max": "200000 100000"}, 2.0),
        (V2, {"app/worker/cpu.max": "400000 100000", "cpu.max": "50000 100000"}, 0.5),
        (V1, {"cpu/docker/1a/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, math.inf),
        (
            V1,
            {
                "cpu/docker/1a/cpu.cfs_quota_us": 300000,
                "cpu/docker/1a/cpu.cfs_period_us": 100000,
            },
            3.0,
        ),
        # In a container that does not see the names of its groups, its own is mounted as the root.
        (V1, {"cpu/cpu.cfs_quota_us": 50000, "cpu/cpu.cfs_period_us": 100000}, 0.5),
    ],
)
def test_the_lowest_quota_of_all_groups_above_counts(groups_of, membership, files, processors):
    assert groups_of(membership, **files).processors() == processors


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        (V2, {"app/worker/memory.max": "max", "app/memory.max": 900}, 900.0),
        (V1, {"memory/docker/1a/memory.limit_in_bytes": 700}, 700.0),
        (V1, {"memory/memory.limit_in_bytes": 800}, 800.0),
    ],
)
def test_memory_limits_are_read_alike(groups_of, membership, files, limit):
    assert groups_of(membership, **files).memory_bytes() == limit


def test_without_control_groups_there_is_no_limit(tmp_path):
    groups = ControlGroups(root=tmp_path, membership=tmp_path / "missing")

    assert (groups.processors(), groups.memory_bytes()) == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("affinity", "quota", "threads"),
    [
        ({0, 1, 2, 3}, "max 100000", 2),
        ({0, 2}, "max 100000", 2),
        ({0, 1}, "max 100000", 1),
        ({4, 5}, "max 100000", 2),  # the system does not say which core they are of
        ({0, 1, 2, 3}, "150000 100000", 2),
        ({0, 1, 2, 3}, "100000 100000", 1),
        ({0, 1, 2, 3}, "20000 100000", 1),
    ],
)
def test_there_is_a_thread_per_core_within_affinity_and_quota(
    groups_of, tmp_path, affinity, quota, threads
):
    for number, siblings in enumerate(["0-1", "0-1", "2-3", "2-3"]):
        core = tmp_path / f"cpus/cpu{number}/topology"
        core.mkdir(parents=True)
        (core / "thread_siblings_list").write_text(f"{siblings}\n")
    groups = groups_of("0::/\n", **{"cpu.max": quota})

    assert default_threads(groups, affinity, tmp_path / "cpus") == threads


def test_a_machine_has_processors(groups_of):
    assert usable_processors(groups_of("0::/\n", **{"cpu.max": "1000 100000"})) == 1
    assert 1 <= default_threads() <= usable_processors()


@pytest.mark.parametrize(
    ("flags", "machine", "can"),
    [
        ("fpu avx2 avx512f avx512_vnni amx_tile", "x86_64", True),
        ("fpu avx2 avx_vnni", "AMD64", True),
        ("fpu amx_int8", "x86_64", True),
        ("fpu avx2 avx512f avx512bw", "x86_64", False),
        ("fpu sse4_2", "x86_64", False),
        ("asimd asimddp", "aarch64", True),
    ],
)
def test_x86_processors_without_vnni_run_nothing_in_8_bits(tmp_path, flags, machine, can):
    info = tmp_path / "cpuinfo"
    info.write_text(f"model name\t: avx_vnni\nflags\t\t: {flags}\nbugs\t\t: none\n")

    reason = why_not_int8(info, machine)

    assert (reason is None) is can
    assert can or "has no VNNI" in reason


def test_what_the_system_does_not_say_of_a_processor_is_no_reason_against_8_bits(tmp_path):
    assert why_not_int8(tmp_path / "none", "x86_64") is None


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_processor_without_vnni_is_a_reason_of_both_backends(name, monkeypatch):
    if name == "openvino":
        pytest.importorskip("openvino", reason="needs the extra openvino")
    module = sys.modules[get_backend(name).__name__]
    monkeypatch.setattr(module, "why_not_int8", lambda: "none here")

    assert module.why_not(None, options=RunOptions(precision="int8")) == "none here"
    assert module.why_not(None, options=RunOptions(precision="fp32")) is None
