"""Adapters on the page: chosen by numbers, sent, copied, and restored from a PNG."""

import json

import pytest

from ldm_runtime import Generator
from tests.browser.conftest import serving
from tests.browser.page_actions import copied, field, said, shown_bytes, wait_until_done
from tests.browser.test_page_accessibility import check, open_all
from tests.serve.adapter_files import write_lora

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_scales_are_sent_copied_and_restored(small_bundle_fp32, bundles, new_page, tmp_path):
    style = write_lora(tmp_path / "my style.safetensors")
    adapters = {"style": style, "other": write_lora(tmp_path / "second.safetensors", 1)}
    models = {"engines": small_bundle_fp32, "text-to-image": bundles["text-to-image"]}
    with serving(models, adapters=adapters) as address:
        page = new_page(address, width=320)
        group = page.get_by_role("group", name="Adapters")
        scale = group.get_by_role("spinbutton", name="style")
        for name, value in {"num_inference_steps": 2, "seed": 7, "prompt": "red"}.items():
            field(page, name).fill(str(value))
        scale.fill("0.7")
        open_all(page)
        check(page)
        with page.expect_request("**/api/jobs") as sent:
            page.get_by_role("button", name="Generate").click()
        wait_until_done(page)

        body = json.loads(sent.value.post_data)
        assert body["adapters"] == [{"name": "style", "scale": 0.7}]
        assert "adapters" not in body["request"]
        image = shown_bytes(page)
        with Generator(small_bundle_fp32, threads=1, adapters={style: 0.7}) as generator:
            assert image == generator("red", num_inference_steps=2, seed=7).encoded()
        assert '"adapters":[{"name":"style","scale":0.7}]' in copied(page, "curl")
        python = copied(page, "Python")
        assert 'Generator("engines", adapters={"my style.safetensors": 0.7})' in python
        assert "adapters=" not in python.partition("generator(")[2]

        scale.fill("11")
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("The scale of 'style' must be from -10 to 10, got 11").wait_for()
        (tmp_path / "made.png").write_bytes(image)
        page.locator("#restore").set_input_files(tmp_path / "made.png")
        page.wait_for_function("document.getElementById('adapter-style').value === '0.7'")
        assert said(page).startswith("Restored the settings of made.png.")
        assert scale.get_attribute("aria-invalid") is None
        page.get_by_role("combobox", name="Model").select_option("text-to-image")
        group.wait_for(state="detached")
