"""One of several ranks (or the only one): runs trainings, one after the other, and writes what each step saw.

Arguments: config folder, then KIND:SETTING+SETTING+…, KIND being flow or vae. Each rank appends a line a step to
steps-RANK.jsonl of the run folder. STDIT_KILL=RANK:STEP kills this rank in that step, before it updates.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from stdit.training import run as run_module
from stdit.training import trainer as trainer_module
from stdit.training.batches import StepClips
from stdit.training.config import load_config
from stdit.training.engine.parallel import join_world, leave_world
from stdit.training.objectives.protocol import StepResult, Update
from stdit.training.trainer import Trainer

torch.set_num_threads(1)
trainer_module.measure_peak = lambda *_: 1e12
run_module.draw = run_module.report = lambda *_: None
accumulate, update = Trainer.accumulate, Trainer.update
seen: dict[str, Any] = {}


def watched_accumulate(self: Trainer, clips: StepClips) -> StepResult:
    result = accumulate(self, clips)
    seen.update(loss=float(result.loss).hex(), clips=[example.clip_id for example in clips.examples])
    return result


def watched_update(self: Trainer) -> Update:
    victim, step = map(int, os.environ.get("STDIT_KILL", "-1:0").split(":"))
    if (self.world.rank, self.step + 1) == (victim, step):
        os.kill(os.getpid(), signal.SIGKILL)
    found = update(self)
    line = json.dumps({"step": self.step, "norm": found.norm.hex(), **seen})
    with open(self.folder / f"steps-{self.world.rank}.jsonl", "a") as file:
        file.write(f"{line}\n")
    return found


if __name__ == "__main__":
    Trainer.accumulate, Trainer.update = watched_accumulate, watched_update  # type: ignore[method-assign]
    world = join_world()
    for run in sys.argv[2:]:
        kind, _, settings = run.partition(":")
        run_module.run(load_config(Path(sys.argv[1]) / f"{kind}.yaml", settings.split("+")), world)
    leave_world()
