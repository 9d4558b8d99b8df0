"""Runs a training in its run folder, from its first or last saved step to its report."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from stdit.errors import StditError
from stdit.evaluation.report import read_metrics
from stdit.files import local_folder
from stdit.heartbeat import HEARTBEAT
from stdit.locks import NAME, locked
from stdit.training.config import RunConfig, save_config
from stdit.training.engine.agreement import check_shared
from stdit.training.engine.checkpoint import Checkpoint, DamagedCheckpoint, published, remove_strays
from stdit.training.engine.parallel import World
from stdit.training.outputs.export import check_export, exported_step
from stdit.training.resume import check_config
from stdit.training.setup.build import RunComponents
from stdit.training.setup.forecast import unused_shapes_and_clips
from stdit.training.setup.resolve import ResolvedConfig, resolve
from stdit.training.trainer import Trainer, say

REPLACED = ("config.yaml", "metrics.jsonl", "report.html", "plan.png", "checkpoints", "model")  # by a run


def run(config: RunConfig, world: World) -> None:
    """Trains to the last step, from the last checkpoint if there is one; a finished run only says so.

    Rank 0 holds the run folder's lock meanwhile: a second training there is refused.
    """
    if not config.run.path:
        raise StditError("the run has no folder: add run=PATH, such as run=runs/toy.")
    folder = local_folder("run", config.run.path)
    config = replace(config, run=replace(config.run, path=str(folder)))
    find_end = partial(_finished_step, config, folder)
    with ExitStack() as held:
        step = world.from_main(find_end)
        if step is None:
            world.from_main(lambda: held.enter_context(_lock(folder)))
            step = world.from_main(find_end)  # another process may have finished it since
        if step is None:
            check_shared(folder, world)
            world.from_main(partial(remove_strays, folder))
            _train(resolve(config), Trainer(config, world), world)
        elif world.is_main:
            say(f"{folder} is finished after {step} steps: {folder / 'model'}. Raise schedule.steps to go on.")
            if not (folder / "report.html").exists():
                report(folder)


def _finished_step(config: RunConfig, folder: Path) -> int | None:
    """The last step, if it is done and its weights, not an earlier end's, are exported. Rank 0's answer counts.

    Raises StditError if the run has another config.
    """
    try:
        latest = Checkpoint.latest(folder)
    except DamagedCheckpoint:  # `agree` names it
        return None
    if latest is None:
        return None
    check_config(latest, config)
    return latest.step if latest.step >= config.schedule.steps and exported_step(folder) == latest.step else None


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
        check_export(config)
        save_config(trainer.config, folder / "config.yaml")

    world.from_main(begin)
    trainer.prepare(config)
    parts = trainer.components
    for line in unused_shapes_and_clips(parts.manifest, parts.assignment, config.data, parts.objective.tokens):
        trainer.say(line)
    HEARTBEAT.doing("drawing the plan")
    world.from_main(partial(draw, trainer.components, world.size, folder / "plan.png"))
    trainer.train()
    world.from_main(partial(report, folder))


def draw(components: RunComponents, ranks: int, path: Path) -> None:
    """Draws the plan for the report; a picture that is there stays."""
    if path.exists():
        return
    from stdit.data.plan.picture import draw_plan, measure_plan

    config, bound = components.config, components.plan.token_bound()
    groups, each = config.parallel.groups(ranks), config.parallel.name_of_group
    measures = measure_plan(components.plan, groups, bound, most=64)
    unit = "pixel" if config.objective.kind == "vae" else "FLOP"
    draw_plan(components.plan, components.assignment.shapes, groups, bound, path, measures, unit, each)


def report(folder: Path) -> None:
    from stdit.evaluation.report import write_report

    HEARTBEAT.doing("writing the report")
    say(f"report: {write_report(folder)}")
