"""The blocks of docs/serving.md, against a server of the tiny bundle."""

import functools
import re
import runpy
import shlex
from pathlib import Path

import httpx2
import openai
import pytest
from PIL import Image

from ldm_runtime import Generator
from ldm_runtime.cli.commands import build_parser
from ldm_serve.cli import settings_of
from ldm_serve.engine_flags import worker_settings

PAGE = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_blocks_of_python_run(server, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = "".join(block for language, block in BLOCKS if language == "python")
    Path("page.py").write_text(script, encoding="utf-8")

    with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(server.socket))) as client:
        monkeypatch.setattr(openai, "OpenAI", functools.partial(openai.OpenAI, http_client=client))
        runpy.run_path("page.py")

    (prompt,) = re.findall(r'prompt="(.*)"', PAGE)
    with Generator(bundle, threads=1) as generator, Image.open("served.png") as image:
        assert image.tobytes() == generator(prompt, seed=7).image.tobytes()


def words_of(line):
    """Return the words of a command, without variables before it."""
    return [word for word in shlex.split(line, comments=True) if not word.startswith("LDM_")]


LINES = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
COMMANDS = [words for words in map(words_of, LINES) if words[0] == "ldm"]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_commands_are_accepted(words):
    args = build_parser().parse_args(words[1:])

    assert worker_settings(args).count == args.workers
    if words[1] == "serve":
        assert settings_of(args, {"LDM_SERVE_KEYS": f"alice:{'k' * 22}"}).bundles


def test_the_page_shows_both_commands():
    assert {words[1] for words in COMMANDS} == {"serve", "batch"}


def test_every_path_of_the_table_is_answered(client):
    paths = {
        path
        for row in re.findall(r"^\| (`(?:GET|POST) .*?) \|", PAGE, re.MULTILINE)
        for path in re.findall(r"/[\w/]+", row)
    }

    assert len(paths) >= 12
    for path in paths:
        answer = client.get(path.replace("/ID", "/none"))
        assert answer.status_code != 404 or answer.json()["error"]["code"] != "not_found", path


def test_every_code_of_the_table_is_one_of_the_code():
    root = Path(__file__).parents[2] / "ldm_serve"
    sources = "".join(path.read_text(encoding="utf-8") for path in root.rglob("*.py"))
    rows = re.findall(r"^\| (\d{3}) \| (.*?) \|", PAGE, re.MULTILINE)

    assert {int(status) for status, _ in rows} >= {400, 401, 404, 413, 429, 500, 503, 504}
    for _, codes in rows:
        for code in re.findall(r"`(\w+)`", codes):
            assert f'"{code}"' in sources


def test_the_page_has_every_metric(client):
    declared = re.findall(r"^# TYPE (\w+) ", client.get("/metrics").text, re.MULTILINE)
    named = {name for name in declared if not name.endswith("_created")}

    assert named
    assert {name for name in named if f"`{name}`" not in PAGE} == set()


def test_metrics_name_the_models_by_the_hashes_of_their_bundles(client):
    models = {each["name"]: each for each in client.get("/api/models").json()["models"]}
    text = client.get("/metrics").text

    found = re.findall(r'ldm_model_info\{bundle_sha256="(\w+)",model="([\w-]+)"\} 1.0', text)

    assert {name: sha256 for sha256, name in found} == {
        name: model["bundle_sha256"] for name, model in models.items()
    }
