"""Trains any system: deepspeed launch/train.py --config launch/configs/ffhq256.yaml data.path=ffhq256.zip

Also under torchrun and plain python. The same command resumes. `--dry-run` finds every error that a start
would show before it reads data, and prints the resolved configuration.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sivae_fast.config import Config

UNFINISHED = 75  # of sysexits.h: try again later
QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default=str(QUICKSTART), help="YAML file (default: the quickstart)")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the configuration as a start would, print it and stop"
    )
    parser.add_argument(
        "--finished",
        action="store_true",
        help=f"train nothing; exit code 0 where the run has seen train.images, else {UNFINISHED}",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. train.batch=64")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sivae_fast").setLevel(logging.INFO)  # and of other packages only the warnings
    # What DeepSpeed calls in PyTorch, once a rank: nothing that who trains could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\.")
    try:
        return run(options)
    except ModuleNotFoundError as error:
        print(f"error: a package is missing ({error}): pip install 'sivae-fast[train]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before or after the iterations, which it ends in good order
        print("stopped", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """What the options ask for; returns the exit code. Wrong input ends in one line on standard error."""
    # Imported here so that Ctrl-C while PyTorch is loaded ends quietly.
    from sivae_fast.config import load_config
    from sivae_fast.run import RunInUse
    from sivae_fast.training.agreement import RankFailed, RanksDiffer
    from sivae_fast.training.guard import Diverged
    from sivae_fast.training.loop import train
    from sivae_fast.training.starting import check_start

    # Errors that say by themselves what to do; everything else is a defect and shows where it happened.
    expected = (Diverged, ImportError, OSError, RankFailed, RanksDiffer, RunInUse, ValueError)
    try:
        config = load_config(options.config, options.overrides)
        if options.dry_run:
            if os.environ.get("RANK", "0") == "0":  # the first rank speaks for all
                check_start(config)
                print(config.to_yaml(), end="")
        elif options.finished:
            return 0 if finished(config) else UNFINISHED
        else:
            train(config)
    except expected as error:
        rank = f"rank {os.environ.get('RANK', 0)}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        print(f"error: {rank}{error}", file=sys.stderr)
        return 1
    return 0


def finished(config: Config) -> bool:
    """Whether the newest run of this configuration (with run.new, of this launch) has seen all its images."""
    from sivae_fast.run import Run, launch_name, read_stats

    launch = launch_name() if config.run.new else ""
    folder = Run.find(config.run.folder, config.run.name, config.identity(), launch)
    ticks = read_stats(folder) if folder else []
    return bool(ticks) and ticks[-1]["images"] >= config.train.images


if __name__ == "__main__":
    sys.exit(main())
