"""Runs a training: from its first or its last saved step to its report, in a run folder of its own."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from stdit.errors import StditError
from stdit.evaluation.run_metrics import read_metrics
from stdit.files import local_folder
from stdit.heartbeat import HEARTBEAT
from stdit.locks import NAME, locked
from stdit.training.config import RunConfig, save_config
from stdit.training.describe import draw, unused_shapes_and_clips
from stdit.training.engine.checkpoint import published, remove_strays
from stdit.training.engine.parallel import World
from stdit.training.outputs.export import check_export
from stdit.training.setup.resolve import ResolvedConfig, resolve
from stdit.training.trainer import Trainer

REPLACED = ("config.yaml", "metrics.jsonl", "report.html", "plan.png", "checkpoints", "model")  # by a run


def run(config: RunConfig, world: World) -> None:
    """Trains to the last step, from the last checkpoint if there is one; a finished run only says so.

    Rank 0 holds the run folder's lock meanwhile: a second training there is refused.
    """
    if not config.run.path:
        raise StditError("the run has no folder: add run=PATH, such as run=runs/toy.")
    folder = local_folder("run", config.run.path)
    config = replace(config, run=replace(config.run, path=str(folder)))
    with ExitStack() as held:
        trainer = Trainer(config, world)
        if not trainer.is_finished:
            world.from_main(lambda: held.enter_context(_lock(folder)))
            trainer = Trainer(config, world)  # another process may have saved since
        if trainer.is_finished:
            trainer.say(
                f"{folder} is finished after {trainer.step} steps: {folder / 'model'}. Raise schedule.steps to go on."
            )
            if world.is_main and not (folder / "report.html").exists():
                report(trainer)
            return
        _train(resolve(config), trainer, world)


def _lock(folder: Path) -> AbstractContextManager[None]:
    """The lock of a run folder. Raises StditError if it has files that no training wrote and that would be replaced."""
    ours = (folder / NAME).exists() or published(folder) or read_metrics(folder, "start")
    there = [name for name in REPLACED if os.path.lexists(folder / name)]
    if there and not ours:
        raise StditError(
            f"{folder} holds {', '.join(there)}, which no training wrote: it would be replaced. Rename it, or choose "
            f"another run=PATH."
        )
    return locked(folder, "a training", "Wait for its end, or choose another run=PATH.", keep=True)


def _train(config: ResolvedConfig, trainer: Trainer, world: World) -> None:
    folder = trainer.folder

    def begin() -> None:
        remove_strays(folder)
        check_export(config)
        save_config(trainer.config, folder / "config.yaml")

    world.from_main(begin)
    trainer.prepare(config)
    for line in unused_shapes_and_clips(trainer.components):
        trainer.say(line)
    HEARTBEAT.doing("drawing the plan")
    world.from_main(partial(draw, trainer.components, world.size, folder / "plan.png"))
    trainer.train()
    world.from_main(partial(report, trainer))


def report(trainer: Trainer) -> None:
    from stdit.evaluation.report import write_report

    HEARTBEAT.doing("writing the report")
    trainer.say(f"report: {write_report(trainer.folder)}")
