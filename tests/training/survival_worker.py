"""A rank of `stdit train` that a test harms. Arguments: CONFIG OVERRIDE…; STDIT_NAN=RANK:STEP:COUNT turns the latents
of a rank's clips to nan in COUNT steps from STEP on; STDIT_OLDER=RANK hides the newest checkpoint from a rank."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from stdit.cli.main import run_command
from stdit.cli.train import train
from stdit.training import run as run_module
from stdit.training import trainer as trainer_module
from stdit.training.engine import agreement
from stdit.training.objectives.flow import FlowObjective
from stdit.training.objectives.protocol import StepKey

torch.set_num_threads(1)
trainer_module.measure_peak = lambda *_: 1e12
run_module.draw = run_module.report = lambda *_: None
prepare = FlowObjective.prepare


def poisoned(self: FlowObjective, examples: Any, items: Any, key: StepKey) -> Any:
    batch = prepare(self, examples, items, key)
    rank, first, count = map(int, os.environ["STDIT_NAN"].split(":"))
    if int(os.environ["RANK"]) == rank and first <= key.done < first + count and examples:
        batch.pack.tokens[:] = math.nan
    return batch


def older(run: Path) -> list[Path]:
    return candidates(run)[:-1]


candidates = agreement.candidates

if __name__ == "__main__":
    if os.environ.get("STDIT_OLDER") == os.environ["RANK"]:
        agreement.candidates = older
    if "STDIT_NAN" in os.environ:
        FlowObjective.prepare = poisoned  # type: ignore[method-assign]
    sys.exit(run_command(train, sys.argv[1:]))
