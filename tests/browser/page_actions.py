"""What tests do to the page: choose a model, generate, read what was asked for."""

import base64
import io
import json
import math
import time

import numpy as np
from PIL import Image

from tests.browser.conftest import wait_for


def choose(page, task):
    """Choose a model by its task."""
    page.get_by_role("combobox", name="Model").select_option(task)


def field(page, name):
    """Return the control of a field of a request."""
    return page.locator(f"#field-{name}")


def ask_for_much(page):
    """Ask for images that take long enough to look at their progress and to cancel them."""
    much = {"width": 256, "height": 256, "num_inference_steps": 200, "num_images": 10}
    for name, value in much.items():
        field(page, name).fill(str(value))


def generate(page):
    """Press Generate, wait for the images, and return the request that was sent."""
    page.evaluate("document.getElementById('announcer').textContent = ''")
    with page.expect_request("**/api/jobs") as sent:
        page.get_by_role("button", name="Generate").click()
    wait_until_done(page)
    return json.loads(sent.value.post_data)["request"]


def wait_until_done(page):
    """Wait for the images of a job."""
    wait_for(lambda: said(page).startswith("Done"))


def said(page):
    """Return what screen readers were told last."""
    return page.locator("#announcer").text_content()


def lose(page, pattern, times=math.inf):
    """Lose the first calls to paths of a pattern; returns a list that gets every call."""
    calls = []

    def answer(route):
        calls.append(route)
        if len(calls) > times:
            route.continue_()
        else:
            route.abort()

    page.route(pattern, answer)
    return calls


def stop_clock(page):
    """Stop the clock of the page; `pass_time` moves it."""
    page.clock.install()
    page.clock.pause_at(time.time() + 60)


def pass_time(page, seconds=2):
    """Let time pass on the page, whose clock is stopped; returns True."""
    page.clock.fast_forward(1000 * seconds)
    return True


def shown_bytes(page):
    """Return the bytes of the PNG that Save saves."""
    with page.expect_download() as download:
        page.get_by_role("link", name="Save").click()
    return download.value.path().read_bytes()


def copied(page, name):
    """Return what a button copies."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name=f"Copy as {name}").click()
    wait_for(lambda: said(page) == f"Copied as {name}.")
    return page.evaluate("navigator.clipboard.readText()")


def decoded(data_url):
    """Return the pixels of a data: URL of an image."""
    data = base64.b64decode(data_url.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)))


def noise_png(folder, width=16, height=16, name="noise.png"):
    """Return the path of an image of noise; a file that is chosen again changes nothing."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def drag(page, canvas, start, end):
    """Drag on a canvas, from and to shares of its width and height."""
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for index, (x, y) in enumerate((start, end)):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=5)
        if not index:
            page.mouse.down()
    page.mouse.up()


def focused(page):
    """Return the role and the name of the focused element, as assistive technology has it."""
    client = page.context.new_cdp_session(page)
    for node in client.send("Accessibility.getFullAXTree")["nodes"]:
        facts = {each["name"]: each["value"].get("value") for each in node.get("properties", ())}
        if facts.get("focused") and node["role"]["value"] != "RootWebArea":
            return node["role"]["value"], node["name"]["value"]
    return None, None


def tab_to(page, name, presses=60):
    """Press Tab until the element of a name has the focus."""
    for _ in range(presses):
        page.keyboard.press("Tab")
        if focused(page)[1] == name:
            return
    raise AssertionError(f"Tab does not come to {name!r}")
