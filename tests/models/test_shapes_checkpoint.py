"""The checkpoint that comes along, through the whole path: export, engines, verify, images."""

from pathlib import Path

import pytest

from ldm_runtime import Generator
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.diagnostics.verify import verify
from ldm_runtime.engines.records import load_engine_records
from ldm_runtime.specs.model import components_of
from models.shapes.evaluation import held_out

CHECKPOINT = Path(__file__).parents[2] / "models/shapes/shapes.ckpt"

pytestmark = pytest.mark.slow


def test_the_checkpoint_is_small_enough_to_come_along():
    assert CHECKPOINT.stat().st_size <= 32_000_000


def test_its_engines_are_built_for_every_component(shapes_bundle):
    manifest = load_manifest(shapes_bundle)

    records = load_engine_records(shapes_bundle, manifest)

    assert {record.component for record in records} == components_of(manifest.spec).keys()
    assert all(record.size_bytes > 0 for record in records)


def test_its_bundle_keeps_every_promise(shapes_bundle):
    checks = list(verify(shapes_bundle, backend="onnxruntime"))

    assert [check for check in checks if not check.passed] == []
    assert any(check.measure == "psnr" for check in checks)


def test_it_generates_what_held_out_captions_say(shapes_bundle):
    wanted = held_out.held_out_scenes(12, held_out.SEED)

    with Generator(shapes_bundle) as generator:
        tally, _ = held_out.evaluate_bundle(generator, wanted, {"num_inference_steps": 25})

    assert tally.objects_right >= 0.8 * tally.objects
    assert tally.backgrounds_right >= 0.8 * tally.images
