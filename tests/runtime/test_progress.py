import io
import re
import threading
import time

import pytest

from ldm_runtime.progress import Lines, Silent, reporting_to


class Screen(io.StringIO):
    """A terminal that tells when something was written to it."""

    def __init__(self):
        super().__init__()
        self.drawn = threading.Condition()

    def isatty(self):
        return True

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


def test_lines_say_the_time_to_go_and_what_became_of_each_step():
    stream = io.StringIO()
    lines = Lines(stream)

    lines.plan({"tokenizer": 0.0, "unet": 75.0})
    for step, outcome in (("tokenizer", "reused"), ("unet", "built")):
        lines.begin(step)
        lines.end(step, outcome)

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


def test_without_estimates_lines_promise_nothing():
    stream = io.StringIO()

    Lines(stream).plan({"image 1/2": None, "image 2/2": None})

    assert stream.getvalue() == ""


def test_a_stream_that_is_no_terminal_gets_lines():
    stream = io.StringIO()

    with reporting_to(stream) as progress:
        progress.begin("unet")
        progress.end("unet", "built")

    assert re.fullmatch(r"unet +built in \d+\.\d s\n", stream.getvalue())


def test_the_bar_shows_the_step_the_share_and_the_time_left(screen):
    with reporting_to(screen) as bar:
        bar.plan({"text_encoder": 50.0, "unet": 0.0, "vae_decoder": 1e6})
        bar.begin("text_encoder")

        assert screen.wait_for("text_encoder (about 16667 min 30 s left)")

    assert "[........................] text_encoder" in screen.getvalue()


def test_the_time_left_follows_the_pace_once_there_is_one(screen):
    with reporting_to(screen) as bar:
        bar.plan({"fast": 100.0, "slow": 100.0})
        bar.begin("fast")
        bar.end("fast", "reused")
        bar.begin("slow")

        assert screen.wait_for("[############............] slow (about 0 s left)")


def test_a_step_that_takes_longer_than_thought_does_not_fill_its_part(screen):
    with reporting_to(screen) as bar:
        bar.plan({"unet": 0.001, "golden": 0.001})
        bar.begin("unet")
        time.sleep(0.05)

        assert screen.wait_for("[###########.............] unet")


def test_a_step_may_say_itself_how_far_it_is_and_need_no_estimate(screen):
    with reporting_to(screen) as bar:
        bar.plan({"image 1/2": None, "image 2/2": None})
        bar.begin("image 1/2")
        assert "left" not in screen.getvalue()
        bar.advance(0.5)

        assert screen.wait_for("[######..................] image 1/2, at 50% (about")


def test_a_step_without_a_plan_shows_its_own_time(screen):
    with reporting_to(screen) as bar:
        bar.begin("reading the checkpoint")

        assert screen.wait_for("reading the checkpoint (0 s)")


def test_a_bar_with_nothing_to_do_is_full(screen):
    with reporting_to(screen) as bar:
        bar.plan({"unet": 0.0})
        bar.begin("unet")

        assert screen.wait_for(f"[{'#' * 24}] unet (about 0 s left)")


def test_between_two_steps_the_line_is_free_for_others(screen):
    with reporting_to(screen) as bar:
        bar.plan({"unet": 1.0})
        bar.begin("unet")
        bar.end("unet", "built")
        screen.write("out/0000.png\n")
        time.sleep(0.7)

        assert screen.getvalue().endswith("\r\x1b[Kout/0000.png\n")


def test_the_bar_is_wiped_when_it_is_done_even_after_an_error(screen):
    with pytest.raises(ZeroDivisionError), reporting_to(screen):
        1 / 0  # noqa: B018

    assert screen.getvalue().endswith("\r\x1b[K")


def test_a_bar_that_is_done_draws_no_more(screen):
    with reporting_to(screen) as bar:
        bar.plan({"unet": 1.0})
        bar.begin("unet")
    before = screen.getvalue()

    time.sleep(0.7)

    assert screen.getvalue() == before


def test_silence_takes_every_message(capsys):
    silent = Silent()

    silent.plan({"unet": 1.0})
    silent.begin("unet")
    silent.end("unet", "built")

    assert capsys.readouterr() == ("", "")
