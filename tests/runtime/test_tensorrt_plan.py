import logging
from pathlib import Path

import numpy as np
import pytest

from ldm_runtime.backends.tensorrt.selection import (
    Machine,
    Place,
    Replay,
    check_inputs,
    choose_record,
    padded,
)
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.errors import BackendError, ShapeError
from tests.runtime.fake_gpu import GPU, VERSION, make_record

BUNDLE = Path("engines")
MACHINE = Machine(gpu=GPU, versions={"tensorrt_rtx": VERSION})


def place(manifest, trusts=lambda sha256: True):
    return Place(bundle=BUNDLE, manifest=manifest, trusts=trusts)


@pytest.fixture(scope="module")
def manifest(tiny_bundle):
    return load_manifest(tiny_bundle)


def refusal(manifest, machine=MACHINE, **changes):
    """The sentence about an engine of the UNet with these changes to its record."""
    with pytest.raises(BackendError) as caught:
        choose_record([make_record(manifest, "unet", **changes)], "unet", machine, place(manifest))
    return str(caught.value)


def test_an_engine_that_fits_is_chosen(manifest):
    record = make_record(manifest, "unet")

    chosen = choose_record(
        [make_record(manifest, "text_encoder"), record], "unet", MACHINE, place(manifest)
    )

    assert chosen is record


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"builder_version": "1.6.1.120"},
            "the unet engine was built by tensorrt_rtx 1.6.1.120, this machine has 1.7.1.116; "
            "run `ldm build-engines engines`",
        ),
        (
            {"builder": "tensorrt", "builder_version": "11.4.0.106"},
            "the unet engine was built by tensorrt 11.4.0.106, which is not installed; "
            "install the extra 'tensorrt' of ldm-deploy with `tensorrt-cu13==11.4.0.106`",
        ),
        (
            {"targets": ("sm86", "sm120")},
            "the unet engine was built for sm86, sm120, this GPU (NVIDIA Fake 4000) is sm89; "
            "run `ldm build-engines engines`",
        ),
        (
            {"gpu_name": "NVIDIA Fake 3000"},
            "the unet engine was built on NVIDIA Fake 3000, this GPU is NVIDIA Fake 4000; "
            "run `ldm build-engines engines`",
        ),
        (
            {"driver_version": "14.1"},
            "the unet engine was built with a driver for CUDA 14.1, "
            "the one here is for CUDA 13.0; run `ldm build-engines engines`",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_both_values_and_the_fix(
    manifest, changes, sentence
):
    assert refusal(manifest, **changes) == sentence


def test_an_engine_of_other_weights_or_of_another_graph_is_refused(manifest):
    weights = refusal(manifest, weights_sha256="0" * 64)
    graph = refusal(manifest, graph_sha256="1" * 64)

    hashes = {each.path: each.sha256[:12] for each in manifest.files}
    assert weights.startswith("the unet engine was built from weights 000000000000…, the bundle's ")
    assert hashes["unet/weights.bin"] in weights
    assert graph.startswith("the unet engine was built from the graph 111111111111…, the bundle ")
    assert hashes["unet/model.cpu.onnx"] in graph
    assert all(each.endswith("; run `ldm build-engines engines`") for each in (weights, graph))


def test_an_engine_for_every_gpu_of_a_compute_capability_runs_on_another_model(manifest):
    record = make_record(
        manifest, "unet", gpu_name="NVIDIA Fake 3000", flags=("SAME_COMPUTE_CAPABILITY",)
    )

    assert choose_record([record], "unet", MACHINE, place(manifest)) is record


def test_a_newer_driver_runs_what_an_older_one_built(manifest):
    record = make_record(manifest, "unet", driver_version="12.9")

    assert choose_record([record], "unet", MACHINE, place(manifest)) is record


def test_tensorrt_is_preferred_to_tensorrt_rtx(manifest):
    machine = Machine(gpu=GPU, versions={"tensorrt_rtx": VERSION, "tensorrt": "11.4.0.106"})
    rtx = make_record(manifest, "unet")
    trt = make_record(manifest, "unet", builder="tensorrt", builder_version="11.4.0.106")

    assert choose_record([rtx, trt], "unet", machine, place(manifest)) is trt


def test_of_several_engines_the_sentence_is_about_the_one_that_comes_closest(manifest):
    records = [
        make_record(manifest, "unet", weights_sha256="0" * 64),
        make_record(manifest, "unet", targets=("sm120",)),
        make_record(manifest, "unet", builder_version="1.6.1.120"),
    ]

    with pytest.raises(BackendError, match="was built for sm120"):
        choose_record(records, "unet", MACHINE, place(manifest))


def test_a_component_without_an_engine_names_the_command_that_builds_one(manifest):
    with pytest.raises(BackendError, match="no TensorRT engine for unet; run `ldm build-engines"):
        choose_record([], "unet", MACHINE, place(manifest))


def unet_inputs(*, batch=2, height=8, rows=None):
    return {
        "latents": np.zeros((batch, 4, height, 8), np.float32),
        "timesteps": np.zeros(batch, np.float32),
        "context": np.zeros((rows or batch, 16, 8), np.float32),
    }


def check(manifest, inputs):
    profiles = make_record(manifest, "unet").profiles
    check_inputs(manifest.component("unet"), profiles, inputs, BUNDLE)


@pytest.mark.parametrize("batch", [1, 8])
def test_the_ends_of_a_profile_belong_to_it(manifest, batch):
    check(manifest, unet_inputs(batch=batch, height=16))


@pytest.mark.parametrize("height", [3, 17])
def test_a_shape_outside_the_profile_names_the_range_and_how_to_widen_it(manifest, height):
    with pytest.raises(ShapeError) as caught:
        check(manifest, unet_inputs(height=height))

    assert str(caught.value) == (
        f"input 'latents' has shape 2x4x{height}x8, but this engine takes 1-8x4x4-16x4-16; "
        "run `ldm build-engines engines` with a wider --min-size, --max-size or --max-batch"
    )


def test_inputs_that_disagree_about_the_batch_are_refused(manifest):
    with pytest.raises(ShapeError, match=r"'context' has shape 1x16x8, but .* takes 2x16x8$"):
        check(manifest, unet_inputs(batch=2, rows=1))


def test_missing_unknown_and_mistyped_inputs_are_refused(manifest):
    inputs = unet_inputs()
    timesteps = inputs.pop("timesteps")

    with pytest.raises(BackendError, match="unet takes latents, timesteps, context; it was given"):
        check(manifest, inputs)
    with pytest.raises(BackendError, match="it was given"):
        check(manifest, {**inputs, "timesteps": timesteps, "extra": timesteps})
    with pytest.raises(BackendError, match="'timesteps' must be float32, is float64"):
        check(manifest, {**inputs, "timesteps": timesteps.astype(np.float64)})


@pytest.mark.parametrize(
    ("size", "reserved"), [(0, 256), (1, 256), (256, 256), (257, 512), (1000, 1024)]
)
def test_memory_is_reserved_in_whole_alignments(size, reserved):
    assert padded(size) == reserved


class Recorder:
    """Keeps what happens, in order."""

    def __init__(self, fails=False):
        self.events, self.fails = [], fails

    def record(self, work):
        if self.fails:
            raise BackendError("CUDA failed recording a graph")
        self.events.append("record")
        return self

    def launch(self):
        self.events.append("launch")

    def close(self):
        self.events.append("close")

    def work(self):
        self.events.append("work")


def test_a_shape_is_run_then_recorded_then_replayed():
    recorder = Recorder()
    replay = Replay(recorder.record)

    for _ in range(3):
        replay.enqueue((1, 2), recorder.work)

    assert recorder.events == ["work", "record", "launch", "launch"]


def test_a_changed_address_forgets_the_graph_and_starts_over():
    recorder = Recorder()
    replay = Replay(recorder.record)

    for addresses in ((1, 2), (1, 2), (1, 3), (1, 3)):
        replay.enqueue(addresses, recorder.work)

    assert recorder.events == ["work", "record", "launch", "close", "work", "record", "launch"]


def test_without_graphs_the_work_is_run_every_time():
    recorder = Recorder()
    replay = Replay(None)

    for _ in range(3):
        replay.enqueue((1, 2), recorder.work)

    assert recorder.events == ["work"] * 3


def test_what_cannot_be_recorded_is_run_instead_and_said_once(caplog):
    recorder = Recorder(fails=True)
    replay = Replay(recorder.record)

    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            replay.enqueue((1, 2), recorder.work)

    assert recorder.events == ["work"] * 4
    assert caplog.messages == ["CUDA failed recording a graph; running without CUDA graphs"]
