"""What several commands ask of the numbers and names that they are given."""

from __future__ import annotations

import os
from pathlib import Path


def positive(**options: int) -> None:
    """Raises ValueError for the first option that is below 1."""
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, must be at least 1")


def check_pause(milliseconds: int, out: Path) -> None:
    """Raises ValueError for a time of one picture that the animation `out` cannot hold.

    A .gif counts hundredths of a second in 16 bits, and viewers show those of 0 as slowly as they like.
    """
    least = 10 if out.suffix == ".gif" else 1
    if not least <= milliseconds <= 655_350:
        raise ValueError(f"milliseconds is {milliseconds}, must be {least} to 655350 for {out}")


def named(out: str | os.PathLike, *endings: str, folder: bool = False) -> Path:
    """The path `out`. Raises ValueError for a name without one of the endings.

    folder: a name without any ending is accepted, too, unless something is there that is no folder.
    """
    path = Path(out)
    is_folder = folder and not path.suffix and (path.is_dir() or not path.exists())
    if path.suffix not in endings and not is_folder:
        *others, last = (*endings, "a folder without an ending") if folder else endings
        accepted = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{path}: a name ending in {accepted} is needed")
    return path


def only_own(folder: Path, count: int, ending: str) -> None:
    """Raises ValueError where `folder` holds other files than the `count` numbered ones that will be written.

    What is left of an earlier command would pass for a part of this one's set.
    """
    own = {f"{number:06d}{ending}" for number in range(count)}
    others = sorted({path.name for path in folder.iterdir()} - own) if folder.is_dir() else []
    if others:
        raise ValueError(
            f"{folder} holds {len(others)} files that are not of these {count}, such as {others[0]}: give a "
            "folder that is new or empty"
        )
