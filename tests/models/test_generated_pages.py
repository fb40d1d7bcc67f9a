"""The pages of measured rows are those of the rows in the repository."""

from pathlib import Path

import pytest

from ldm_export.intake.opening import open_model
from ldm_export.source import ExportOptions, open_source
from measuring.rows import read_records
from models.shapes.catalog.variants import VARIANTS
from scripts import families_page, released_page, serving_figures, trained_page
from tests.reference.family_comparison import BOUNDS, CODEBOOK_BOUND

MODELS = Path(__file__).parents[2] / "models/shapes"


@pytest.mark.parametrize("script", [families_page, released_page, serving_figures, trained_page])
def test_the_committed_page_is_up_to_date(script):
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run `make docs`"


def test_every_family_that_is_exported_is_compared_with_a_reference():
    """A new family comes with a test that calls `compare`, and with its row."""
    lowest = families_page.lowest_psnr(read_records(families_page.ROWS))

    assert lowest.keys() == families_page.groups().keys()
    for family, psnr in lowest.items():
        has_codebook = family.startswith(("ldm-", "autoencoder-vq"))
        bounds = BOUNDS | ({"fp16": CODEBOOK_BOUND} if has_codebook else {})
        assert "torch" in psnr, family
        assert all(value >= bounds[name] for name, value in psnr.items()), family


def test_families_that_differ_in_sizes_alone_share_a_line():
    groups = families_page.groups()

    assert groups["ldm-class"] == ["ldm-cin256", "ldm-class"]
    assert groups["autoencoder-kl"][-1] == "ldm-kl-f32"
    assert groups["ssd-1b"] == ["ssd-1b"]


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.ckpt")), ids=lambda path: path.stem)
def test_a_trained_model_is_on_the_line_of_its_family(path):
    shapes = dict.fromkeys(("vae", "text_encoder"), MODELS / "shapes.ckpt")
    parts = shapes if path.stem in VARIANTS else {}
    with open_model(path, **parts) as checkpoint:
        options = ExportOptions(checkpoint=path, out=path, **parts)
        family = open_source(options, checkpoint, hashed=False).spec.family

    assert path.stem in families_page.TRAINED[family]
