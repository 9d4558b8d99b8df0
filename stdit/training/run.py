"""A run from outside: train it to its end, or say what it would do."""

from __future__ import annotations

import itertools
import os
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from stdit.data.plan.buckets import REASONS
from stdit.data.plan.left_out import explain
from stdit.data.plan.split import balance, split
from stdit.errors import StditError
from stdit.files import local_folder
from stdit.heartbeat import HEARTBEAT
from stdit.locks import NAME, locked
from stdit.training.config import RunConfig, save_config
from stdit.training.engine.checkpoint import published, remove_strays
from stdit.training.engine.parallel import World
from stdit.training.outputs.export import check_export
from stdit.training.outputs.metrics import read_metrics
from stdit.training.setup.build import RunComponents, build
from stdit.training.setup.footprint import footprint, outline
from stdit.training.setup.initial_weights import follow_init
from stdit.training.trainer import Trainer

OURS = ("config.yaml", "metrics.jsonl", "report.html", "plan.png", "checkpoints", "model")  # what a run replaces


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
            world.from_main(lambda: held.enter_context(_own(folder)))
            trainer = Trainer(config, world)  # what lies there now may be newer
        if trainer.is_finished:
            trainer.say(
                f"{folder} is finished after {trainer.step} steps: {folder / 'model'}. Raise schedule.steps to go on."
            )
            if world.is_main and not (folder / "report.html").exists():
                report(trainer)
            return
        _train(config, trainer, world)


def _own(folder: Path) -> AbstractContextManager[None]:
    """The lock of a run folder; raises StditError where somebody else's files would be replaced."""
    ours = (folder / NAME).exists() or published(folder) or read_metrics(folder, "start")
    there = [name for name in OURS if os.path.lexists(folder / name)]
    if there and not ours:
        raise StditError(
            f"{folder} holds {', '.join(there)}, which no training wrote: it would be replaced. Rename it, or choose "
            f"another run=PATH."
        )
    return locked(folder, "a training", "Wait for its end, or choose another run=PATH.", keep=True)


def _train(config: RunConfig, trainer: Trainer, world: World) -> None:
    folder = trainer.folder

    def begin() -> None:
        remove_strays(folder)
        check_export(follow_init(config))
        save_config(config, folder / "config.yaml")

    world.from_main(begin)
    trainer.prepare()
    for line in gaps(trainer.parts):
        trainer.say(line)
    HEARTBEAT.doing("drawing the plan")
    world.from_main(partial(draw, trainer.parts, world.size, folder / "plan.png"))
    trainer.train()
    world.from_main(partial(report, trainer))


def report(trainer: Trainer) -> None:
    from stdit.evaluation.report import write_report

    HEARTBEAT.doing("writing the report")
    trainer.say(f"report: {write_report(trainer.folder)}")


def draw(parts: RunComponents, ranks: int, path: Path) -> None:
    """The plan's picture, for the report; one that is there stays."""
    if path.exists():
        return
    from stdit.data.plan.picture import draw_plan, measure_plan

    bound = parts.plan.token_bound()
    measures = measure_plan(parts.plan, ranks, bound, most=64)
    unit = "pixel" if parts.config.objective.kind == "vae" else "FLOP"
    draw_plan(parts.plan, parts.assignment.shapes, ranks, bound, path, measures, unit)


def dry_run(config: RunConfig, world: World) -> None:
    """Prints the plan, the shapes and the memory that training would take, and trains nothing."""
    parts = build(config, world)
    if not world.is_main:
        return
    for line in description(config, parts, world.size):
        print(line)


def description(config: RunConfig, parts: RunComponents, ranks: int) -> list[str]:
    plan = parts.plan
    bound = plan.token_bound()
    splits = [split(plan.items(i), ranks, bound) for i in range(min(plan.num_steps, 32))]
    micro_steps = sum(map(len, splits)) / len(splits)
    epochs = config.schedule.steps / plan.num_steps
    lines = [
        f"{config.objective.kind}: {parts.parameters:,} parameters that train",
        f"{plan.num_items:,} clips, {plan.num_steps:,} steps an epoch, {config.schedule.steps:,} steps "
        f"({epochs:.3g} epochs), {plan.num_items / plan.num_steps:.4g} clips a step",
        f"{ranks} rank(s): {micro_steps:.3g} micro-steps a step, packs of at most {bound:,} tokens, balance "
        f"{balance(*splits):.3f}",
    ]
    for shape, count, tokens in zip(parts.assignment.shapes, parts.assignment.counts, plan.tokens):
        lines.append(f"  {shape}: {int(count):,} clips of {tokens:,} tokens")
    lines += gaps(parts)
    fullest = max(max(packs.sums()[0]) for packs in itertools.chain(*splits))
    lines.append(memory(config, parts, fullest, ranks))
    return lines


def gaps(parts: RunComponents) -> list[str]:
    """Shapes that no clip goes to, and why clips go to none: what a wrong data.shapes or data.fps shows in."""
    assignment, lines = parts.assignment, []
    if empty := [str(shape) for shape, count in zip(assignment.shapes, assignment.counts) if not count]:
        lines.append(f"no clip goes to {', '.join(empty)}")
    for one in explain(parts.manifest, assignment, parts.config.data, parts.objective.tokens):
        lines.append(f"{one.clips:,} clips left out: {REASONS[one.reason]}{f' ({one.details})' if one.details else ''}")
    return lines


def memory(config: RunConfig, parts: RunComponents, fullest: int, ranks: int) -> str:
    """Bytes on a rank, of the fullest pack's tokens."""
    found = footprint(config, outline(config), parts.shapes[0], fullest, ranks, parts.parameters)
    each = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in asdict(found).items())
    return f"memory a rank: {found.total / 2**30:.2f} GiB ({each})"
