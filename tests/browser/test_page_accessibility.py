"""The page for everyone: axe finds nothing in any state, light, dark and 320 pixels wide."""

from pathlib import Path

import axe_playwright_python
import pytest

from tests.browser.conftest import serving, wait_for
from tests.browser.page_actions import ask_for_much, choose, field, generate, noise_png, said

pytestmark = pytest.mark.browser

AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
#: Width of the window and colour scheme.
WINDOWS = [(1280, "light"), (1280, "dark"), (320, "light")]


def check(page):
    """Let axe look at the page, which must not scroll sideways either."""
    if not page.evaluate("() => 'axe' in window"):
        page.evaluate(AXE)
    found = page.evaluate("() => axe.run({ resultTypes: ['violations'] })")
    faults = [
        f"{fault['id']}: {fault['help']}: {node['html']}"
        for fault in found["violations"]
        for node in fault["nodes"]
    ]
    assert faults == []
    assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0


def open_all(page):
    """Open everything that is folded."""
    page.evaluate(
        "() => document.querySelectorAll('details').forEach(each => { each.open = true; })"
    )


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_every_state_of_a_request_passes_axe(new_page, width, scheme):
    page = new_page(width=width, scheme=scheme)
    field(page, "prompt").wait_for()
    check(page)  # empty

    open_all(page)
    field(page, "width").fill("17")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("17 is not a multiple").wait_for()
    check(page)  # an error, and all settings

    ask_for_much(page)
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("img", name="Preview").wait_for()
    check(page)  # running
    page.get_by_role("button", name="Cancel").click()
    wait_for(lambda: said(page) == "Cancelled.")
    check(page)  # cancelled

    page.reload()
    generate(page)
    page.get_by_role("button", name="Compare").click()
    generate(page)
    check(page)  # done, with history and comparison


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (320, "dark")])
@pytest.mark.parametrize("task", ["text-inpainting", "layout-to-image", "semantic-synthesis"])
def test_the_inputs_of_every_task_pass_axe(new_page, tmp_path, task, width, scheme):
    page = new_page(width=width, scheme=scheme)
    choose(page, task)
    check(page)  # empty

    open_all(page)
    field(page, "image").set_input_files(noise_png(tmp_path))
    if task == "layout-to-image":
        page.get_by_role("button", name="Add a box").click()
    else:
        page.get_by_role("button", name="Fill rectangle").first.click()
    generate(page)
    check(page)  # filled and done


@pytest.mark.parametrize(
    ("task", "name"), [("text-inpainting", "image"), ("layout-to-image", "layout")]
)
def test_errors_of_inputs_that_are_no_text_pass_axe(new_page, task, name):
    page = new_page()
    choose(page, task)
    if name == "layout":
        page.get_by_role("button", name="Add a box").click()
        page.get_by_label("Right edge of box 1").fill("0")

    page.get_by_role("button", name="Generate").click()
    page.locator(f"#error-{name}").wait_for()

    check(page)
    target = page.locator("[aria-invalid=true]")
    assert f"error-{name}" in target.get_attribute("aria-describedby").split()


def test_the_question_for_a_key_and_the_code_to_copy_pass_axe(new_page, bundles):
    with serving({"tiny": bundles["text-to-image"]}, keys={"alice": "k" * 32}) as address:
        page = new_page(address)
        page.get_by_label("API key").fill("k" * 32)
        check(page)
        page.keyboard.press("Enter")
        field(page, "prompt").wait_for()
        generate(page)
        page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); }")
        page.get_by_role("button", name="Copy as curl").click()
        page.get_by_role("dialog").wait_for()

        check(page)
