"""What a server and its worker say on stderr: as text or JSON, and never a prompt."""

import json
import logging
import time
from datetime import UTC, datetime, timedelta

import pytest

from ldm_serve.logs import show_logs, values
from ldm_serve.settings import LogSettings
from tests.serve.conftest import serving

#: Requests of which the runtime says something, with a quotation: syntax that it does not read,
#: and more than the text encoder takes.
PROMPTS = (
    {"prompt": "a secret <hypernet:secret:1>"},
    {"prompt": "secret " * 100, "literal_prompt": True},
)


@pytest.fixture(autouse=True)
def root_handlers():
    """Leave the handlers and levels as they were."""
    loggers = [logging.getLogger(name) for name in (None, "ldm_serve")]
    before = [(each, each.level, each.handlers[:]) for each in loggers]
    yield
    for each, level, handlers in before:
        each.setLevel(level)
        each.handlers[:] = handlers


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_prompt_is_in_the_messages_of_a_server(bundle, tmp_path, log_format):
    with serving(tmp_path, bundle, "--log-format", log_format) as server:
        with server.client(timeout=60) as client:
            for fields in PROMPTS:
                job = client.post("/api/jobs", json={"request": fields}).json()
                while client.get(f"/api/jobs/{job['id']}").json()["state"] != "completed":
                    time.sleep(0.02)

        text = server.messages.read_text()

    assert "secret" not in text
    assert text.count("job of text-to-image: ok") == len(PROMPTS)


def test_every_line_of_a_server_is_an_object(bundle, tmp_path):
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    with serving(tmp_path, bundle, "--log-format", "json") as server:
        with server.client(timeout=60) as client:
            body = {"prompt": "red", "size": "16x16", "n": 2}
            answer = client.post("/v1/images/generations", json=body)
            client.get("/nowhere")
        end = time.monotonic() + 10
        # A call is logged when its answer has been sent.
        while '"status": 404' not in server.messages.read_text() and time.monotonic() < end:
            time.sleep(0.02)
    lines = lines_of(server.messages.read_text())

    assert {each["process"] for each in lines} == {"server", "worker"}
    assert all(datetime.fromisoformat(each["time"]) > before for each in lines)
    (job,) = (each for each in lines if each["logger"] == "ldm_serve.board")
    assert (job["model"], job["outcome"], job["images"]) == ("text-to-image", "ok", 2)
    assert 0 <= job["queue_seconds"] <= job["seconds"]
    calls = [each for each in lines if each["logger"] == "ldm_serve.access"]
    (made,) = (each for each in calls if each["route"] == "/v1/images/generations")
    assert (made["method"], made["status"], made["key"]) == ("POST", 200, "anyone")
    assert made["request_id"] == answer.headers["x-request-id"]
    assert calls[-1]["status"] == 404


def test_values_and_tracebacks_are_fields(capsys):
    show_logs(LogSettings(format="json"), "worker")
    try:
        raise ValueError("of no use\nat all")
    except ValueError:
        logging.getLogger("ldm_serve.x").exception("it \x1b[31m failed", extra=values(count=3))

    (line,) = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert (found["level"], found["logger"], found["count"]) == ("error", "ldm_serve.x", 3)
    assert found["message"] == "it \x1b[31m failed"
    assert found["exception"].endswith("ValueError: of no use\nat all")
    assert "\x1b" not in line


def test_text_says_who_it_is_from_and_steers_no_terminal(capsys):
    show_logs(LogSettings(), "worker")
    logging.getLogger("ldm_serve.x").warning("it \x1b[31m failed")
    logging.getLogger("ldm_serve.x").info("all is well")

    assert capsys.readouterr().err == "worker: warning: it \\x1b[31m failed\n"
