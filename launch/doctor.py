"""`sivae-fast doctor` over all ranks: deepspeed launch/doctor.py --config launch/configs/ffhq256.yaml

Takes the place of launch/train.py in any launch command: without --config, the quickstart is looked at. One
line a check; exit code 1 where one failed.
"""

import sys
from pathlib import Path

from sivae_fast.cli import main

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"

if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]  # from the deepspeed launcher
    sys.exit(main(["doctor", "--config", str(QUICKSTART), *arguments]))  # of two --config the last one counts
