#!/usr/bin/env python
"""The same as `stdit sample`, for who works in a clone: python sample.py --help"""

from __future__ import annotations

import sys

from stdit.cli.main import run_command
from stdit.cli.sample.command import sample

if __name__ == "__main__":
    sys.exit(run_command(sample, prog="sample.py"))
