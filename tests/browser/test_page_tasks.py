"""The tasks whose inputs are a file or a choice, on the page: from its inputs to the image."""

import numpy as np
import pytest
from PIL import Image

from ldm_runtime import Generator
from ldm_runtime.testing import write_tiny_bundle
from tests.browser.conftest import serving
from tests.browser.page_actions import choose, decoded, field, generate, shown_bytes
from tests.browser.test_page_accessibility import check, open_all
from tests.runtime.task_cases import MAP, NEEDED

pytestmark = pytest.mark.browser

#: Boxes are drawn, see `test_page_inputs`.
TASKS = tuple(task for task in NEEDED if task != "layout-to-image")
PICTURE = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
FILES = {"image": PICTURE, "segmentation": MAP, "depth_map": MAP}


@pytest.fixture(scope="module")
def task_bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for task in TASKS:
        write_tiny_bundle(folder / task, task)
    return {task: folder / task for task in TASKS}


@pytest.fixture(scope="module")
def tasks_address(task_bundles):
    with serving(task_bundles) as address:
        yield address


def file_of(folder, name, value):
    """Return a file with an input, as a user has it."""
    if name == "embeddings":
        path = folder / "embeddings.npy"
        np.save(path, value)
    else:
        path = folder / f"{name}.png"
        Image.fromarray(value).save(path)
    return path


@pytest.mark.parametrize("task", TASKS)
def test_the_image_is_the_one_of_the_generator(
    new_page, tasks_address, task_bundles, tmp_path, task
):
    page = new_page(tasks_address)
    choose(page, task)
    open_all(page)
    expected = {"seed": 5}
    for name, value in NEEDED[task].items():
        expected[name] = FILES.get(name, value)
        if name == "mask_image":
            page.get_by_role("button", name="Fill rectangle").click()
        elif isinstance(value, np.ndarray):
            control = page.locator(f"input[type=file][id^='field-{name}']")
            control.set_input_files(file_of(tmp_path, name, expected[name]))
        elif name == "class_label":
            field(page, name).select_option(f"class {value}")
        else:
            field(page, name).fill(value)
    field(page, "seed").fill("5")

    request = generate(page)

    if "mask_image" in expected:
        expected["mask_image"] = decoded(request["mask_image"])
        assert len(np.unique(expected["mask_image"])) == 2
    with Generator(task_bundles[task], threads=1) as generator:
        assert shown_bytes(page) == generator(**expected).encoded()
    check(page)
