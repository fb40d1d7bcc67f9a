"""The page in Debian's Chromium, over a real server that generates."""

import subprocess

import pytest

from ldm_runtime import Generator
from tests.browser.conftest import serving, wait_for
from tests.browser.page_actions import (
    ask_for_much,
    choose,
    copied,
    field,
    focused,
    generate,
    lose,
    noise_png,
    pass_time,
    said,
    shown_bytes,
    stop_clock,
    tab_to,
    wait_until_done,
)

pytestmark = pytest.mark.browser

MAX_SEED = 2**64 - 1
MANY = 8  # lost calls, with pauses that grow to their longest


@pytest.fixture
def generated(bundles):
    """A function that generates a PNG as the Python API does."""

    def bytes_of(task, **fields):
        with Generator(bundles[task], threads=1) as generator:
            return generator(**fields).encoded()

    return bytes_of


def test_from_a_prompt_to_an_image_with_the_keyboard_alone(new_page, generated):
    page = new_page()
    page.get_by_role("combobox", name="Model").wait_for()

    tab_to(page, "Prompt")
    page.keyboard.type("a red circle")
    tab_to(page, "Seed")
    page.keyboard.type("7")
    tab_to(page, "Generate")
    page.keyboard.press("Enter")
    wait_until_done(page)

    assert focused(page) == ("button", "Generate")
    assert page.get_by_role("img", name="a red circle, seed 7").count() == 2  # and in the history
    with page.expect_download() as download:
        tab_to(page, "Save")
        page.keyboard.press("Enter")
    saved = download.value.path().read_bytes()
    assert saved == generated("text-to-image", prompt="a red circle", seed=7)


def test_progress_and_previews_are_shown_while_steps_are_done(page):
    ask_for_much(page)

    page.get_by_role("button", name="Generate").click()
    page.get_by_role("img", name="Preview of the image so far").wait_for()

    bar = page.get_by_role("progressbar", name="Progress")
    first = int(bar.get_attribute("aria-valuenow"))
    wait_for(lambda: int(bar.get_attribute("aria-valuenow")) > first)
    assert "of 2000" in bar.get_attribute("aria-valuetext")
    assert page.locator("#result").get_attribute("aria-busy") == "true"
    page.get_by_role("button", name="Cancel").click()
    wait_for(lambda: said(page) == "Cancelled.")


def test_cancel_ends_the_job_on_the_server_and_gives_the_focus_back(page):
    ask_for_much(page)
    with page.expect_response("**/api/jobs") as answer:
        page.get_by_role("button", name="Generate").click()
    page.get_by_role("progressbar").wait_for()

    page.get_by_role("button", name="Cancel").focus()
    page.keyboard.press("Enter")
    wait_for(lambda: said(page) == "Cancelled.")

    state = page.request.get(f"/api/jobs/{answer.value.json()['id']}").json()["state"]
    assert state == "cancelled"
    assert focused(page) == ("button", "Generate")
    assert page.get_by_text("Your image will appear here.").is_visible()


def test_a_job_is_followed_through_a_lost_connection(page):
    calls = lose(page, "**/events", 1)

    generate(page)

    assert len(calls) == 2


def test_a_job_is_followed_however_often_the_connection_is_lost(page):
    calls = lose(page, "**/events", MANY)
    stop_clock(page)

    page.get_by_role("button", name="Generate").click()
    wait_for(lambda: said(page) == "The connection is lost. Trying again…")
    assert page.locator("#status").text_content() == said(page)
    wait_for(lambda: pass_time(page) and said(page).startswith("Done"))

    assert len(calls) == MANY + 1


def test_a_job_whose_connection_is_lost_can_be_cancelled(page):
    ask_for_much(page)
    calls = lose(page, "**/events")
    stop_clock(page)
    with page.expect_response("**/api/jobs") as answer:
        page.get_by_role("button", name="Generate").click()
    wait_for(lambda: pass_time(page) and len(calls) >= MANY)

    page.get_by_role("button", name="Cancel").click()
    wait_for(lambda: pass_time(page) and said(page).startswith("Cancelled."))

    job = f"/api/jobs/{answer.value.json()['id']}"
    wait_for(lambda: page.request.get(job).json()["state"] == "cancelled")
    assert page.locator("#problem").text_content() == ""


def test_a_server_is_given_up_once_it_would_have_forgotten_the_job(page):
    calls = lose(page, "**/events")
    stop_clock(page)

    page.get_by_role("button", name="Generate").click()
    alert = page.get_by_role("alert").filter(has_text="The server cannot be reached")
    wait_for(lambda: pass_time(page, 10) and alert.is_visible())

    assert len(calls) > MANY


def test_a_job_is_followed_when_a_proxy_cannot_reach_the_server_for_a_while(page):
    page.route("**/events", lambda route: route.fulfill(status=502), times=1)

    generate(page)


def test_a_job_that_the_server_has_forgotten_is_not_asked_for_again(page):
    error = {"code": "job_not_found", "message": "There is no job of that name."}
    page.route("**/events", lambda route: route.fulfill(status=404, json={"error": error}), times=1)

    page.get_by_role("button", name="Generate").click()

    page.get_by_role("alert").filter(has_text="There is no job of that name.").wait_for()


def test_an_image_is_fetched_again_after_a_lost_connection(page):
    calls = lose(page, "**/files/*/*", 2)

    generate(page)

    assert len(calls) == 3


def test_a_request_that_waits_for_its_model_is_not_sent_once_it_is_cancelled(page):
    error = {"code": "not_ready", "message": "The model is being opened."}
    calls = []

    def refuse(route):
        calls.append(route)
        route.fulfill(status=503, json={"error": error})

    page.route("**/api/jobs", refuse)
    stop_clock(page)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("The model is being opened.").wait_for()

    page.get_by_role("button", name="Cancel").click()
    wait_for(lambda: pass_time(page) and said(page) == "Cancelled.")

    assert len(calls) == 1


def test_a_request_goes_to_the_model_it_was_made_for_when_another_is_chosen_meanwhile(page):
    models = []

    def open_slowly(route):
        models.append(route.request.post_data_json["model"])
        if len(models) > 1:
            route.continue_()
        else:
            error = {"code": "not_ready", "message": "The model is being opened."}
            route.fulfill(status=503, json={"error": error})

    page.route("**/api/jobs", open_slowly)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("The model is being opened.").wait_for()

    choose(page, "text-inpainting")
    wait_until_done(page)

    assert models == ["text-to-image", "text-to-image"]


def test_an_error_is_not_put_at_a_field_of_another_model(page):
    held = []
    page.route("**/api/jobs", lambda route: held.append(route))
    field(page, "width").fill("17")
    page.get_by_role("button", name="Generate").click()
    wait_for(lambda: page.title() and held)  # asking the page lets the route be called

    choose(page, "layout-to-image")
    held[0].continue_()

    page.get_by_role("alert").filter(has_text="17 is not a multiple of 4").wait_for()
    assert field(page, "width").get_attribute("aria-invalid") is None


def test_an_error_stands_at_its_field_and_goes_when_that_is_changed(page):
    width = field(page, "width")
    width.fill("17")

    page.get_by_role("button", name="Generate").click()
    page.get_by_text("17 is not a multiple of 4; the nearest sizes are 16 and 20").wait_for()

    assert focused(page) == ("spinbutton", "Width")
    assert width.get_attribute("aria-invalid") == "true"
    width.fill("20")
    assert width.get_attribute("aria-invalid") is None
    assert generate(page)["width"] == 20


def test_an_error_among_the_further_settings_opens_them(page):
    page.get_by_text("More settings").click()
    field(page, "eta").fill("0.5")
    field(page, "sampler").select_option("euler")
    page.get_by_text("More settings").click()

    page.get_by_role("button", name="Generate").click()

    wait_for(lambda: focused(page) == ("spinbutton", "Eta"))


def test_the_history_shows_earlier_images_again(page):
    field(page, "num_images").fill("2")
    field(page, "seed").fill("3")
    generate(page)
    history = page.get_by_role("list").filter(has=page.get_by_role("button"))

    history.get_by_role("button", name="seed 4").click()

    assert "Seed 4" in page.locator("#status").text_content()
    assert history.get_by_role("button", name="seed 4").get_attribute("aria-pressed") == "true"
    assert history.get_by_role("button", name="seed 3").get_attribute("aria-pressed") == "false"


def test_one_image_of_several_is_the_same_alone(page, generated):
    field(page, "num_images").fill("2")
    field(page, "seed").fill("3")
    generate(page)
    page.get_by_role("button", name="seed 4").click()

    page.get_by_role("button", name="Reuse settings").click()
    request = generate(page)

    assert "num_images" not in request
    assert shown_bytes(page) == generated("text-to-image", prompt=request["prompt"], seed=4)


def test_a_seed_of_64_bits_is_sent_reused_and_restored_to_the_last_digit(page):
    field(page, "seed").fill(str(MAX_SEED - 1))
    assert generate(page)["seed"] == MAX_SEED - 1

    page.get_by_role("button", name="Random seed").click()
    assert field(page, "seed").input_value() == ""
    page.get_by_role("button", name="Reuse last").click()
    assert field(page, "seed").input_value() == str(MAX_SEED - 1)
    page.get_by_role("button", name="Random seed").click()
    page.get_by_role("button", name="Reuse settings").click()
    assert field(page, "seed").input_value() == str(MAX_SEED - 1)


def test_two_seeds_are_compared_side_by_side_with_what_differs(page):
    for seed in ("1", "2"):
        field(page, "seed").fill(seed)
        generate(page)
        if seed == "1":
            page.get_by_role("button", name="Compare").click()

    comparison = page.get_by_role("region", name="Comparison")

    assert comparison.get_by_role("img").count() == 2
    rows = comparison.get_by_role("row").all_inner_texts()
    assert [row.split() for row in rows] == [["Setting", "First", "Second"], ["Seed", "1", "2"]]
    page.get_by_role("button", name="Compare").click()
    assert not comparison.is_visible()


DROP = """
  async ([bytes, name]) => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([new Uint8Array(bytes)], name));
    document.body.dispatchEvent(new DragEvent('drop', { dataTransfer, bubbles: true }));
  }
"""


def drop(page, path):
    """Drop a file on the page."""
    page.evaluate(DROP, [list(path.read_bytes()), path.name])


def test_a_dropped_png_restores_its_settings_and_gives_the_same_bytes(page, generated, tmp_path):
    fields = {
        **{"prompt": 'a "red" circle', "negative_prompt": "blue", "seed": MAX_SEED - 1},
        **{"sampler": "heun", "sigmas": [9, 3, 0.5], "width": 20, "height": 16},
        **{"guidance_scale": 2.5, "variation_seed": 5, "variation_strength": 0.25},
    }
    made = generated("text-to-image", **fields)
    (tmp_path / "made.png").write_bytes(made)
    choose(page, "layout-to-image")

    drop(page, tmp_path / "made.png")
    wait_for(lambda: said(page).startswith("Restored the settings of made.png."))
    generate(page)

    assert field(page, "model").input_value() == "text-to-image"
    assert field(page, "sampler").input_value() == "heun"
    assert shown_bytes(page) == made


def test_a_restored_setting_goes_when_another_replaces_it(page, generated, tmp_path):
    fields = {"prompt": "red", "seed": 1, "sigmas": [9, 3, 0.5]}
    (tmp_path / "made.png").write_bytes(generated("text-to-image", **fields))
    page.locator("#restore").set_input_files(tmp_path / "made.png")
    wait_for(lambda: field(page, "sigmas").input_value() != "")

    field(page, "num_inference_steps").fill("5")
    field(page, "num_inference_steps").press("Tab")
    request = generate(page)

    assert request["num_inference_steps"] == 5
    assert not {"sigmas", "schedule"} & set(request)


def test_what_is_typed_counts_with_a_preset_even_if_it_is_the_default(page):
    page.get_by_text("More settings").click()
    steps = field(page, "num_inference_steps").input_value()
    field(page, "preset").select_option("lcm")
    assert "num_inference_steps" not in generate(page)

    for text in ("9", steps):
        field(page, "num_inference_steps").fill(text)
        field(page, "num_inference_steps").press("Tab")
    request = generate(page)

    assert request["num_inference_steps"] == int(steps)
    field(page, "preset").select_option("turbo")
    assert "num_inference_steps" not in generate(page)


def test_text_that_is_dragged_is_left_to_the_browser(page):
    """A file is not: the browser would open it."""
    is_taken = """
      isFile => {
        const dataTransfer = new DataTransfer();
        if (isFile) dataTransfer.items.add(new File([], 'a.png'));
        else dataTransfer.setData('text/plain', 'a red circle');
        const options = { dataTransfer, bubbles: true, cancelable: true };
        const taken = ['dragover', 'drop'].map(name => {
          const event = new DragEvent(name, options);
          document.querySelector('#field-prompt').dispatchEvent(event);
          return event.defaultPrevented;
        });
        return [...taken, document.documentElement.classList.contains('over')];
      }
    """

    assert page.evaluate(is_taken, False) == [False, False, False]
    assert page.evaluate(is_taken, True) == [True, True, False]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"GIF89a", "is not a PNG"), (None, "carries no settings of ldm")],
)
def test_a_png_without_settings_is_one_sentence(page, tmp_path, content, reason):
    path = noise_png(tmp_path)
    if content is not None:
        path.write_bytes(content)

    drop(page, path)

    page.get_by_role("alert").filter(has_text=f"noise.png {reason}").wait_for()


@pytest.mark.parametrize("prompt", ["true", 'say "it\'s" \\ 大 <b>', "toString"])
def test_the_copied_python_generates_the_same_bytes(page, bundles, tmp_path, monkeypatch, prompt):
    field(page, "prompt").fill(prompt)
    field(page, "seed").fill(str(MAX_SEED - 1))
    generate(page)
    code = copied(page, "Python")
    (tmp_path / "text-to-image").symlink_to(bundles["text-to-image"])
    monkeypatch.chdir(tmp_path)

    exec(compile(code, "copied", "exec"), {})  # noqa: S102

    assert (tmp_path / "image.png").read_bytes() == shown_bytes(page)


def test_the_copied_curl_commands_generate_the_same_bytes(page, tmp_path):
    field(page, "prompt").fill('it\'s a "red" circle \\ $HOME `x`')
    field(page, "seed").fill("7")
    generate(page)

    subprocess.run(["bash", "-euc", copied(page, "curl")], cwd=tmp_path, check=True, timeout=60)

    assert (tmp_path / "image.png").read_bytes() == shown_bytes(page)


def test_code_is_shown_where_pages_may_not_copy(page):
    generate(page)
    page.evaluate(
        "() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }"
    )

    page.get_by_role("button", name="Copy as Python").click()

    dialog = page.get_by_role("dialog", name="Copy this text")
    assert "from ldm_runtime import Generator" in dialog.get_by_role("textbox").input_value()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_markup_in_a_prompt_is_text(page):
    field(page, "prompt").fill("<img src=x onerror=alert(1)>")

    generate(page)

    assert page.locator("#history img").get_attribute("alt").startswith("<img src=x")
    assert page.locator("img[src=x]").count() == 0


def test_the_prompt_stays_when_another_model_is_chosen(page):
    field(page, "prompt").fill("a red circle")

    choose(page, "text-inpainting")

    assert field(page, "prompt").input_value() == "a red circle"


def test_a_server_with_keys_asks_for_one(new_page, bundles):
    with serving({"tiny": bundles["text-to-image"]}, keys={"alice": "k" * 32}) as address:
        page = new_page(address)
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use key").click()
        page.get_by_role("alert").filter(has_text="does not know this key").wait_for()

        page.get_by_label("API key").fill("k" * 32)
        page.keyboard.press("Enter")
        field(page, "prompt").wait_for()
        generate(page)

        assert "$LDM_KEY" in copied(page, "curl")
        assert "k" * 32 not in copied(page, "curl")


def test_a_server_that_is_gone_is_said(new_page, bundles):
    with serving({"tiny": bundles["text-to-image"]}) as address:
        page = new_page(address)
        field(page, "prompt").wait_for()

    page.get_by_role("button", name="Generate").click()

    page.get_by_role("alert").filter(has_text="The server cannot be reached").wait_for()
