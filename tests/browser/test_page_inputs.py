"""The page's inputs of every task, by mouse and by keyboard: masks, boxes, maps and images."""

import numpy as np
import pytest
from PIL import Image

from tests.browser.conftest import NAMES, TASKS, wait_for
from tests.browser.page_actions import (
    choose,
    copied,
    decoded,
    drag,
    field,
    focused,
    generate,
    noise_png,
    said,
    shown_bytes,
    tab_to,
)

pytestmark = pytest.mark.browser


def test_a_mask_is_painted_with_the_mouse_over_the_image(page, tmp_path):
    choose(page, "text-inpainting")
    field(page, "image").set_input_files(noise_png(tmp_path, 32, 24))
    canvas = page.get_by_role("img", name="Mask: 0 % changes")

    drag(page, canvas, (0.1, 0.5), (0.5, 0.5))
    request = generate(page)

    mask = decoded(request["mask_image"])
    assert mask.shape == (24, 32)
    assert set(np.unique(mask)) == {0, 255}
    assert (mask[11:13, 4:16] == 255).all()
    assert not mask[:, 22:].any()
    assert not mask[:6].any()
    assert "width" not in request


def test_a_mask_is_painted_and_undone_with_the_keyboard(page, tmp_path):
    choose(page, "text-inpainting")
    field(page, "image").set_input_files(noise_png(tmp_path))

    tab_to(page, "Undo")
    tab_to(page, "Paint a rectangle by numbers")
    page.keyboard.press("Enter")
    tab_to(page, "Left %")
    page.keyboard.type("50")
    tab_to(page, "Fill rectangle")
    page.keyboard.press("Enter")
    page.get_by_role("img", name="Mask: 25 % changes").wait_for()
    mask = decoded(generate(page)["mask_image"])

    expected = np.zeros((16, 16), np.uint8)
    expected[4:12, 8:] = 255
    np.testing.assert_array_equal(mask, expected)
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("img", name="Mask: 0 % changes").wait_for()


def test_the_mask_of_a_large_image_has_its_size(page, tmp_path):
    choose(page, "text-inpainting")
    field(page, "image").set_input_files(noise_png(tmp_path, 1040, 16))
    page.get_by_role("button", name="Fill all").click()

    mask = decoded(generate(page)["mask_image"])

    assert mask.shape == (16, 1040)  # painted on 1024 x 16
    assert (mask == 255).all()


def test_image_and_mask_stay_when_the_settings_of_a_result_are_used_again(page, tmp_path):
    choose(page, "text-inpainting")
    field(page, "image").set_input_files(noise_png(tmp_path))
    drag(page, page.get_by_role("img", name="Mask"), (0.1, 0.5), (0.5, 0.5))
    first = generate(page)
    made = shown_bytes(page)

    page.get_by_role("button", name="Reuse settings").click()
    wait_for(lambda: "These stay as they are: Image, Mask." in said(page))
    again = generate(page)

    assert (again["image"], again["mask_image"]) == (first["image"], first["mask_image"])
    assert shown_bytes(page) == made


def test_boxes_are_dragged_moved_and_named_with_the_mouse(page):
    choose(page, "layout-to-image")
    canvas = page.get_by_role("img", name="of at most 3 boxes")

    drag(page, canvas, (0.1, 0.2), (0.4, 0.6))
    page.get_by_role("combobox", name="Label of box 1").select_option("water (2)")
    drag(page, canvas, (0.2, 0.3), (0.5, 0.4))

    (thing,) = generate(page)["layout"]
    assert thing["label"] == NAMES.index("water")
    np.testing.assert_allclose(thing["box"], [0.4, 0.3, 0.7, 0.7], atol=0.02)
    assert page.get_by_role("img", name="1 of at most 3 boxes").count() == 1


def test_boxes_are_added_changed_and_removed_with_the_keyboard(page):
    choose(page, "layout-to-image")

    tab_to(page, "Add a box")
    page.keyboard.press("Enter")
    assert focused(page) == ("combobox", "Label of box 1")
    page.keyboard.type("sand")
    tab_to(page, "Right edge of box 1")
    page.keyboard.press("Control+A")
    page.keyboard.type("0.9")
    page.keyboard.press("ArrowUp")
    tab_to(page, "Add a box")
    page.keyboard.press("Enter")
    tab_to(page, "Remove box 2")
    page.keyboard.press("Enter")
    assert focused(page) == ("button", "Add a box")

    assert generate(page)["layout"] == [
        {"label": NAMES.index("sand"), "box": [0.1, 0.1, 0.91, 0.6]}
    ]


def test_no_more_boxes_are_added_than_the_model_takes(page):
    choose(page, "layout-to-image")

    for _ in range(3):
        page.get_by_role("button", name="Add a box").click()
    drag(page, page.get_by_role("img", name="of at most 3 boxes"), (0.9, 0.9), (0.99, 0.99))

    assert page.get_by_role("button", name="Add a box").is_disabled()
    assert page.get_by_role("img", name="3 of at most 3 boxes").count() == 1


def test_a_segmentation_map_is_painted_with_named_classes(page):
    choose(page, "semantic-synthesis")
    canvas = page.get_by_role("img", name="Segmentation map")
    page.get_by_role("combobox", name="Paint", exact=True).select_option("grass (1)")

    drag(page, canvas, (0.0, 0.9), (1.0, 0.9))
    request = generate(page)

    painted = decoded(request["segmentation"])
    assert painted.shape == (16, 16)
    assert set(np.unique(painted)) == {0, NAMES.index("grass")}
    assert (painted[14] == 1).all()
    legend = page.locator(".legend").inner_text()
    assert "sky, " in legend
    assert "grass, " in legend
    assert "water" not in legend


def test_a_segmentation_map_may_be_a_file(page, tmp_path):
    choose(page, "semantic-synthesis")
    pixels = np.arange(24 * 16, dtype=np.uint8).reshape(16, 24) % 6
    Image.fromarray(pixels).save(tmp_path / "map.png")

    field(page, "segmentation").set_input_files(tmp_path / "map.png")
    wait_for(lambda: field(page, "width").input_value() == "24")
    request = generate(page)

    np.testing.assert_array_equal(decoded(request["segmentation"]), pixels)


@pytest.mark.parametrize("task", TASKS[1:])
def test_the_copied_python_holds_the_inputs(page, bundles, tmp_path, monkeypatch, task):
    choose(page, task)
    if task == "layout-to-image":
        page.get_by_role("button", name="Add a box").click()
    elif task == "text-inpainting":
        field(page, "image").set_input_files(noise_png(tmp_path))
    if task != "layout-to-image":
        drag(page, page.get_by_role("img", name="%"), (0.1, 0.5), (0.5, 0.5))
    generate(page)
    (tmp_path / task).symlink_to(bundles[task])
    monkeypatch.chdir(tmp_path)

    exec(compile(copied(page, "Python"), "copied", "exec"), {})  # noqa: S102

    assert (tmp_path / "image.png").read_bytes() == shown_bytes(page)


def test_a_result_becomes_the_input_of_the_next_request(page):
    generate(page)
    first = shown_bytes(page)

    page.get_by_role("button", name="Use as input").click()
    field(page, "strength").fill("0.5")
    request = generate(page)

    assert request["image"].startswith("data:image/png;base64,")
    np.testing.assert_array_equal(decoded(request["image"]).shape, (16, 16, 3))
    assert shown_bytes(page) != first


def test_the_last_of_two_images_is_sent_even_if_the_first_takes_long(page, tmp_path):
    """Another source ends the decoding of the first one with an error."""
    page.evaluate("""
      () => {
        const { decode } = HTMLImageElement.prototype;
        const pauses = [500, 0];
        HTMLImageElement.prototype.decode = async function () {
          const pause = pauses.shift() ?? 0;
          await new Promise(resolve => setTimeout(resolve, pause));
          if (pause) throw new DOMException('The source has changed.', 'EncodingError');
          return decode.call(this);
        };
      }
    """)
    for width in (32, 24):
        field(page, "image").set_input_files(noise_png(tmp_path, width, 16, name=f"{width}.png"))
    wait_for(lambda: field(page, "width").input_value() == "24")
    page.wait_for_timeout(800)

    request = generate(page)

    assert decoded(request["image"]).shape == (16, 24, 3)
    assert not page.get_by_text("is not an image").count()


def test_another_image_brings_its_size_after_settings_were_used_again(page, tmp_path):
    use_image_again(page, tmp_path)

    field(page, "image").set_input_files(noise_png(tmp_path, 24, 20, name="other.png"))
    wait_for(lambda: field(page, "width").input_value() == "24")
    request = generate(page)

    assert field(page, "height").input_value() == "20"
    assert not {"width", "height"} & set(request)


def test_margins_bring_their_size_after_settings_were_used_again(page, tmp_path):
    use_image_again(page, tmp_path)
    page.get_by_text("More settings").click()

    field(page, "outpaint").fill("0, 0, 8, 0")
    field(page, "outpaint").press("Tab")
    request = generate(page)

    assert not {"width", "height"} & set(request)
    assert "40 × 24" in page.locator("#status").text_content()


def use_image_again(page, folder):
    """Generate from an image of 32 x 24 pixels, and use the settings of the result again."""
    field(page, "image").set_input_files(noise_png(folder, 32, 24))
    wait_for(lambda: field(page, "width").input_value() == "32")
    generate(page)
    page.get_by_role("button", name="Reuse settings").click()
    wait_for(lambda: "These stay as they are: Image." in said(page))
