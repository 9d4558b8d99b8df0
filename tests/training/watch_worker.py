"""A rank that only sums, and so waits for the others. Arguments: minutes of patience, and a step to fail at."""

from __future__ import annotations

import sys
import time

import torch

from stdit.cli.main import run_command
from stdit.heartbeat import HEARTBEAT
from stdit.training.engine.parallel import join_world, leave_world
from stdit.training.watch import watched


def work() -> int:
    minutes, failing = float(sys.argv[1]), int(sys.argv[2])
    world = join_world(60.0)  # the collectives themselves would wait
    begun, told = time.monotonic(), False
    try:
        with watched(world, minutes):
            for step in range(100_000):
                HEARTBEAT.doing(f"step {step}")
                if step == failing:
                    raise RuntimeError("a bug of ours")
                world.sum_(torch.ones(1))
                time.sleep(0.01)
                if not told and time.monotonic() - begun > 3:  # the others know of a step
                    told = True
                    print("under way", flush=True)
    finally:
        leave_world()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(work, []))
