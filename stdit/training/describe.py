"""Describes a run before it trains: `--dry-run`, the plan's picture, and shapes without clips."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path

from stdit.data.plan.exclusions import explain_exclusions
from stdit.data.plan.split import balance, split
from stdit.training.engine.parallel import World
from stdit.training.setup.build import RunComponents, build
from stdit.training.setup.footprint import build_on_meta, footprint
from stdit.training.setup.resolve import ResolvedConfig


def dry_run(config: ResolvedConfig, world: World) -> None:
    """Prints the plan, the shapes and the memory that training would take, and trains nothing."""
    components = build(config, world)
    if world.is_main:
        print("\n".join(description(components, world.size)))


def description(components: RunComponents, ranks: int) -> list[str]:
    config, plan = components.config, components.plan
    bound = plan.token_bound()
    splits = [split(plan.items(i), ranks, bound) for i in range(min(plan.num_steps, 32))]
    micro_steps = sum(map(len, splits)) / len(splits)
    epochs = config.schedule.steps / plan.num_steps
    lines = [
        f"{config.objective.kind}: {components.parameters:,} parameters that train",
        f"{plan.num_items:,} clips, {plan.num_steps:,} steps per epoch, {config.schedule.steps:,} steps "
        f"({epochs:.3g} epochs), {plan.num_items / plan.num_steps:.4g} clips per step",
        f"{ranks} rank(s): {micro_steps:.3g} micro-steps per step, packs of at most {bound:,} tokens, balance "
        f"{balance(*splits):.3f}",
    ]
    for shape, count, tokens in zip(components.assignment.shapes, components.assignment.counts, plan.tokens):
        lines.append(f"  {shape}: {int(count):,} clips of {tokens:,} tokens")
    lines += unused_shapes_and_clips(components)
    fullest = max(max(packs.sums()[0]) for packs in itertools.chain(*splits))
    lines.append(memory(components, fullest, ranks))
    return lines


def unused_shapes_and_clips(components: RunComponents) -> list[str]:
    """Shapes without clips, and why clips are left out: the signs of a wrong data.shapes or data.fps."""
    assignment, lines = components.assignment, []
    if empty := [str(shape) for shape, count in zip(assignment.shapes, assignment.counts) if not count]:
        lines.append(f"no clip goes to {', '.join(empty)}")
    for group in explain_exclusions(
        components.manifest, assignment, components.config.data, components.objective.tokens
    ):
        details = f" ({group.details})" if group.details else ""
        lines.append(f"{group.clips:,} clips left out: {group.text}{details}")
    return lines


def memory(components: RunComponents, tokens: int, ranks: int) -> str:
    """The memory of a rank whose fullest pack has so many tokens."""
    config = components.config
    found = footprint(config, build_on_meta(config), components.shapes[0], tokens, ranks, components.parameters)
    each = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in asdict(found).items())
    return f"memory per rank: {found.total / 2**30:.2f} GiB ({each})"


def draw(components: RunComponents, ranks: int, path: Path) -> None:
    """Draws the plan for the report; a picture that is there stays."""
    if path.exists():
        return
    from stdit.data.plan.picture import draw_plan, measure_plan

    bound = components.plan.token_bound()
    measures = measure_plan(components.plan, ranks, bound, most=64)
    unit = "pixel" if components.config.objective.kind == "vae" else "FLOP"
    draw_plan(components.plan, components.assignment.shapes, ranks, bound, path, measures, unit)
