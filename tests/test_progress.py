import io
import sys

import pytest

from sivae_fast.progress import Progress, _shortened, duration


class Terminal(io.StringIO):
    """`seen`: what was flushed."""

    seen = ""

    def isatty(self):
        return True

    def flush(self):
        self.seen = self.getvalue()


def test_plain_output_has_tick_lines_only():
    stream = io.StringIO()
    progress = Progress(1000, stream=stream)
    progress.show(100, 0.05, 0.01, 2**30)
    progress.show(200, 0.05, 0.01, 2**30, "lod 2 blend 0.50", tick=True)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("200/1,000 images  20%")
    assert line.endswith("lod 2 blend 0.50")
    assert "step 50 ms  data 10 ms  memory 1.0 GiB" in line


def test_a_last_batch_that_goes_beyond_the_goal_is_no_more_than_the_whole():
    assert Progress(200).text(208, 10.0, 0.0, 0.0, 0).startswith("208/200 images  100%")


def test_a_terminal_line_is_rewritten_not_too_often_and_ended():
    stream = Terminal()
    progress = Progress(1000, stream=stream, interval=60)
    for images in (100, 200, 300):
        progress.show(images, 0.05, 0.01, 0)
    assert stream.seen.count("\r") == 1
    assert "\n" not in stream.getvalue()
    progress.clear()
    progress.clear()
    assert stream.seen.count("\n") == 1


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_terminal_line_ends_with_a_whole_part_and_keeps_the_last_tick(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    progress = Progress(18_000_000, 10_000_000, stream=stream, interval=0)
    progress.show(10_200_000, 0.05, 0.01, 2**30, "level 2  kl_real 0.5183", tick=True)
    progress.show(10_200_032, 0.05, 0.01, 2**30)
    line = stream.getvalue().rpartition("\x1b[2K")[2]
    whole = progress.text(10_200_032, progress._rate, 0.05, 0.01, 2**30, "level 2  kl_real 0.5183")
    assert whole.startswith(line) and (whole + "  ")[len(line) :].startswith("  ")
    assert len(line) < columns
    assert columns < 80 or " left" in line
    assert columns < 200 or line.endswith("level 2  kl_real 0.5183")


def test_as_many_whole_parts_as_fit():
    text = "12 images  5 left  9 GiB"
    shown = [_shortened(text, width) for width in (24, 23, 17, 16)]
    assert shown == [text, "12 images  5 left", "12 images  5 left", "12 images"]


def test_the_last_column_stays_free(monkeypatch):
    """A terminal would wrap the line there, and clear the wrong one next."""
    progress = Progress(1000, stream=Terminal(), interval=0)
    text = progress.text(0, 0.0, 0.0, 0.0, 0)
    for columns, whole in ((len(text), False), (len(text) + 1, True)):
        monkeypatch.setenv("COLUMNS", str(columns))
        progress.show(0, 0.0, 0.0, 0)
        assert progress.stream.getvalue().endswith(text) == whole


def test_a_line_is_due_on_a_terminal_after_the_interval():
    progress, often = (
        Progress(1000, stream=Terminal(), interval=60),
        Progress(1000, stream=Terminal(), interval=0),
    )
    assert progress.due() and often.due() and not Progress(1000, stream=io.StringIO(), interval=0).due()
    progress.show(100, 0.05, 0.01, 0)
    often.show(100, 0.05, 0.01, 0)
    assert not progress.due() and often.due()


def test_rate_and_time_left_count_from_the_resumed_image(monkeypatch):
    clock = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr("sivae_fast.progress.time.perf_counter", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress(2000, start=1000, stream=stream)
    progress.show(1200, 0.1, 0.0, 0, tick=True)
    progress.show(1400, 0.1, 0.0, 0, tick=True)
    first, second = stream.getvalue().splitlines()
    assert "100.0 images/s" in first and "0m 08s left" in first
    assert "100.0 images/s" in second and "0m 06s left" in second


def test_the_rate_is_that_of_training_alone_with_a_half_life_of_10_seconds(monkeypatch):
    steps = (
        (4.0, 0, 0.0, "0.0 images/s  unknown left"),
        (10.0, 1000, 0.0, "100.0 images/s"),
        (10.0, 1010, 0.0, "100.0 images/s"),  # no time has gone by
        (30.0, 5000, 0.0, "175.0 images/s"),  # 200 for two half-lives
        (40.0, 5000, 0.0, "175.0 images/s"),
        (90.0, 6750, 50.0, "175.0 images/s"),
    )
    clock = iter([0.0, *(seconds for seconds, *_ in steps)])
    monkeypatch.setattr("sivae_fast.progress.time.perf_counter", lambda: next(clock))
    progress = Progress(100_000, stream=io.StringIO())
    for _, images, skipped, said in steps:
        progress.skip(skipped)
        progress.show(images, 0.0, 0.0, 0, tick=True)
        assert said in progress.stream.getvalue().splitlines()[-1]
    assert "0.5 images/s  10m 00s left" in progress.text(99_700, 0.5, 0.0, 0.0, 0)


def test_lines_do_not_mix_with_results():
    assert Progress(1).stream is sys.stderr


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0m 00s"),
        (59.6, "1m 00s"),
        (65, "1m 05s"),
        (3600, "1h 00m"),
        (3725, "1h 02m"),
        (86400, "1d 00h"),
        (90000, "1d 01h"),
        (47 * 3600, "1d 23h"),
        (-3, "0m 00s"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
