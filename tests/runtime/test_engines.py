import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import msgspec
import pytest

from ldm_runtime import Generator
from ldm_runtime.bundle.files import check_file, sha256_of
from ldm_runtime.bundle.manifest import FileRecord, GraphRecord, encode_manifest, load_manifest
from ldm_runtime.cli import main
from ldm_runtime.diagnostics.inspection import inspect, readable
from ldm_runtime.durable import lock_folder
from ldm_runtime.engines import build_specs as engine_recipes
from ldm_runtime.engines import store as engine_store
from ldm_runtime.engines.build import build_engine
from ldm_runtime.engines.build_specs import EngineOptions, Toolchain, choose_toolchain
from ldm_runtime.engines.gpu import Gpu, find_gpu
from ldm_runtime.engines.library import import_builder
from ldm_runtime.engines.phases import PhaseTree
from ldm_runtime.engines.profiles import SizeRange
from ldm_runtime.engines.records import (
    EngineBuildSpec,
    EngineRecord,
    ProfileRecord,
    encode_engine_record,
    engine_key,
    load_engine_records,
)
from ldm_runtime.engines.store import add_engines
from ldm_runtime.engines.trust import is_trusted_engine
from ldm_runtime.errors import BundleError, EngineBuildError
from tests.runtime.ctrl_c import output_of_interrupted
from tests.runtime.fake_tensorrt import GPU_NAME, FakeTensorRT

GPU = Gpu(name=GPU_NAME, compute_capability=(9, 0), driver_version="13.0")
TENSORRT, RTX = EngineOptions(builder="tensorrt"), EngineOptions(builder="tensorrt_rtx")
NAMES = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
RECORD = EngineRecord(
    component="unet",
    builder="tensorrt_rtx",
    builder_version="1.7.1.116",
    graph_sha256="a" * 64,
    weights_sha256="b" * 64,
    flags=("REFIT",),
    profiles=(ProfileRecord(input="timesteps", min=(1,), opt=(2,), max=(8,)),),
    targets=("sm86", "sm89"),
    gpu_name=None,
    plan="unet.plan",
    plan_sha256="c" * 64,
    driver_version=None,
    seconds=1.5,
    size_bytes=10,
)
#: For every field that decides what an engine is, another value.
OTHER_VALUES = {
    "component": "vae_decoder",
    "builder": "tensorrt",
    "builder_version": "1.7.2.1",
    "graph_sha256": "d" * 64,
    "weights_sha256": "d" * 64,
    "flags": (),
    "profiles": (ProfileRecord(input="timesteps", min=(1,), opt=(2,), max=(4,)),),
    "targets": ("sm86",),
    "gpu_name": GPU_NAME,
}


@pytest.fixture
def bundle(own_bundle):
    """A bundle whose graphs pass for fp16, which is what engines are built from."""
    manifest = load_manifest(own_bundle)
    components = [
        replace(each, graphs=(GraphRecord(variant="fp16", file=each.graphs[0].file), *each.graphs))
        for each in manifest.components
    ]
    write_manifest(own_bundle, replace(manifest, components=tuple(components)))
    return own_bundle


@pytest.fixture
def vendor(monkeypatch, tmp_path):
    """TensorRT and TensorRT-RTX in one fake, and a GPU."""
    module = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    monkeypatch.setattr(
        engine_recipes.choose_toolchain,
        "__kwdefaults__",
        {
            "look_for_gpu": lambda: GPU,
            "why_not": lambda _: None,
        },
    )
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return module


def write_manifest(bundle, manifest):
    (bundle / "manifest.json").write_bytes(encode_manifest(manifest))


def change_file(bundle, path, data=None):
    """Change a file of a bundle and tell its manifest."""
    (bundle / path).write_bytes((bundle / path).read_bytes() + b"\0" if data is None else data)
    manifest = load_manifest(bundle)
    changed = FileRecord(
        path=path, sha256=sha256_of(bundle / path), size_bytes=(bundle / path).stat().st_size
    )
    files = tuple(changed if each.path == path else each for each in manifest.files)
    write_manifest(bundle, replace(manifest, files=files))


def assert_whole(bundle):
    """Every file that the manifest names is there, unchanged, and every engine is described."""
    manifest = load_manifest(bundle)
    for record in manifest.files:
        check_file(bundle, record)
    records = load_engine_records(bundle, manifest)
    assert {record.engine_path for record in records} <= {each.path for each in manifest.files}
    return records


# Records


def test_a_record_survives_being_written():
    data = encode_engine_record(RECORD)

    assert msgspec.json.decode(data, type=EngineRecord) == RECORD


@pytest.mark.parametrize("name", [field.name for field in fields(EngineRecord)])
def test_a_record_without_a_field_is_refused(name, bundle, vendor):
    manifest = add_engines(bundle, RTX)
    path = bundle / manifest.engines[0]
    content = json.loads(path.read_bytes())
    del content[name]
    change_file(bundle, manifest.engines[0], json.dumps(content).encode())

    with pytest.raises(BundleError, match=f"`{name}`.*ldm build-engines"):
        load_engine_records(bundle, load_manifest(bundle))


@pytest.mark.parametrize("name", [field.name for field in fields(EngineBuildSpec)])
def test_every_field_of_a_recipe_changes_its_key(name):
    other = replace(RECORD, **{name: OTHER_VALUES[name]})

    assert engine_key(other) != engine_key(RECORD)
    assert other.build_spec != RECORD.build_spec


def test_what_a_build_took_does_not_change_its_key():
    other = replace(RECORD, seconds=9.9, plan_sha256="0", driver_version="13.1", size_bytes=1)

    assert engine_key(other) == engine_key(RECORD) == engine_key(RECORD.build_spec)
    assert other.build_spec == RECORD.build_spec


def test_a_record_in_the_place_of_another_is_refused(bundle, vendor):
    manifest = add_engines(bundle, RTX)
    change_file(bundle, manifest.engines[1], (bundle / manifest.engines[0]).read_bytes())

    with pytest.raises(BundleError, match="belongs to another record"):
        load_engine_records(bundle, load_manifest(bundle))


def test_an_altered_record_is_refused(bundle, vendor):
    manifest = add_engines(bundle, RTX)
    path = bundle / manifest.engines[0]
    path.write_bytes(path.read_bytes().replace(b"sm121", b"sm122"))

    with pytest.raises(BundleError, match="sha256"):
        load_engine_records(bundle, manifest)


# Building into a bundle


def test_three_engines_are_built_and_listed_with_their_hashes(bundle, vendor):
    before = load_manifest(bundle)

    manifest = add_engines(bundle, RTX)

    records = assert_whole(bundle)
    assert [record.component for record in records] == NAMES
    assert load_manifest(bundle) == manifest
    assert replace(manifest, engines=(), files=before.files) == before
    assert set(before.files) < set(manifest.files)
    for record in records:
        assert record.plan_sha256 == sha256_of(bundle / record.engine_path)
        assert record.size_bytes == (bundle / record.engine_path).stat().st_size
        assert record.targets == ("sm80", "sm86", "sm89", "sm120", "sm121")
        assert record.gpu_name is None


def test_the_builder_gets_the_profiles_flags_and_targets_of_the_record(bundle, vendor):
    add_engines(bundle, replace(RTX, targets=("sm89", "sm86"), refittable=True))

    _, unet, *_ = assert_whole(bundle)
    flags, capabilities, profiles, _ = json.loads((bundle / unet.engine_path).read_bytes())
    assert flags == list(unet.flags) == ["REQUIRE_USER_ALLOCATION", "REFIT"]
    assert capabilities == {"0": "SM86", "1": "SM89"}
    assert profiles == [
        {each.input: [list(each.min), list(each.opt), list(each.max)] for each in unet.profiles}
    ]


def test_turing_gets_engines_of_its_own(bundle, vendor):
    manifest = add_engines(bundle, replace(RTX, targets=("sm86", "sm75")))

    folders = {Path(path).parent.name for path in manifest.engines}
    assert folders == {"tensorrt_rtx-11.4.0.106-sm75", "tensorrt_rtx-11.4.0.106-sm86"}
    assert len(manifest.engines) == 2 * len(NAMES)


def test_engines_that_would_come_out_the_same_are_not_built_again(bundle, vendor):
    add_engines(bundle, RTX)
    before = (bundle / "manifest.json").read_bytes()
    writes = []

    add_engines(bundle, RTX, on_write=writes.append)

    assert len(vendor.configs) == len(NAMES)
    assert writes == []
    assert (bundle / "manifest.json").read_bytes() == before


def test_changed_weights_rebuild_one_engine_and_keep_the_others(bundle, vendor):
    add_engines(bundle, RTX)
    before = {each.component: each for each in assert_whole(bundle)}
    weights = load_manifest(bundle).component("unet").weights_file
    change_file(bundle, weights)

    add_engines(bundle, RTX)

    after = {each.component: each for each in assert_whole(bundle)}
    assert len(vendor.configs) == len(NAMES) + 1
    assert after["unet"].weights_sha256 != before["unet"].weights_sha256
    assert after["text_encoder"] == before["text_encoder"]


@pytest.mark.parametrize(
    "options",
    [
        replace(RTX, sizes=SizeRange(max_batch=2)),
        replace(RTX, refittable=True),
        replace(RTX, sizes=SizeRange(static=True)),
    ],
)
def test_other_options_replace_the_engines_of_the_same_folder(options, bundle, vendor):
    first = add_engines(bundle, RTX)

    second = add_engines(bundle, options)

    assert len(vendor.configs) == 2 * len(NAMES)
    assert sorted(second.engines) == sorted(first.engines)
    assert_whole(bundle)


def test_engines_of_another_version_stay_while_their_weights_do(bundle, vendor):
    add_engines(bundle, RTX)
    vendor.__version__ = "11.5.0.1"

    both = add_engines(bundle, RTX)
    change_file(bundle, load_manifest(bundle).component("unet").weights_file)
    after = add_engines(bundle, RTX)

    assert len(both.engines) == 2 * len(NAMES)
    assert len([path for path in after.engines if "11.4" in path]) == len(NAMES) - 1
    assert not (bundle / both.engines[1]).exists()
    assert_whole(bundle)


def test_an_engine_whose_plan_was_damaged_is_built_again(bundle, vendor):
    manifest = add_engines(bundle, RTX)
    plan = (bundle / manifest.engines[1]).with_suffix(".plan")
    plan.write_bytes(b"damaged")

    add_engines(bundle, RTX)

    assert len(vendor.configs) == len(NAMES) + 1
    assert_whole(bundle)


class InterruptionError(Exception):
    pass


def interrupted_after(count):
    left = iter(range(count))

    def on_write(label):
        if next(left, None) is None:
            raise InterruptionError(label)

    return on_write


@pytest.mark.parametrize("is_rebuild", [False, True])
def test_a_build_interrupted_anywhere_leaves_a_whole_bundle_and_can_be_finished(
    is_rebuild, bundle, vendor, tmp_path
):
    if is_rebuild:
        add_engines(bundle, replace(RTX, sizes=SizeRange(static=True)))
    labels = []
    add_engines(shutil.copytree(bundle, tmp_path / "whole"), RTX, on_write=labels.append)

    for count, label in enumerate(labels):
        copy = shutil.copytree(bundle, tmp_path / str(count))
        with pytest.raises(InterruptionError, match=re.escape(label)):
            add_engines(copy, RTX, on_write=interrupted_after(count))
        built = len(vendor.configs)
        assert_whole(copy)
        with Generator(copy, backend="onnxruntime") as generator:
            assert generator.spec.family == "tiny"

        add_engines(copy, RTX)

        left = [each for each in labels[count:] if each.startswith("build ")]
        assert len(vendor.configs) == built + len(left)
        assert len(assert_whole(copy)) == len(NAMES)
        assert [path.name for path in (copy / "tensorrt").iterdir() if "partial" in path.name] == []
    assert len(labels) >= 6


def test_engines_are_hashed_before_they_take_their_place(bundle, vendor, monkeypatch):
    events = []

    def hashed(path):
        events.append("hash")
        return sha256_of(path)

    monkeypatch.setattr(engine_store, "sha256_of", hashed)
    add_engines(bundle, RTX, on_write=lambda label: events.append(label.split()[0]))

    assert events[events.index("replace") :] == ["replace", "place", "manifest"]


def test_what_an_interrupted_build_finished_is_taken_over(bundle, vendor):
    with pytest.raises(InterruptionError, match=r"build .*vae_decoder.plan"):
        add_engines(bundle, RTX, on_write=interrupted_after(2))

    add_engines(bundle, RTX)

    assert len(vendor.configs) == len(NAMES)


def test_a_second_build_in_the_same_bundle_is_told_to_wait(bundle, vendor):
    def on_write(_):
        with pytest.raises(EngineBuildError, match="another process is changing"):
            add_engines(bundle, RTX)
        with pytest.raises(BlockingIOError):
            lock_folder(bundle)  # as an export does before it replaces the bundle

    add_engines(bundle, RTX, on_write=on_write)

    assert len(vendor.configs) == len(NAMES)


def test_a_bundle_that_was_exchanged_during_a_build_keeps_its_manifest(bundle, vendor, tmp_path):
    other = shutil.copytree(bundle, tmp_path / "other")
    change_file(other, load_manifest(other).component("unet").weights_file)

    def exchange(label):
        if label.endswith("vae_encoder.plan"):
            shutil.copytree(other, bundle, dirs_exist_ok=True)

    with pytest.raises(EngineBuildError, match=r"manifest\.json was changed .*; build them again"):
        add_engines(bundle, RTX, on_write=exchange)

    assert load_manifest(bundle) == load_manifest(other)
    assert_whole(bundle)


def test_an_altered_graph_is_not_built_from(bundle, vendor):
    graph = bundle / load_manifest(bundle).component("unet").graphs[0].file
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")

    with pytest.raises(BundleError, match="sha256"):
        add_engines(bundle, RTX)


def test_a_bundle_without_fp16_graphs_is_refused(own_bundle, vendor):
    with pytest.raises(EngineBuildError, match="no fp16 graphs"):
        add_engines(own_bundle, RTX)


def test_a_failing_build_quotes_the_library_and_leaves_the_bundle_as_it_was(bundle, vendor):
    before = (bundle / "manifest.json").read_bytes()
    vendor.complaint = "Error Code 4:\n late_conv: dimension cannot be negative"

    with pytest.raises(EngineBuildError) as caught:
        add_engines(bundle, RTX)

    assert "TensorRT-RTX 11.4.0.106 cannot build the text_encoder engine" in str(caught.value)
    assert "Error Code 4: late_conv: dimension cannot be negative" in str(caught.value)
    assert "driver" not in str(caught.value)
    assert (bundle / "manifest.json").read_bytes() == before
    assert_whole(bundle)


def test_a_profile_that_the_library_refuses_is_an_error(tmp_path, vendor):
    bad = replace(RECORD.profiles[0], opt=(9,))

    with pytest.raises(EngineBuildError, match="min <= opt <= max"):
        build_engine(Path("x"), replace(RECORD.build_spec, profiles=(bad,)), tmp_path / "a.plan")


def test_ctrl_c_cancels_the_build_and_leaves_no_plan(bundle):
    code = f"""
from pathlib import Path
from ldm_runtime.engines.build_specs import EngineOptions
from ldm_runtime.engines.store import add_engines
from tests.runtime.fake_tensorrt import FakeTensorRT

module = FakeTensorRT()
module.is_interrupted = True
sys.modules["tensorrt_rtx"] = module
try:
    add_engines(Path({str(bundle)!r}), EngineOptions(builder="tensorrt_rtx"))
except KeyboardInterrupt:
    print("interrupted", [each.name for each in threading.enumerate()])
"""

    assert output_of_interrupted(code) == "interrupted ['MainThread']\n"
    assert list(bundle.glob("tensorrt/**/*.plan")) == []
    assert_whole(bundle)


# TensorRT with a GPU


def test_tensorrt_builds_for_the_gpu_that_is_here(bundle, vendor):
    add_engines(bundle, replace(TENSORRT, hardware_compatible=True))

    records = assert_whole(bundle)
    assert {record.folder for record in records} == {"tensorrt/tensorrt-11.4.0.106-sm90"}
    assert {record.gpu_name for record in records} == {GPU_NAME}
    assert {record.driver_version for record in records} == {"13.0"}
    assert {record.flags for record in records} == {("SAME_COMPUTE_CAPABILITY",)}
    level = vendor.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    assert [config.hardware_compatibility_level for config in vendor.configs] == [level] * len(
        NAMES
    )
    assert [config.num_compute_capabilities for config in vendor.configs] == [0] * len(NAMES)


def test_kernel_times_are_kept_for_the_next_build_outside_the_bundle(bundle, vendor, tmp_path):
    add_engines(bundle, TENSORRT)

    (path,) = (tmp_path / "home/.cache/ldm-deploy").glob("*.timing")
    assert path.name == "tensorrt-11.4.0.106-NVIDIA-Fake-9000.timing"
    assert [config.cache.data for config in vendor.configs] == [b"", b"+", b"++", b"+++"]
    assert path.read_bytes() == b"++++"


def test_an_engine_that_was_built_here_is_trusted_and_one_that_was_not_is_built_again(
    bundle, vendor, tmp_path
):
    add_engines(bundle, TENSORRT)
    hashes = [record.plan_sha256 for record in assert_whole(bundle)]
    assert all(map(is_trusted_engine, hashes))
    add_engines(bundle, TENSORRT)
    assert len(vendor.configs) == len(NAMES)
    shutil.rmtree(tmp_path / "home")  # as on another machine

    add_engines(bundle, TENSORRT)

    assert len(vendor.configs) == 2 * len(NAMES)
    assert all(is_trusted_engine(record.plan_sha256) for record in assert_whole(bundle))


def test_kernel_times_of_another_machine_are_not_used(bundle, vendor, tmp_path):
    cache = tmp_path / "home/.cache/ldm-deploy/tensorrt-11.4.0.106-NVIDIA-Fake-9000.timing"
    cache.parent.mkdir(mode=0o700, parents=True)
    cache.write_bytes(b"other machine")

    add_engines(bundle, TENSORRT)

    assert [config.cache.data for config in vendor.configs] == [b"", b"+", b"++", b"+++"]


def test_kernel_times_that_others_may_write_are_neither_read_nor_kept(
    bundle, vendor, tmp_path, caplog
):
    cache = tmp_path / "home/.cache/ldm-deploy/tensorrt-11.4.0.106-NVIDIA-Fake-9000.timing"
    cache.parent.mkdir(parents=True)
    cache.parent.chmod(0o770)
    cache.write_bytes(b"times of another user")

    add_engines(bundle, TENSORRT)

    assert [config.cache.data for config in vendor.configs] == [b""] * len(NAMES)
    assert cache.read_bytes() == b"times of another user"
    assert f"{cache} cannot be read (others may write to its folder" in caplog.text
    assert len(assert_whole(bundle)) == len(NAMES)


def test_a_home_that_cannot_be_written_does_not_stop_a_build(bundle, vendor, tmp_path):
    (tmp_path / "home").write_text("not a folder")

    add_engines(bundle, TENSORRT)

    assert len(assert_whole(bundle)) == len(NAMES)


# What to build with


def choose(options, *, gpu=None, installed=()):
    """Choose as a machine with these libraries would."""
    return choose_toolchain(
        options,
        look_for_gpu=lambda: gpu,
        why_not=lambda name: None if name in installed else f"{name} is not installed",
    )


BOTH = ("tensorrt", "tensorrt_rtx")
ADA = replace(GPU, compute_capability=(8, 9))
TURING = replace(GPU, compute_capability=(7, 5))


@pytest.mark.parametrize(
    ("gpu", "installed", "builder"),
    [
        (GPU, BOTH, "tensorrt"),
        (None, BOTH, "tensorrt_rtx"),
        (ADA, ("tensorrt_rtx",), "tensorrt_rtx"),
        (GPU, ("tensorrt",), "tensorrt"),
    ],
)
def test_auto_prefers_tensorrt_where_there_is_a_gpu(gpu, installed, builder, vendor):
    chosen = choose(EngineOptions(), gpu=gpu, installed=installed)

    assert isinstance(chosen, Toolchain)
    assert chosen.builder == builder


@pytest.mark.parametrize(
    ("gpu", "installed", "words"),
    [
        (None, (), ["'tensorrt' of ldm-deploy on a machine with", "extra 'tensorrt-rtx'"]),
        (None, ("tensorrt",), ["extra 'tensorrt-rtx'"]),
        (GPU, ("tensorrt_rtx",), ["extra 'tensorrt'", GPU_NAME, "not run on sm90"]),
    ],
)
def test_auto_says_what_to_install_when_nothing_can_build(gpu, installed, words, vendor):
    sentence = choose(EngineOptions(), gpu=gpu, installed=installed)

    assert isinstance(sentence, str)
    assert [word for word in words if word not in sentence] == []


def test_auto_follows_what_only_one_library_can_do(vendor):
    targets = choose(EngineOptions(targets=("sm120",)), gpu=GPU, installed=BOTH)
    compatible = choose(EngineOptions(hardware_compatible=True), gpu=GPU, installed=BOTH)
    neither = choose(EngineOptions(hardware_compatible=True), installed=BOTH)

    assert targets.builder == "tensorrt_rtx"
    assert compatible.builder == "tensorrt"
    assert "rtx" not in neither


def test_none_builds_nothing_and_looks_for_nothing():
    assert choose_toolchain(EngineOptions(builder="none"), look_for_gpu=None, why_not=None)


@pytest.mark.parametrize(
    ("options", "gpu", "sentence"),
    [
        (TENSORRT, None, "there is none here; TensorRT-RTX builds anywhere"),
        (replace(TENSORRT, targets=("sm86",)), GPU, r"this machine only \(sm90\), not for sm86"),
        (replace(RTX, hardware_compatible=True), None, "name the targets"),
        (replace(RTX, refittable=True), None, "refittable engines only on a machine with a GPU"),
        (replace(RTX, targets=("sm90",)), None, "no target 'sm90'; choose from sm75, sm80"),
        (EngineOptions(targets=("sm86",), hardware_compatible=True), GPU, "one of the two"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, gpu, sentence, vendor):
    with pytest.raises(EngineBuildError, match=sentence):
        choose(options, gpu=gpu, installed=BOTH)


def test_a_builder_asked_for_by_name_must_be_there():
    with pytest.raises(EngineBuildError, match="tensorrt is not installed"):
        choose(TENSORRT, gpu=GPU)


@pytest.mark.parametrize(("gpu", "first"), [(TURING, "sm75"), (ADA, "sm80"), (None, "sm80")])
def test_default_targets_include_the_gpu_that_is_here(gpu, first, vendor):
    chosen = choose(RTX, gpu=gpu, installed=BOTH)

    assert len(chosen.target_groups) == 1
    assert chosen.target_groups[0][0] == first
    assert gpu is None or gpu.target in chosen.target_groups[0]


def test_the_bindings_alone_are_enough(monkeypatch):
    module = FakeTensorRT("tensorrt_rtx_bindings", "1.7.1")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", module)

    assert import_builder("tensorrt_rtx") is module


def test_a_library_that_is_too_old_is_named_with_what_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT("tensorrt", "10.9.0.34"))

    with pytest.raises(EngineBuildError, match=r"TensorRT 10\.9\.0\.34 is too old.* 10\.13"):
        import_builder("tensorrt")


def test_a_library_that_is_not_installed_is_named_with_the_command(monkeypatch):
    for name in ("tensorrt", "tensorrt_bindings"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(EngineBuildError, match="install the extra 'tensorrt'"):
        import_builder("tensorrt")


# The driver, progress, commands


class FakeDriver:
    """libcuda with one GPU; `fails` is the function that answers an error."""

    def __init__(self, fails=""):
        self.fails = fails

    def __getattr__(self, function):
        def call(*arguments):
            target = getattr(arguments[0], "_obj", None)
            if function == "cuDriverGetVersion":
                target.value = 13020
            elif function == "cuDeviceGetName":
                arguments[0].value = GPU_NAME.encode()
            elif function == "cuDeviceGetAttribute":
                target.value = {75: 12, 76: 1}[arguments[1]]
            return 100 if function == self.fails else 0

        return call


def test_the_driver_says_which_gpu_is_here():
    gpu = find_gpu(lambda _: FakeDriver())

    assert gpu == Gpu(name=GPU_NAME, compute_capability=(12, 1), driver_version="13.2")
    assert gpu.target == "sm121"


def test_without_a_driver_or_a_device_there_is_no_gpu():
    def missing(_):
        raise OSError("libcuda.so.1: cannot open shared object file")

    assert find_gpu(missing) is None
    assert find_gpu(lambda _: FakeDriver(fails="cuInit")) is None
    assert find_gpu(lambda _: FakeDriver(fails="cuDeviceGet")) is None


def test_nested_phases_become_one_fraction_that_never_falls():
    tree, seen = PhaseTree(), []
    tree.start("build", None, 4)
    tree.step("build", 0)
    tree.start("optimise", "build", 2)
    for index in (0, 1):
        tree.step("optimise", index)
        seen.append(tree.fraction)
    tree.finish("optimise")
    seen.append(tree.fraction)
    tree.step("build", 1)
    seen.append(tree.fraction)
    tree.finish("build")
    seen.append(tree.fraction)

    assert seen == [0.375, 0.5, 0.5, 0.5, 1.0]


def test_the_command_builds_and_inspect_describes(bundle, vendor, capsys):
    flags = ["--builder", "tensorrt-rtx", "--target", "sm86,sm89", "--max-size", "32x24"]

    status = main(["build-engines", str(bundle), *flags, "--max-batch", "2"])

    out, err = capsys.readouterr()
    assert (status, out) == (0, f"{bundle}\n")
    assert [line.split()[0] for line in err.splitlines()] == NAMES
    description = inspect(bundle, {})
    assert [each["targets"] for each in description["engines"]] == [["sm86", "sm89"]] * len(NAMES)
    assert "unet for sm86, sm89: tensorrt_rtx 11.4.0.106" in readable(description)
    assert "latents 1x4x4x4 to 4x4x12x16" in readable(description)


def test_the_command_in_json_names_the_engines(bundle, vendor, capsys):
    flags = ["--builder", "tensorrt-rtx", "--target", "sm86", "--json", "--quiet"]

    assert main(["build-engines", str(bundle), *flags]) == 0

    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["bundle"], err) == (str(bundle), "")
    assert [each["component"] for each in report["engines"]] == [
        each["component"] for each in inspect(bundle, {})["engines"]
    ]
    assert all(each["targets"] == ["sm86"] for each in report["engines"])


@pytest.mark.parametrize("flags", [["--min-size", "big"], ["--max-size", "64x"]])
def test_a_size_that_is_none_is_bad_usage(flags, bundle, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["build-engines", str(bundle), *flags])

    assert "WIDTHxHEIGHT" in capsys.readouterr().err


def test_nothing_of_the_vendor_is_imported_before_it_is_asked_for():
    code = (
        "import sys, ldm_runtime.engines.store, ldm_runtime.cli\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )

    modules = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(engine_store.__file__).parents[2],
    ).stdout.split()

    assert {"tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "cuda"}.isdisjoint(modules)
