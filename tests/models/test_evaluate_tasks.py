"""The evaluation: prompts are held out and the same every time, and so are their requests."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.errors import LdmError
from ldm_runtime.inputs.layouts import read_layout
from ldm_runtime.testing import tiny_spec
from models.shapes.catalog.models import MODELS
from models.shapes.data import scenes
from models.shapes.evaluation import tasks
from models.shapes.evaluation.scores import GOALS, enlarge, image_of

ALL = list(MODELS.values())
NAMES = list(MODELS)


class Painter:
    """A generator that paints the right image for whatever is asked, in order."""

    backend = "paint"

    def __init__(self, model, bundle, images):
        self.spec = tiny_spec(model.task)
        self.bundle = bundle
        self.bundle_sha256 = sha256_of(bundle / "manifest.json")
        self.images = iter(images)
        self.seeds = []

    def __call__(self, *, seed, **_fields):
        self.seeds.append(seed)
        return SimpleNamespace(images=[Image.fromarray(next(self.images))])


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("model", ALL, ids=NAMES)
def test_prompts_are_held_out_and_the_same_every_time(model):
    asked, again = (tasks.held_out_prompts(model, 5, tasks.SEED) for _ in range(2))

    if model.most_things > 1:
        assert all(scenes.is_held_out(scenes.caption(each.scene)) for each in asked)
    assert all(len(each.scene.things) <= model.most_things for each in asked)
    assert [each.scene for each in asked] == [each.scene for each in again]
    assert all((each.mask is not None) == (model.task == "inpainting") for each in asked)


def test_nearly_all_classes_are_asked_for():
    asked = tasks.held_out_prompts(MODELS["class_to_image"], 100, tasks.SEED)

    labels = {tasks.FIELDS["class-to-image"](each)["class_label"] for each in asked}

    assert len(labels) >= 22


def test_a_layout_is_asked_for_as_a_request_spells_it():
    (asked,) = tasks.held_out_prompts(MODELS["layout_to_image"], 1, tasks.SEED)

    objects = read_layout(tasks.FIELDS["layout-to-image"](asked)["layout"])

    assert len(objects) == len(asked.scene.things)


def test_an_image_with_a_mask_has_it_where_the_mask_is_white():
    (asked,) = tasks.held_out_prompts(MODELS["inpainting"], 1, tasks.SEED)

    fields = tasks.FIELDS["inpainting"](asked)

    assert (fields["mask_image"] == 255).tolist() == asked.mask.tolist()
    np.testing.assert_array_equal(fields["image"], asked.truth)


def test_settings_are_the_bundles_defaults_and_guidance_where_there_is_a_null_condition():
    spec = tiny_spec("text-to-image")

    assert tasks.settings_of(spec, None) == {
        "sampler": "ddim",
        "num_inference_steps": 4,
        "eta": 0.0,
        "guidance_scale": 3.0,
    }
    assert tasks.settings_of(spec, 9)["num_inference_steps"] == 9
    assert "guidance_scale" not in tasks.settings_of(tiny_spec("unconditional"), None)


@pytest.mark.parametrize("model", ALL, ids=NAMES)
def test_a_perfect_painter_reaches_every_goal(model, bundle):
    asked = tasks.held_out_prompts(model, 4, tasks.SEED)
    painter = Painter(model, bundle, [each.truth for each in asked])

    row, images = tasks.evaluate(painter, model, 4, steps=3)

    assert painter.seeds == [tasks.SEED + index for index in range(4)]
    assert len(images) == len(row.seconds) == 4
    assert all(row.scores[name] >= goal for name, goal in GOALS[model.task].items())
    assert "missed" not in tasks.table(row)


def test_a_painter_of_blurs_misses_a_goal_and_the_table_says_so(bundle):
    model = MODELS["super_resolution"]
    asked = tasks.held_out_prompts(model, 4, tasks.SEED)
    blurred = [enlarge(each.truth[::4, ::4]) for each in asked]

    row, _ = tasks.evaluate(Painter(model, bundle, blurred), model, 4, steps=3)

    assert row.scores["gain"] < 2
    assert "missed" in tasks.table(row)


def test_worse_images_are_farther_from_held_out_ones_than_held_out_ones_are():
    model = MODELS["unconditional"]
    images = [each.truth for each in tasks.held_out_prompts(model, 64, tasks.SEED + 9)]

    found = tasks.distances_of(model, images)

    assert found["worse"] > 2 * found["floor"]
    assert found["worse"] > 2 * found["generated"]


def test_the_bundle_of_another_task_is_refused(bundle):
    painter = Painter(MODELS["inpainting"], bundle, [])

    with pytest.raises(LdmError, match=r"is inpainting, but class_to_image is class-to-image"):
        tasks.evaluate(painter, MODELS["class_to_image"], 4, steps=3)


def test_rows_come_back_from_the_results_file(bundle, tmp_path):
    model = MODELS["class_to_image"]
    asked = tasks.held_out_prompts(model, 2, tasks.SEED)
    painter = Painter(model, bundle, [each.truth for each in asked])
    row, _ = tasks.evaluate(painter, model, 2, steps=3)
    path = tmp_path / "results/rows.jsonl"

    tasks.append_row(path, row)
    tasks.append_row(path, row)

    found = list(tasks.read_rows(path))
    assert [each.scores for each in found] == [dict(row.scores)] * 2
    assert found[0].settings == row.settings


def test_a_line_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"name": 3}\n')

    with pytest.raises(LdmError, match=r"rows\.jsonl:1 is no model's row .*; remove it"):
        list(tasks.read_rows(path))


def test_a_sheet_has_whole_rows_of_images():
    asked = tasks.held_out_prompts(MODELS["class_to_image"], 7, tasks.SEED)
    images = [image_of(each.scene) for each in asked]

    whole = tasks.sheet(images, columns=3)

    assert whole.shape == (2 * 64, 3 * 64, 3)
    np.testing.assert_array_equal(whole[64:, 64:128], images[4])
