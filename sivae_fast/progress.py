"""What a person watching sees: a line rewritten on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO


class Progress:
    """Shows images, images/s, step and data time, memory and time left of a run of `goal` images.

    `start` is the image counter the run begins at. On a terminal `show` rewrites one line at most every
    `interval` seconds, with the note of the last tick and without what is too long for it; elsewhere it
    prints only when `tick` is true.
    """

    def __init__(self, goal: int, start: int = 0, stream: TextIO | None = None, interval: float = 0.2):
        self.goal, self.stream, self.interval = goal, stream or sys.stderr, interval
        self.terminal = self.stream.isatty()
        self._images, self._rate, self._note = start, None, ""
        self._then = time.perf_counter()
        self._shown = float("-inf")
        self._open_line = False

    def due(self) -> bool:
        """Whether `show` would rewrite its line now."""
        return self.terminal and time.perf_counter() - self._shown >= self.interval

    def show(
        self,
        images: int,
        step_seconds: float,
        data_seconds: float,
        memory: int,
        note: str = "",
        tick: bool = False,
    ) -> None:
        """`step_seconds` and `data_seconds` are for one iteration, `memory` is in bytes."""
        if not tick and not self.due():
            return
        now = time.perf_counter()
        self._note = note or self._note
        rate = self._update_rate(images, now)
        text = self.text(images, rate, step_seconds, data_seconds, memory, self._note)
        self._shown = now
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write("\r\x1b[2K" + _shortened(text, width))
            self._open_line = True
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def text(
        self, images: int, rate: float, step_seconds: float, data_seconds: float, memory: int, note: str = ""
    ) -> str:
        """The line itself: `12,345/60,000 images  21%  103.2 images/s  ...`."""
        left = duration((self.goal - images) / rate) if rate > 0 else "unknown"
        parts = [
            f"{images:,}/{self.goal:,} images",
            f"{min(100 * images / max(self.goal, 1), 100):.0f}%",  # the last batch may go beyond the goal
            f"{rate:.1f} images/s",
            f"{left} left",
            f"step {1e3 * step_seconds:.0f} ms",
            f"data {1e3 * data_seconds:.0f} ms",
            f"memory {memory / 2**30:.1f} GiB",
        ]
        return "  ".join(parts + [note] * bool(note))

    def skip(self, seconds: float) -> None:
        """Leave out time that was spent on something other than training."""
        self._then += seconds

    def clear(self) -> None:
        """End the rewritten line, so that other output starts on a fresh one."""
        if self._open_line:
            self.stream.write("\n")
            self.stream.flush()
            self._open_line = False

    def _update_rate(self, images: int, now: float) -> float:
        seconds, gained = now - self._then, images - self._images
        if gained > 0 and seconds > 0:
            rate = gained / seconds
            weight = 1 - 0.5 ** (seconds / 10)  # half-life 10 s: steady, yet follows a level switch
            self._rate = rate if self._rate is None else self._rate + weight * (rate - self._rate)
            self._then, self._images = now, images
        return self._rate or 0.0


def _shortened(text: str, width: int) -> str:
    """As many whole parts of a line as fit; half a number would be another one."""
    return text if len(text) <= width else text[: width + 2].rpartition("  ")[0]


def duration(seconds: float) -> str:
    """3725 -> '1h 02m', 65 -> '1m 05s'; days from 24 hours on."""
    seconds = max(round(seconds), 0)
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    minutes = seconds // 60
    if minutes < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{minutes // 1440}d {minutes % 1440 // 60:02d}h"


def progress_bar(total: int, title: str, show: bool, done: int = 0):
    """A tqdm bar of a command; where nobody watches a terminal, one line every ten seconds."""
    from tqdm import tqdm

    pause = 0.1 if sys.stderr.isatty() else 10
    return tqdm(total=total, initial=done, desc=title, disable=not show, mininterval=pause)
