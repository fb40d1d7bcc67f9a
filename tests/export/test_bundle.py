import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from ldm_export import export
from ldm_export.bundle import estimate_export, export_bundle
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import CheckpointError, ExportError, WeightsError
from ldm_export.golden.preview import fit_preview
from ldm_export.source import ExportOptions
from ldm_runtime.bundle.files import check_file, sha256_of
from ldm_runtime.bundle.manifest import SCHEMA_VERSION, load_manifest
from ldm_runtime.diagnostics.verify import verify
from ldm_runtime.errors import ManifestError
from ldm_runtime.specs.model import components_of
from tests.export.small_checkpoint import SIZE, random_networks, write_checkpoint

OVERRIDES = Overrides(height=SIZE, width=SIZE)
COMPONENTS_OF_SD = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


class Outcomes:
    """A `Progress` that keeps what became of each stage."""

    def __init__(self):
        self.planned, self.of = {}, {}

    def plan(self, seconds):
        self.planned = dict(seconds)

    def begin(self, step):
        pass

    def end(self, step, outcome):
        self.of[step] = outcome


def options(checkpoint, out, **changes):
    return ExportOptions(checkpoint=checkpoint, out=out, **({"overrides": OVERRIDES} | changes))


def files_of(bundle):
    return {
        path.relative_to(bundle).as_posix(): path.read_bytes()
        for path in bundle.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def bundle_copy(small_bundle_fp16, tmp_path):
    """A bundle that may be changed."""
    return shutil.copytree(small_bundle_fp16, tmp_path / "engines")


@pytest.fixture(params=["float16", "float32"])
def bundle(request):
    width = request.param.removeprefix("float")
    return request.getfixturevalue(f"small_bundle_fp{width}"), request.param


@pytest.mark.slow
def test_every_file_is_listed_with_its_hash_and_size(bundle):
    folder, _ = bundle
    manifest = load_manifest(folder)

    for record in manifest.files:
        check_file(folder, record)
    assert {record.path for record in manifest.files} == set(files_of(folder)) - {"manifest.json"}
    assert "golden/sheet.png" in files_of(folder)
    assert not folder.with_name(folder.name + ".partial").exists()


@pytest.mark.slow
def test_every_component_has_both_graphs_and_what_was_measured(bundle):
    folder, dtype = bundle
    manifest = load_manifest(folder)

    assert manifest.weights_dtype == dtype
    assert [each.name for each in manifest.components] == list(components_of(manifest.spec))
    for each in manifest.components:
        assert {graph.variant for graph in each.graphs} == {"fp16", "fp32"}
        assert {record.batch for record in each.parity} == {1, 3}
        lengths = {record.context_tokens for record in each.parity}
        assert lengths == ({77, 154} if each.name == "unet" else {0})
        assert {(r.variant, r.reference) for r in each.parity} == {
            ("fp32", "stored"),
            ("fp32", "checkpoint"),
            ("fp16", "checkpoint"),
        }
        assert (folder / each.weights_file).stat().st_size > 0


@pytest.mark.slow
def test_the_preview_is_fitted_to_the_pairs_that_the_bundle_keeps(bundle):
    folder, _ = bundle

    preview = load_manifest(folder).preview

    assert preview == fit_preview(folder / "vae_encoder/preview.npz")
    assert all(len(row) == 4 for row in preview.matrix)
    assert preview.r2 <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("kept_traces")
def test_an_old_bundle_is_replaced_by_a_whole_new_one(
    bundle_copy, small_checkpoint_path, small_bundle_fp16
):
    path = bundle_copy / "manifest.json"
    number = f'"schema_version": {SCHEMA_VERSION}'
    assert number in path.read_text()
    path.write_text(path.read_text().replace(number, '"schema_version": 1'))
    with pytest.raises(ManifestError, match="schema 1 of an older ldm-export"):
        load_manifest(bundle_copy)
    outcomes = Outcomes()

    export_bundle(options(small_checkpoint_path, bundle_copy), progress=outcomes)

    assert set(outcomes.of.values()) == {"built"}
    assert load_manifest(bundle_copy).preview == load_manifest(small_bundle_fp16).preview


@pytest.mark.slow
def test_how_the_bundle_was_built_is_recorded(small_bundle_fp16, small_checkpoint_path):
    build = load_manifest(small_bundle_fp16).build

    assert build.checkpoint == small_checkpoint_path.name
    assert build.checkpoint_sha256 == sha256_of(small_checkpoint_path)
    assert {"torch", "onnxruntime", "python"} <= build.versions.keys()
    assert build.seconds > 0


@pytest.mark.slow
def test_weights_are_stored_once_in_the_type_that_was_asked_for(
    small_bundle_fp16, small_bundle_fp32
):
    sizes = [
        (folder / "unet/weights.bin").stat().st_size
        for folder in (small_bundle_fp16, small_bundle_fp32)
    ]
    parameters = sum(value.numel() for value in random_networks().unet.parameters())

    assert 2 * parameters <= sizes[0] < sizes[1]
    assert 4 * parameters <= sizes[1]


@pytest.mark.slow
def test_a_bundle_keeps_its_promises_without_torch(bundle):
    folder, _ = bundle

    checks = list(verify(folder, backend="onnxruntime"))

    assert {check.measure for check in checks} >= {"psnr", "relative_l2", "max_relative_error"}
    assert [check for check in checks if not check.passed] == []


@pytest.mark.slow
def test_an_equal_export_reuses_everything(bundle_copy, small_checkpoint_path):
    outcomes = Outcomes()
    before = files_of(bundle_copy)

    export_bundle(options(small_checkpoint_path, bundle_copy), progress=outcomes)

    assert {name for name, outcome in outcomes.of.items() if outcome == "reused"} == {
        *COMPONENTS_OF_SD,
        "prediction",
        "golden",
    }
    assert sum(outcomes.planned.values()) < 1
    after = files_of(bundle_copy)
    assert {k: v for k, v in after.items() if k != "manifest.json"} == {
        k: v for k, v in before.items() if k != "manifest.json"
    }


@pytest.mark.slow
def test_another_default_size_redraws_golden_outputs_but_keeps_the_networks(
    bundle_copy, small_checkpoint_path
):
    outcomes = Outcomes()
    smaller = Overrides(height=32, width=SIZE)

    manifest = export_bundle(
        options(small_checkpoint_path, bundle_copy, overrides=smaller), progress=outcomes
    )

    assert {name for name, outcome in outcomes.of.items() if outcome == "reused"} == {
        *COMPONENTS_OF_SD,
        "prediction",
    }
    assert manifest.spec.defaults.height == 32
    assert load_manifest(bundle_copy) == manifest


class BegunError(Exception):
    """Work on disk would begin."""


def begin(label):
    raise BegunError(label)


@pytest.mark.slow
def test_the_bundle_of_another_checkpoint_is_replaced_only_on_request(bundle_copy, tmp_path):
    other = write_checkpoint(tmp_path / "tuned.ckpt", random_networks(seed=1))
    words = r"another checkpoint, small\.ckpt .*, not of tuned\.ckpt .*; add --replace"

    with pytest.raises(ExportError, match=words):
        export_bundle(options(other, bundle_copy), on_write=begin)
    with pytest.raises(ExportError, match=words):
        export(other, bundle_copy, overrides=OVERRIDES)
    with pytest.raises(BegunError):
        export_bundle(options(other, bundle_copy, replace=True), on_write=begin)


@pytest.mark.slow
def test_an_estimate_says_what_becomes_of_the_bundle_in_its_place(
    bundle_copy, small_checkpoint_path, tmp_path
):
    other = write_checkpoint(tmp_path / "tuned.ckpt", random_networks(seed=1))
    smaller = Overrides(height=32, width=SIZE)

    same = estimate_export(options(small_checkpoint_path, bundle_copy))
    stale = estimate_export(options(small_checkpoint_path, bundle_copy, overrides=smaller))
    foreign = estimate_export(options(other, bundle_copy))

    assert same.describe().endswith("nothing to do     the bundle is up to date")
    assert sum(same.step_seconds.values()) == 0
    assert stale.describe().endswith("bundle of the same checkpoint; new: golden")
    assert foreign.describe().endswith("another checkpoint, small.ckpt: add --replace")
    assert sum(foreign.step_seconds.values()) > 30


@pytest.mark.slow
def test_one_altered_component_alone_is_built_again(bundle_copy, small_checkpoint_path):
    weights = bundle_copy / "text_encoder/weights.bin"
    original = weights.read_bytes()
    weights.write_bytes(b"\0" + original[1:])
    outcomes = Outcomes()

    export_bundle(options(small_checkpoint_path, bundle_copy), progress=outcomes)

    built = {name for name, outcome in outcomes.of.items() if outcome == "built"}
    assert built == {"tokenizer", "text_encoder", "preview"}  # the preview is fitted every time
    assert weights.read_bytes() == original


@pytest.mark.slow
@pytest.mark.usefixtures("kept_traces")
def test_a_killed_export_goes_on_where_it_was(small_checkpoint_path, small_bundle_fp16, tmp_path):
    out = tmp_path / "engines"
    arguments = ["--ckpt", small_checkpoint_path, "--out", out, "--height", SIZE, "--width", SIZE]
    with subprocess.Popen(
        [sys.executable, "-m", "ldm_export.cli", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stderr:
            if line.startswith("text_encoder"):
                os.kill(process.pid, signal.SIGKILL)
                break
    assert not out.exists()
    outcomes = Outcomes()

    export_bundle(options(small_checkpoint_path, out), progress=outcomes)

    assert process.returncode == -signal.SIGKILL
    assert outcomes.of["tokenizer"] == outcomes.of["text_encoder"] == "reused"
    assert outcomes.of["unet"] == "built"
    assert files_of(out).keys() == files_of(small_bundle_fp16).keys()
    for name in COMPONENTS_OF_SD:
        theirs = small_bundle_fp16 / name / "weights.bin"
        assert (out / name / "weights.bin").read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_the_golden_outputs_of_components_are_torchs_own(small_bundle_fp16):
    from ldm_export.graphs.torch_engine import TorchEngine

    for name, network in vars(random_networks()).items():
        with np.load(small_bundle_fp16 / f"golden/components/{name}.npz") as file:
            arrays = dict(file)
        inputs = {key[3:]: array for key, array in arrays.items() if key.startswith("in.")}

        ((output, array),) = TorchEngine(name, network).run(inputs).items()

        np.testing.assert_allclose(arrays[f"out.{output}"], array, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ema", "flag", "used"), [(True, None, "model"), (False, None, "model"), (True, "ema", "ema")]
)
def test_which_of_the_two_sets_of_weights_was_used_is_recorded(tmp_path, ema, flag, used):
    checkpoint = write_checkpoint(tmp_path / "small.ckpt", random_networks(), ema=ema)
    overrides = Overrides(height=SIZE, width=SIZE, weights=flag)

    plan = estimate_export(options(checkpoint, tmp_path / "engines", overrides=overrides))

    assert plan.spec.weights == used
    assert f"({used} weights)" in plan.describe()


CONFIG = "model:\n  params:\n    scale_factor: {}\n"


@pytest.mark.parametrize("name", ["small.yaml", "config.yaml"])
def test_a_configuration_beside_the_checkpoint_is_read(tmp_path, small_checkpoint_path, name):
    checkpoint = shutil.copy(small_checkpoint_path, tmp_path / "small.ckpt")
    (tmp_path / name).write_text(CONFIG.format(0.25))

    plan = estimate_export(options(checkpoint, tmp_path / "engines"))

    assert plan.spec.autoencoder.latent_scale_factor == 0.25
    sources = {each.field: each.source for each in plan.spec.assumptions}
    assert sources["autoencoder.latent_scale_factor"] == "config"


def test_a_configuration_that_is_given_wins_over_the_one_beside_it(tmp_path, small_checkpoint_path):
    checkpoint = shutil.copy(small_checkpoint_path, tmp_path / "small.ckpt")
    (tmp_path / "config.yaml").write_text(CONFIG.format(0.25))
    (tmp_path / "mine.yaml").write_text(CONFIG.format(0.5))

    plan = estimate_export(options(checkpoint, tmp_path / "engines", config=tmp_path / "mine.yaml"))

    assert plan.spec.autoencoder.latent_scale_factor == 0.5


def test_a_plan_writes_nothing(tmp_path, small_checkpoint_path):
    estimate_export(options(small_checkpoint_path, tmp_path / "engines"))

    assert list(tmp_path.iterdir()) == []


LOST, STRAY = "first_stage_model.decoder.mid.block_1.conv1.weight", "model.diffusion_model.out.7.x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({LOST: None}, r"vae_decoder; missing: decoder\.mid\.block_1\.conv1\.weight"),
        ({LOST: torch.zeros(2, 2, 3, 3)}, r"of another shape: .*conv1\.weight \(\(2, 2, 3, 3\)"),
        ({STRAY: torch.zeros(1)}, r"the unet; not part of it: out\.7\.x"),
    ],
)
@pytest.mark.parametrize("begin", [estimate_export, export_bundle])
def test_weights_that_do_not_fit_are_named_before_anything_is_written(
    tmp_path, small_checkpoint_path, change, message, begin
):
    state = torch.load(small_checkpoint_path, weights_only=True)["state_dict"] | change
    spoilt = tmp_path / "spoilt.ckpt"
    torch.save({"state_dict": {k: v for k, v in state.items() if v is not None}}, spoilt)

    with pytest.raises(WeightsError, match=message):
        begin(options(spoilt, tmp_path / "engines"))

    assert list(tmp_path.iterdir()) == [spoilt]


def test_a_type_that_is_not_stored_is_an_error(tmp_path, small_checkpoint_path):
    with pytest.raises(ExportError, match="'fp16'; use 'float16' or 'float32'"):
        export(small_checkpoint_path, tmp_path / "engines", weights_dtype="fp16")

    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_not_finite_becomes_no_bundle(tmp_path):
    networks = random_networks()
    networks.text_encoder.text_model.final_layer_norm.bias[3] = float("nan")
    checkpoint = write_checkpoint(tmp_path / "broken.ckpt", networks)

    with pytest.raises(WeightsError, match=r"final_layer_norm\.bias.*not finite"):
        export_bundle(options(checkpoint, tmp_path / "engines"))

    assert not (tmp_path / "engines").exists()


@pytest.mark.slow
def test_a_checkpoint_that_changes_meanwhile_is_noticed(
    bundle_copy, small_checkpoint_path, tmp_path
):
    checkpoint = shutil.copy(small_checkpoint_path, tmp_path / "small.ckpt")
    before = load_manifest(bundle_copy)

    def overwrite(label):
        if label == "prepare":
            with checkpoint.open("ab") as file:
                file.write(b"more")

    with pytest.raises(CheckpointError, match="changed while it was being exported"):
        export_bundle(options(checkpoint, bundle_copy), on_write=overwrite)

    assert load_manifest(bundle_copy) == before
