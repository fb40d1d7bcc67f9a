"""The exam: what is asked is held out and the same every time, and what requests say of it."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ldm_runtime.errors import LdmError
from ldm_runtime.inputs.layouts import read_layout
from models.shapes.catalog.systems import SYSTEMS
from models.shapes.data import scenes
from models.shapes.evaluation import systems as exam
from models.shapes.evaluation.scores import GOALS, drawing_of, enlarge

ALL = list(SYSTEMS.values())
NAMES = list(SYSTEMS)


class Painter:
    """A generator that paints the right picture for whatever is asked, in order."""

    backend = "paint"

    def __init__(self, system, bundle, images):
        self.spec = SimpleNamespace(task=system.task)
        self.bundle = bundle
        self.images = iter(images)
        self.seeds = []

    def __call__(self, *, seed, **_fields):
        self.seeds.append(seed)
        return SimpleNamespace(images=[Image.fromarray(next(self.images))])


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("system", ALL, ids=NAMES)
def test_questions_are_held_out_and_the_same_every_time(system):
    asked, again = (exam.held_out_questions(system, 5, exam.SEED) for _ in range(2))

    if system.most_things > 1:
        assert all(scenes.is_held_out(scenes.caption(each.scene)) for each in asked)
    assert all(len(each.scene.things) <= system.most_things for each in asked)
    assert [each.scene for each in asked] == [each.scene for each in again]
    assert all((each.hole is not None) == (system.task == "inpainting") for each in asked)


def test_nearly_all_classes_are_asked_for():
    asked = exam.held_out_questions(SYSTEMS["class_to_image"], 100, exam.SEED)

    labels = {exam.FIELDS["class-to-image"](each)["class_label"] for each in asked}

    assert len(labels) >= 22


def test_a_layout_is_asked_for_as_a_request_spells_it():
    (asked,) = exam.held_out_questions(SYSTEMS["layout_to_image"], 1, exam.SEED)

    objects = read_layout(exam.FIELDS["layout-to-image"](asked)["layout"])

    assert len(objects) == len(asked.scene.things)


def test_a_picture_with_a_hole_has_it_where_the_mask_is_white():
    (asked,) = exam.held_out_questions(SYSTEMS["inpainting"], 1, exam.SEED)

    fields = exam.FIELDS["inpainting"](asked)

    assert (fields["mask_image"] == 255).tolist() == asked.hole.tolist()
    np.testing.assert_array_equal(fields["image"], asked.truth)


def test_guidance_is_asked_for_only_where_there_is_a_null_condition():
    guided = {name for name in NAMES if "guidance_scale" in exam.settings_of(SYSTEMS[name], 9)}

    assert guided == {"class_to_image", "text_to_image_bert", "layout_to_image"}


@pytest.mark.parametrize("system", ALL, ids=NAMES)
def test_a_perfect_painter_reaches_every_goal(system, bundle):
    asked = exam.held_out_questions(system, 4, exam.SEED)
    painter = Painter(system, bundle, [each.truth for each in asked])

    row, images = exam.examine(painter, system, 4, steps=3)

    assert painter.seeds == [exam.SEED + index for index in range(4)]
    assert len(images) == len(row.seconds) == 4
    assert all(row.scores[name] >= goal for name, goal in GOALS[system.task].items())
    assert "missed" not in exam.table(row)


def test_a_painter_of_blurs_misses_a_goal_and_the_table_says_so(bundle):
    system = SYSTEMS["super_resolution"]
    asked = exam.held_out_questions(system, 4, exam.SEED)
    blurred = [enlarge(each.truth[::4, ::4]) for each in asked]

    row, _ = exam.examine(Painter(system, bundle, blurred), system, 4, steps=3)

    assert row.scores["gain"] < 2
    assert "missed" in exam.table(row)


def test_worse_pictures_are_farther_from_held_out_ones_than_held_out_ones_are():
    system = SYSTEMS["unconditional"]
    images = [each.truth for each in exam.held_out_questions(system, 64, exam.SEED + 9)]

    found = exam.distances_of(system, images)

    assert found["worse"] > 2 * found["floor"]
    assert found["worse"] > 2 * found["drawn"]


def test_the_bundle_of_another_task_is_refused(bundle):
    painter = Painter(SYSTEMS["inpainting"], bundle, [])

    with pytest.raises(LdmError, match=r"is inpainting, but class_to_image is class-to-image"):
        exam.examine(painter, SYSTEMS["class_to_image"], 4, steps=3)


def test_rows_come_back_from_the_results_file(bundle, tmp_path):
    system = SYSTEMS["class_to_image"]
    asked = exam.held_out_questions(system, 2, exam.SEED)
    painter = Painter(system, bundle, [each.truth for each in asked])
    row, _ = exam.examine(painter, system, 2, steps=3)
    path = tmp_path / "results/rows.jsonl"

    exam.append_row(path, row)
    exam.append_row(path, row)

    found = list(exam.read_rows(path))
    assert [each.scores for each in found] == [dict(row.scores)] * 2
    assert found[0].settings == row.settings


def test_a_line_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"name": 3}\n')

    with pytest.raises(LdmError, match=r"rows\.jsonl:1 is no system's row .*; remove it"):
        list(exam.read_rows(path))


def test_a_sheet_has_whole_rows_of_pictures():
    asked = exam.held_out_questions(SYSTEMS["class_to_image"], 7, exam.SEED)
    images = [drawing_of(each.scene) for each in asked]

    whole = exam.sheet(images, columns=3)

    assert whole.shape == (2 * 64, 3 * 64, 3)
    np.testing.assert_array_equal(whole[64:, 64:128], images[4])
