"""The page on the Python API says what its blocks write and print."""

import re
from pathlib import Path

import pytest

from ldm_runtime.requests.aliases import ALIASES
from ldm_runtime.requests.request import FIELDS
from ldm_runtime.testing import write_tiny_bundle

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a bundle of a text-to-image model."""
    write_tiny_bundle(tmp_path / "engines")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_writes_the_files_and_prints_the_line_that_it_shows(folder, capsys):
    names = {}
    for block in blocks("python.md"):
        exec(compile(block, "python.md", "exec"), names)  # noqa: S102

    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    assert written == [f"sheet/{index:03d}-{7 + index}.jpg" for index in range(4)]
    assert len(list(folder.glob("out/*.png"))) == 4
    assert "Result: 4 images of 16x16, seeds 7 to 10, " in capsys.readouterr().out


def test_the_names_of_diffusers_on_the_page_are_answered_with_those_used_here():
    page = (DOCS / "python.md").read_text()
    (same,) = re.findall(r"^\| (.*) \| the same \|$", page, re.MULTILINE)

    assert set(re.findall(r"`(\w+)`", same)) <= FIELDS.keys()
    for theirs, ours in (("generator", "seed"), ("num_images_per_prompt", "num_images")):
        assert ALIASES[theirs] == ours
        assert f"`{theirs}=" in page
