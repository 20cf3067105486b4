"""Trains any system: deepspeed launch/train.py --config launch/configs/ffhq256.yaml data.path=ffhq256.zip

Also under torchrun and plain python. The same command resumes. `--dry-run` prints the resolved configuration.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from sivae_fast.checkpoint import CheckpointError
from sivae_fast.config import ConfigError, load_config
from sivae_fast.run import RunInUse
from sivae_fast.training.loop import Diverged, train

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default=str(QUICKSTART), help="YAML file (default: the quickstart)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. train.batch=64")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        config = load_config(options.config, options.overrides)
        if options.dry_run:
            print(config.to_yaml(), end="")
        else:
            train(config)
    except (ConfigError, CheckpointError, Diverged, RunInUse, ImportError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
