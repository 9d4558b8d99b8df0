"""`stdit train`, for who works in a clone: python train.py CONFIG [key=value …]."""

import sys

from stdit.cli.main import run_command
from stdit.cli.train import train

if __name__ == "__main__":
    sys.exit(run_command(train, prog="train.py"))
