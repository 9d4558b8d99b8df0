"""Measures a plan on a number of ranks (or of groups of ranks that share packs), and draws it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stdit.data.plan.planner import Plan
from stdit.data.plan.split import MicroStepPacks, split
from stdit.files import publish
from stdit.shapes import VideoShape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHAPES_SHOWN = 12
RANKS_SHOWN = 8
MICRO_STEPS_SHOWN = 12  # and the rest of the last step


@dataclass(frozen=True)
class Measures:
    """Measures of some steps of a plan, dealt to groups of ranks. Lists have one entry per step."""

    steps: list[int]
    clips: list[int]
    tokens: list[int]
    work: list[int]  # forward FLOPs
    micro_steps: list[int]
    fullest: list[int]  # tokens of the fullest pack
    balance: list[float]
    total_balance: float = 0.0  # mean work / Σ of the slowest group's work, over all these steps
    best_balance: float = 0.0  # upper bound of it, given that a clip cannot be divided among groups
    indivisible: int = 0  # steps whose largest clip exceeds a group's share of the step


def measure_plan(
    plan: Plan, groups: int, token_bound: int, most: int = 200, track: Callable[[Sequence[int]], Iterable[int]] = iter
) -> Measures:
    """Deals up to `most` steps, evenly spread over the epoch (0: all). track: wraps the steps in a progress bar."""
    count = min(most or plan.num_steps, plan.num_steps)
    steps = [i * plan.num_steps // count for i in range(count)]
    measures = Measures(steps, [], [], [], [], [], [])
    ideal = slowest = fastest = 0.0
    indivisible = 0
    for index in track(steps):
        items = plan.items(index)
        tokens, works = zip(*(micro.sums() for micro in split(items, groups, token_bound)))  # per micro-step and group
        work, slow = sum(map(sum, works)), sum(map(max, works))
        largest = max(plan.work[b] for b in np.unique(items.bucket))
        ideal += work / groups
        slowest += slow
        fastest += max(work / groups, largest)
        indivisible += largest * groups > work
        measures.clips.append(len(items))
        measures.tokens.append(sum(map(sum, tokens)))
        measures.work.append(work)
        measures.micro_steps.append(len(works))
        measures.fullest.append(max(map(max, tokens)))
        measures.balance.append(work / groups / slow)
    return replace(measures, total_balance=ideal / slowest, best_balance=ideal / fastest, indivisible=indivisible)


def draw_plan(
    plan: Plan,
    shapes: Sequence[VideoShape],
    groups: int,
    token_bound: int,
    path: str | Path,
    measures: Measures,
    work_unit: str = "FLOP",
    each: str = "rank",
) -> None:
    """Writes a PNG: the shapes to scale, packs on the first groups as a timeline, balance over the steps.

    each: what a group is called: "rank", unless several share a pack.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    present = [b for b in np.argsort(plan.tokens, kind="stable").tolist() if plan.counts[b]]
    # From blue to red by tokens. Colours are spaced by work, so that shapes covering much of the picture differ most.
    share = np.array([int(plan.counts[b]) * plan.work[b] / plan.total_work for b in present])
    share = 0.8 * share + 0.2 / len(present)
    colours = {b: colormaps["turbo"](0.04 + 0.9 * at) for b, at in zip(present, np.cumsum(share) - share / 2)}

    splits: list[list[MicroStepPacks]] = []
    for index in range(plan.num_steps):
        splits.append(split(plan.items(index), groups, token_bound))
        if sum(map(len, splits)) >= MICRO_STEPS_SHOWN:
            break

    figure = Figure(figsize=(14, 11), layout="constrained", facecolor="white")
    top, middle, bottom = figure.subplots(3, 1, height_ratios=[3.2, 4, 2.2])
    epoch = f"{_count(plan.num_items, 'clip')} in {_count(plan.num_steps, 'step')} per epoch"
    title = f"Plan: {epoch} on {_count(groups, each)}; balance {measures.total_balance:.3f}"
    figure.suptitle(title, fontsize=15, fontweight="bold")
    _draw_shapes(top, plan, shapes, present, colours)
    _draw_packs(middle, splits, groups, colours, work_unit, each)
    _draw_balance(bottom, measures, token_bound, plan.num_steps)
    with publish(path) as part:
        figure.savefig(part, dpi=110, format="png")


def _draw_shapes(
    axes: Axes, plan: Plan, shapes: Sequence[VideoShape], present: list[int], colours: dict[int, Any]
) -> None:
    """Each shape as a rectangle to scale, its frames as a stack of sheets; only those with the most work if many."""
    from matplotlib.patches import Rectangle

    work = {b: int(plan.counts[b]) * plan.work[b] for b in present}
    kept = set(sorted(present, key=lambda b: -work[b])[:SHAPES_SHOWN])
    shown = [b for b in present if b in kept]
    widest, tallest = max(shapes[b].width for b in shown), max(shapes[b].height for b in shown)
    total = max(len(shown) * 1.45 * widest, 11 * tallest)  # the panel's width in pixels of the shapes
    cell = min(total / len(shown), 1.9 * max(widest, tallest))
    most_frames = max(2, *(shapes[b].frames for b in shown))
    for column, b in enumerate(shown):
        shape = shapes[b]
        sheets = 1 + round(7 * (shape.frames - 1) / (most_frames - 1)) if shape.frames > 1 else 1
        x = (column + 0.5) * cell - shape.width / 2
        for sheet in reversed(range(sheets)):
            shift = 0.04 * min(widest, tallest) * sheet
            axes.add_patch(Rectangle((x + shift, shift), shape.width, shape.height, fc=colours[b], ec="white", lw=0.8))
        label = (
            f"{shape.width}×{shape.height}\n{'image' if shape.is_image else f'{shape.frames} frames'}\n"
            f"{_count(int(plan.counts[b]), 'clip')}\n{plan.tokens[b]:,} tok\n"
            f"{work[b] / plan.total_work:.1%} of work"
        )
        axes.text((column + 0.5) * cell, -0.006 * total, label, ha="center", va="top", fontsize=8.5, linespacing=1.25)
    axes.set_xlim(0, total)
    axes.set_ylim(-0.09 * total, 0.12 * total)
    axes.set_aspect("equal", anchor="W")
    axes.axis("off")
    more = f" (the {len(shown)} of {len(present)} with the most work)" if len(shown) < len(present) else ""
    axes.set_title(f"Shape buckets, to scale{more}", loc="left", fontsize=12)


def _draw_packs(
    axes: Axes, splits: list[list[MicroStepPacks]], groups: int, colours: dict[int, Any], work_unit: str, each: str
) -> None:
    """A row per group, work from left to right. A micro-step ends on all of them when its largest pack does."""
    from matplotlib.patches import Rectangle

    rows = min(groups, RANKS_SHOWN)
    scale, prefix = _prefix(max(1.0, float(sum(max(micro.sums()[1]) for steps in splits for micro in steps))))
    x = 0.0
    for index, steps in enumerate(splits):
        begin = x
        for micro in steps:
            width = max(micro.sums()[1]) / scale
            for row in range(rows):
                axes.add_patch(Rectangle((x, row - 0.4), width, 0.8, fc="#f3f3f3", ec="#a0a0a0", hatch="////", lw=0))
                ranges, colour, left = [], [], x
                for b, items in itertools.groupby(micro[row], key=lambda item: item.bucket):
                    ranges.append((left, sum(item.work for item in items) / scale))
                    colour.append(colours[b])
                    left = sum(ranges[-1])
                if ranges:
                    axes.broken_barh(ranges, (row - 0.4, 0.8), facecolors=colour, edgecolors="white", linewidths=0.25)
            x += width
            axes.axvline(x, color="black", lw=0.7, alpha=0.6)
        axes.axvline(x, color="black", lw=2.2)
        axes.text((begin + x) / 2, -0.4 - 0.05 * rows, f"step {index}", ha="center", va="center", fontsize=9)
    axes.set_xlim(0, x)
    axes.set_ylim(rows - 0.4, -0.4 - 0.1 * rows)
    axes.set_yticks(range(rows), [f"{each} {row}" for row in range(rows)])
    axes.set_xlabel(f"work, {prefix}{work_unit} forward")
    axes.spines[["top", "right"]].set_visible(False)
    some = f" (the first {rows} of {groups} {each}s)" if rows < groups else ""
    title = f"Packs{some}: thick lines end a step, thin lines a micro-step; hatched: idle"
    axes.set_title(title, loc="left", fontsize=12)


def _draw_balance(axes: Axes, measures: Measures, token_bound: int, num_steps: int) -> None:
    from matplotlib.ticker import MaxNLocator

    style: dict[str, Any] = dict(marker="o", ms=3.5) if len(measures.steps) < 60 else {}
    axes.plot(measures.steps, measures.balance, color="#1f5fa8", lw=1.4, label="balance: mean work / largest", **style)
    full = np.array(measures.fullest) / token_bound
    axes.plot(measures.steps, full, color="#c9772b", lw=1.2, label=f"fullest pack / {token_bound:,} tokens", **style)
    axes.axhline(1, color="black", lw=0.6)
    axes.set_ylim(0, 1.08)
    axes.set_xlim(-0.5, max(num_steps - 0.5, 0.5))
    axes.set_xlabel("step of the epoch")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", ncols=2, fontsize=9)
    balance = f"mean {measures.total_balance:.3f}, least {min(measures.balance):.3f}"
    micro_steps = f"micro-steps per step {np.mean(measures.micro_steps):.1f}"
    axes.set_title(f"Balance over steps: {balance}; {micro_steps}", loc="left", fontsize=12)


def _prefix(work: float) -> tuple[float, str]:
    """(divisor, SI prefix) that make a number readable."""
    for power, name in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if work >= 10**power:
            return 10.0**power, name
    return 1.0, ""


def readable_work(work: float, unit: str = "FLOP") -> str:
    """An amount of work as text, such as "12.9 PFLOP"."""
    scale, prefix = _prefix(work)
    return f"{work / scale:.3g} {prefix}{unit}"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")
