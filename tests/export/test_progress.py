import io
import re
import threading
import time

import pytest

from ldm_export.progress import Bar, Lines, Silent


class Screen(io.StringIO):
    """A stream that tells when something was drawn on it."""

    def __init__(self):
        super().__init__()
        self.drawn = threading.Condition()

    def write(self, text):
        with self.drawn:
            count = super().write(text)
            self.drawn.notify_all()
        return count

    def wait_for(self, text, seconds=10.0):
        with self.drawn:
            return self.drawn.wait_for(lambda: text in self.getvalue(), timeout=seconds)


@pytest.fixture
def screen():
    return Screen()


def test_lines_say_the_time_to_go_and_what_became_of_each_stage():
    stream = io.StringIO()
    lines = Lines(stream)

    lines.plan({"tokenizer": 0.0, "unet": 75.0})
    for stage, outcome in (("tokenizer", "reused"), ("unet", "built")):
        lines.begin(stage)
        lines.end(stage, outcome)

    first, second, third = stream.getvalue().splitlines()
    assert first == "about 1 min 15 s to go"
    assert re.fullmatch(r"tokenizer +reused in \d+\.\d s", second)
    assert re.fullmatch(r"unet +built in \d+\.\d s", third)


def test_lines_have_no_control_characters():
    stream = io.StringIO()
    lines = Lines(stream)

    lines.plan({"unet": 3.0})
    lines.begin("unet")
    lines.end("unet", "built")

    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_the_bar_shows_the_stage_the_share_and_the_time_left(screen):
    with Bar(screen) as bar:
        bar.plan({"text_encoder": 50.0, "unet": 50.0})
        bar.begin("text_encoder")
        bar.end("text_encoder", "built")
        bar.begin("unet")

        assert screen.wait_for("unet (about 4")

    line = screen.getvalue().split("\r\x1b[K")[-2]
    assert re.fullmatch(r"\[#{12}\.{12}\] unet \(about 4\d s left\)", line)


def test_a_stage_that_takes_longer_than_thought_does_not_fill_its_part(screen):
    with Bar(screen) as bar:
        bar.plan({"unet": 0.001, "golden": 0.001})
        bar.begin("unet")
        time.sleep(0.05)

        assert screen.wait_for("[###########.............] unet")


def test_before_the_plan_the_bar_says_that_it_reads(screen):
    with Bar(screen):
        assert screen.wait_for("reading the checkpoint")


def test_a_bar_with_nothing_to_do_is_full(screen):
    with Bar(screen) as bar:
        bar.plan({"unet": 0.0})
        bar.begin("unet")

        assert screen.wait_for(f"[{'#' * 24}] unet (about 0 s left)")


def test_the_bar_is_wiped_when_it_is_done_even_after_an_error(screen):
    with pytest.raises(ZeroDivisionError), Bar(screen):
        1 / 0  # noqa: B018

    assert screen.getvalue().endswith("\r\x1b[K")


def test_a_bar_that_is_done_draws_no_more(screen):
    with Bar(screen) as bar:
        bar.plan({"unet": 1.0})
    before = screen.getvalue()

    time.sleep(0.7)

    assert screen.getvalue() == before


def test_silence_takes_every_message(capsys):
    silent = Silent()

    silent.plan({"unet": 1.0})
    silent.begin("unet")
    silent.end("unet", "built")

    assert capsys.readouterr() == ("", "")
