"""The benchmarks' own logic, and one short run of `latency.py`."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import export_full_size
import latency
from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.detection.detect import detect
from ldm_export.detection.overrides import Overrides
from ldm_export.networks.loading import build_network, load_network
from ldm_runtime.benchmark import runs
from ldm_runtime.benchmark.ceilings import Ceilings
from ldm_runtime.benchmark.children import run_child
from ldm_runtime.benchmark.process import Findings
from ldm_runtime.benchmark.report import summed
from ldm_runtime.benchmark.runs import Configuration
from ldm_runtime.benchmark.subject import open_subject
from ldm_runtime.benchmark.work import Work, network_work
from ldm_runtime.errors import BackendError, LdmError
from ldm_runtime.testing import TINY_SPEC, write_tiny_bundle
from measuring.rows import ROOT, Row, as_line, commit
from measuring.shapes_bundle import exported_bundle
from tests.export import small_checkpoint

SMALL_SPEC = TINY_SPEC.with_networks(
    unet=replace(
        small_checkpoint.UNET, channel_mult=(1, 2, 3), transformer_depth=(0, 1, 2), in_channels=5
    ),
    autoencoder=replace(
        small_checkpoint.AUTOENCODER, attention_levels=(1,), z_channels=6, num_res_blocks=2
    ),
    text_encoder=replace(small_checkpoint.TEXT_ENCODER, vocab_size=100),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latency") / "engines"
    write_tiny_bundle(folder)
    return folder


def row(*seconds, **changes):
    blank = Row(
        name="unet",
        backend="onnxruntime",
        commit="0123abc",
        bundle_sha256="00",
        device="a machine",
        settings={"state": "steady", "calls": 1},
        seconds=seconds,
    )
    return replace(blank, **changes)


def run_latency(*arguments, python=(), status=0):
    done = subprocess.run(
        [sys.executable, *python, str(ROOT / "benchmarks/latency.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": "" if python else str(ROOT)},
    )
    assert done.returncode == status, done.stderr
    return done


def test_a_row_keeps_every_repetition_and_derives_the_median():
    kept = json.loads(as_line(row(3.0, 1.0, 2.0).as_dict()))

    assert kept["seconds"] == [3.0, 1.0, 2.0]
    assert kept["median_seconds"] == 2.0


@pytest.mark.parametrize(("slowest", "stable"), [(1.09, True), (1.11, False)])
def test_a_row_is_stable_if_its_slowest_repetition_is_within_a_tenth(slowest, stable):
    assert row(0.5, 1.0, slowest).is_stable is stable


def test_small_and_large_numbers_keep_six_digits_in_a_line():
    line = as_line({"seconds": (1.23456789e-9, 123456.789)})

    assert json.loads(line) == {"seconds": [1.23457e-9, 123457.0]}


def text_inputs(encoder, rows):
    """Return token ids, and embeddings in the place of none of them."""
    shape = rows, encoder.max_tokens
    return (
        torch.zeros(shape, dtype=torch.int64, device="meta"),
        torch.zeros((*shape, encoder.width), device="meta"),
    )


def inputs_of(component, rows, height, width, spec):
    tokens = spec.networks["text_encoder"].max_tokens
    context = torch.zeros(rows, tokens, spec.unet.context_dim, device="meta")
    latents = torch.zeros(rows, spec.unet.in_channels, height, width, device="meta")
    return {
        "text_encoder": text_inputs(spec.networks["text_encoder"], rows),
        "unet": (latents, torch.zeros(rows, device="meta"), context),
        "vae_decoder": (latents[:, : spec.autoencoder.embed_dim],),
    }[component]


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
@pytest.mark.parametrize("linear", [False, True])
def test_the_work_of_a_network_is_what_torch_counts(component, linear):
    spec = SMALL_SPEC.with_networks(unet=replace(SMALL_SPEC.unet, linear_projection=linear))
    network = build_network(component, spec)
    images, rows = 2, 4
    batch = {"text_encoder": rows // images, "unet": rows, "vae_decoder": images}[component]

    work = network_work(spec, 8, 12, images, rows)[component]

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(*inputs_of(component, batch, 8, 12, spec))
    assert work.flops == counter.get_total_flops()
    assert work.parameters == sum(each.numel() for each in network.parameters())


@pytest.mark.parametrize("middle_depth", [None, 0, 3])
def test_the_work_of_a_unet_that_lost_blocks_is_what_torch_counts(middle_depth):
    unet = replace(
        SMALL_SPEC.unet,
        num_res_blocks=(1, 2, 1),
        transformer_depth=(0, (2, 1), 1),
        output_depth=(0, (1, 3, 2), (1, 0)),
        middle_depth=middle_depth,
    )
    spec = SMALL_SPEC.with_networks(unet=unet)
    network = build_network("unet", spec)

    work = network_work(spec, 8, 12, images=1, rows=1)["unet"]

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(*inputs_of("unet", 1, 8, 12, spec))
    assert work.flops == counter.get_total_flops()
    assert work.parameters == sum(each.numel() for each in network.parameters())


def test_the_work_of_sdxl_is_that_of_its_parameters_in_use():
    """CLIP's last layer and final LayerNorm are not in use, and the vector passes two layers."""
    clip = replace(
        SMALL_SPEC.networks["text_encoder"], num_layers=3, context_layers=2, final_norm=False
    )
    openclip = replace(clip, kind="openclip", activation="gelu", pooled_dim=48)
    unet = replace(SMALL_SPEC.unet, vector_dim=48 + 6 * 256)
    spec = SMALL_SPEC.with_networks(text_encoder=clip, text_encoder_2=openclip, unet=unet)
    images, rows = 2, 4

    work = network_work(spec, 8, 12, images, rows)

    assert list(work) == ["text_encoder", "text_encoder_2", "unet", "vae_decoder"]
    vector = torch.zeros(rows, unet.vector_dim, device="meta")
    inputs = {
        "text_encoder": text_inputs(clip, rows // images),
        "text_encoder_2": text_inputs(openclip, rows // images),
        "unet": (*inputs_of("unet", rows, 8, 12, spec), vector),
    }
    for component, given in inputs.items():
        network = build_network(component, spec).requires_grad_()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            outputs = network(*given)
        assert work[component].flops == counter.get_total_flops(), component
        assert work[component].parameters == parameters_in_use(network, outputs), component


def parameters_in_use(network, outputs):
    several = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(each.sum() for each in several).backward()
    return sum(each.numel() for each in network.parameters() if each.grad is not None)


def test_the_work_of_a_unet_that_takes_the_guidance_scale_is_what_torch_counts():
    unet = replace(SMALL_SPEC.unet, guidance_dim=16)
    network = build_network("unet", spec := SMALL_SPEC.with_networks(unet=unet))

    work = network_work(spec, 8, 12, images=1, rows=1)["unet"]

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(*inputs_of("unet", 1, 8, 12, spec), guidance=torch.zeros(1, 16, device="meta"))
    assert work.flops == counter.get_total_flops()
    assert work.parameters == sum(each.numel() for each in network.parameters())


def test_the_parts_of_an_image_add_up_in_the_line_of_json(bundle):
    arguments = ("--bundle", bundle, "--repetitions", 2, "--steps", 3, "--size", "24x16")

    done = run_latency(*arguments, "--batch", 2, "--json")

    (line,) = done.stdout.splitlines()
    assert "import + load + first image" in done.stderr
    kept = json.loads(line)
    assert kept["benchmark"] == "latency"
    assert kept["commit"] == commit()
    steady = {each["name"]: each for each in kept["rows"] if each["settings"]["state"] == "steady"}
    first = {each["name"]: each for each in kept["rows"] if each["settings"]["state"] == "first"}
    assert steady.keys() == {"load", "text_encoder", "unet", "vae_decoder", "image", "rest"}
    assert first.keys() == steady.keys() | {"import", "cold_start"}
    assert steady["unet"]["settings"].items() >= {"calls": 3, "unet_rows": 4, "width": 24}.items()
    assert steady["image"]["peak_bytes"] > 10_000_000
    for repetition in range(2):
        parts = [steady[name] for name in ("text_encoder", "unet", "vae_decoder")]
        network = sum(part["settings"]["calls"] * part["seconds"][repetition] for part in parts)
        rest = steady["rest"]["seconds"][repetition]
        assert rest > 0
        assert network + rest == pytest.approx(steady["image"]["seconds"][repetition], rel=1e-4)


def test_the_table_adds_the_parts_of_the_median_image_up():
    steady = {
        "text_encoder": row(0.001, 0.002, 0.009),
        "unet": row(0.020, 0.030, 0.040, settings={"calls": 2}),
        "rest": row(0.003, 0.004, 0.005),
        "image": row(0.044, 0.066, 0.094),
        "load": row(1.0, 1.0, 1.0),
    }

    line = summed(steady)

    assert line == (
        "66 ms = text_encoder 2 ms + 2 calls of unet 60 ms + sampler, tokenizer and Python 4 ms"
    )


def test_without_the_package_installed_the_error_says_how_to_install_it():
    done = run_latency(python=("-S",), status=1)

    assert done.stderr.startswith("error: the package 'ldm_runtime' is not installed; run `pip ")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--bundle", "/nowhere"), 1, "/nowhere/manifest.json not found"),
        (("--steps", "0"), 2, "must be a whole number from 1"),
        (("--size", "63"), 1, "is not a multiple"),
        (("--size", "64x"), 2, "must be WIDTHxHEIGHT pixels, got '64x'"),
        (("--backend", "abacus"), 2, "unknown backend 'abacus'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    arguments, status, message, bundle, capsys
):
    if "--bundle" not in arguments:
        arguments = ("--bundle", str(bundle), *arguments)

    try:
        code = latency.main(arguments)
    except SystemExit as error:
        code = error.code

    assert code == status
    assert message in capsys.readouterr().err


def test_a_process_that_loads_torch_is_no_measurement(bundle, monkeypatch):
    subject = open_subject(bundle)
    loaded = Findings(
        first={}, steady={}, calls={}, peak_bytes=1, version="1", precision="fp32", heavy=["torch"]
    )
    answer = json.dumps(vars(loaded))
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, answer, "")
    )

    with pytest.raises(LdmError, match="loaded torch"):
        list(runs.find(subject, [Configuration(backend="onnxruntime")], 1))


def test_a_failing_process_gives_its_reason(bundle):
    subject = replace(open_subject(bundle), bundle=Path("/nowhere"))

    with pytest.raises(LdmError, match=r"onnxruntime failed: /nowhere/manifest\.json not"):
        list(runs.find(subject, [Configuration(backend="onnxruntime")], 1))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.kill(os.getpid(), 9)", "failed: killed by signal 9, perhaps out of memory$"),
        ("os.abort()", "failed: killed by signal 6"),
        ("os._exit(3)", "failed: exit status 3$"),
    ],
)
def test_a_process_that_dies_in_silence_is_said_to_have_died(code, reason, tmp_path):
    path = tmp_path / "child.py"
    path.write_text(f"import os\n{code}\n")

    with pytest.raises(LdmError, match=reason):
        run_child("measuring", str(path))


WORK = Work(parameters=10**6, flops=2 * 10**9)
CEILINGS = Ceilings(matmul_flops=10**11, copy_bytes=10**10, threads=2)


@pytest.mark.parametrize(
    ("backend", "precision", "name", "expected"),
    [
        ("onnxruntime", "fp32", "unet", (0.2, 0.004)),
        ("openvino", "bf16", "unet", (None, 0.002)),
        ("openvino", "int8", "unet", (None, 0.001)),
        ("openvino", "int8", "unet_shallow", (None, 0.001)),
        ("openvino", "int8", "vae_decoder", (None, None)),
        ("tensorrt", "fp16", "unet", (None, None)),
        ("cuda", "fp16", "unet", (None, None)),
    ],
)
def test_a_row_is_measured_against_the_ceilings_that_are_its_own(
    backend, precision, name, expected
):
    measured = row(0.1, name=name, backend=backend, settings={"precision": precision})

    assert runs.shares(WORK, measured, CEILINGS) == pytest.approx(expected)


def test_a_backend_that_was_asked_for_and_cannot_run_is_an_error(bundle):
    subject = open_subject(bundle)

    with pytest.raises(BackendError, match="unknown backend"):
        runs.runnable_configurations(["onnxruntime", "abacus"], subject)


def test_the_cached_bundle_is_reused_while_the_checkpoint_is_absent(bundle, tmp_path):
    assert exported_bundle(tmp_path / "absent.ckpt", bundle) == bundle


def test_another_models_bundle_in_the_cache_is_left_alone(bundle, tmp_path):
    checkpoint = tmp_path / "shapes.ckpt"
    checkpoint.write_bytes(b"a checkpoint")

    with pytest.raises(LdmError, match=r"was made from tiny, not from shapes\.ckpt"):
        exported_bundle(checkpoint, bundle)


def test_without_bundle_and_checkpoint_the_error_names_what_to_give(tmp_path):
    with pytest.raises(LdmError, match="give --bundle"):
        exported_bundle(tmp_path / "absent.ckpt", tmp_path / "engines")


def test_the_steps_of_an_export_add_up_to_its_time():
    arrivals = [
        (2.0, "about 40 s to go"),
        (2.5, "tokenizer      built in 0.1 s"),
        (12.5, "unet           built in 9.9 s"),
        (13.0, "reading something"),
    ]

    steps = export_full_size.step_seconds(arrivals, 15.0)

    assert steps["unet"] == 9.9
    assert steps["start, read, hash"] == pytest.approx(2.4)
    assert sum(steps.values()) == pytest.approx(15.0)


@pytest.mark.parametrize("half", [True, False])
def test_the_random_checkpoint_is_a_model_without_layers_at_zero(half, tmp_path):
    model = export_full_size.tiny(export_full_size.stable_diffusion_1())
    encoder = replace(model.networks["text_encoder"], num_layers=1)
    model = replace(model, half=half, networks=model.networks.changed(text_encoder=encoder))
    path = tmp_path / "random.ckpt"

    export_full_size.write_checkpoint(path, model)

    with open_checkpoint(path) as checkpoint:
        detection = detect(checkpoint.tensors, config=None, overrides=Overrides())
        late = checkpoint.tensors["model.diffusion_model.out.2.weight"]
        assert detection.spec.family == "stable-diffusion-1"
        assert late.dtype == ("float16" if half else "float32")
        assert late.numpy().std() > 0.01
        assert checkpoint.tensors["alphas_cumprod"].dtype == "float32"
        names = detection.weights["vae_decoder"]
        weights = {name: checkpoint.tensors[stored] for name, stored in names.items()}
        decoder = load_network("vae_decoder", detection.spec, weights)
        image = decoder(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert 0.1 < image.std() < 3
