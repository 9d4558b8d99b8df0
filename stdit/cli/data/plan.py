"""`stdit data plan`: shows what training will do with a manifest."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from typer import Option

from stdit.cli.common.options import Json, Manifests, out_file, split_words
from stdit.cli.common.tables import print_table
from stdit.errors import StditError
from stdit.heartbeat import HEARTBEAT, readable_time, tracked

if TYPE_CHECKING:
    from stdit.data.config import DataConfig
    from stdit.data.manifest import Manifest
    from stdit.data.plan.buckets import Assignment
    from stdit.data.plan.picture import Measures
    from stdit.data.plan.planner import Plan

FORMAT = 1  # of the JSON
SHOWN = 40  # buckets in the table
SHAPES_NAMED = 8  # shapes without clips in the advice
GOOD = 0.95  # balance below which there is advice
TIMES = {"per step": "seconds_per_step", "per epoch": "seconds_per_epoch"}


def plan(
    manifests: Manifests,
    config: Annotated[Path, Option(help="The training's config: a file or a name.")],
    world_size: Annotated[int, Option(min=1, max=100_000, help="Ranks of the training.")] = 1,
    steps: Annotated[int, Option(min=0, help="Steps to deal and measure; 0: all.")] = 200,
    epoch: Annotated[int, Option(min=0, help="The epoch to show, if epochs differ (data.stages).")] = 0,
    rate: Annotated[
        str | None, Option(metavar="FLOPS|RUN", help="Measured FLOP/s per rank, or a run folder, to estimate times.")
    ] = None,
    picture: Annotated[Path | None, Option(metavar="PNG", parser=out_file, help="Also draw the plan.")] = None,
    as_json: Json = False,
) -> None:
    """Show what training will do with a manifest: buckets, drops, steps, packs, balance, memory. Nothing is decoded.

    Example: stdit data plan clips.parquet --config toy/dit --world-size 8 --picture plan.png
    """
    from stdit.data.manifests import named, read_manifests
    from stdit.data.plan.buckets import assign, explain_exclusions
    from stdit.data.plan.picture import draw_plan, measure_plan
    from stdit.training.config import load_config
    from stdit.training.setup.build import make_plan
    from stdit.training.setup.footprint import build_on_meta, footprint
    from stdit.training.setup.objective import LONGER, long_captions
    from stdit.training.setup.resolve import resolve

    places, overrides = split_words(manifests)
    settings = resolve(load_config(config, overrides))
    groups, each = settings.parallel.groups(world_size), settings.parallel.name_of_group
    HEARTBEAT.doing(f"reading {named(places)}")
    clips = read_manifests(places)
    assignment = assign(clips, settings.data)
    stage = assignment.stages[settings.data.stage_of(epoch)]
    console = Console(stderr=as_json)
    objective = build_on_meta(settings)
    left_out = explain_exclusions(clips, stage, settings.data, objective.tokens)
    if not as_json or not stage.counts.any():
        title = f"Left out: {sum(group.clips for group in left_out):,} of {len(clips):,} clips"
        rows = [(f"{group.clips:,}", group.text, group.details) for group in left_out]
        print_table(title, ("clips", "reason", "what they are"), rows, right=(0,), console=console)
    HEARTBEAT.doing("planning the steps")
    made = make_plan(clips, assignment, objective, settings, epoch)
    if not made.num_steps:
        raise StditError(
            f"--epoch {epoch} has no clips: with data.sources, clips come in some epochs only. Try another."
        )
    pixels = settings.objective.kind == "vae"
    work_unit = "pixel" if pixels else "FLOP"
    bound = made.token_bound()
    measures = measure_plan(made, groups, bound, steps, partial(tracked, what="dealing steps"))
    if picture is not None:
        draw_plan(made, assignment.shapes, groups, bound, picture, measures, work_unit, each)
    largest = assignment.shapes[max(range(len(made.tokens)), key=lambda b: (made.counts[b] > 0, made.tokens[b]))]
    HEARTBEAT.doing("computing the memory")
    needed = footprint(settings, objective, largest, max(measures.fullest), world_size)
    long = None
    with suppress(StditError):  # the tokenizer is not available
        long = long_captions(settings, clips, assignment)
    summary: dict[str, Any] = {
        **summarise(made, stage, measures, groups, bound),
        "memory_per_rank": {**asdict(needed), "total": needed.total},
        "hash": made.hash,
        "left_out": [asdict(one) for one in left_out],
        "world_size": world_size,
        "work_unit": work_unit,
        "epoch": epoch,
        "empty": [str(shape) for b, shape in enumerate(assignment.shapes) if not len(assignment.rows(b))],
        "stages": _stages(settings.data, assignment, partial(make_plan, clips, assignment, objective, settings)),
        "sources": _sources(clips, settings.data.sources, made),
        "long_captions": asdict(long) if long else None,
    }
    if rate is not None:
        found = measured_rate(rate, pixels)
        seconds = summary["work_per_step"] * (1 if pixels else 3) / (world_size * found * summary["balance"])
        summary |= {"rate": found, "seconds_per_step": seconds, "seconds_per_epoch": seconds * made.num_steps}
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
        return
    _print_records("Stages", summary["stages"])
    _print_records("Sources", summary["sources"])
    _print_plan(summary)
    if long is not None and long.count:
        console.print(f"{long}{LONGER}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    for line in advice(summary, each):
        console.print(line, style="yellow", highlight=False, soft_wrap=True)
    if picture is not None:
        print(f"picture: {picture}")


def measured_rate(given: str, pixels: bool) -> float:
    """Work per second and rank, forward and backward, from a number or from a run folder's metrics.jsonl."""
    from stdit.evaluation.report import read_metrics

    try:
        rate = float(given)
    except ValueError:
        rates: list[float] = []
        start: dict[str, Any] = {}
        for line in read_metrics(given):
            if line["kind"] == "start":  # a run may resume with another number of ranks
                start = line
            elif line["kind"] == "train" and pixels:
                rates.append(line["tokens_per_second"] / start["ranks"])
            elif line["kind"] == "train" and line["mfu"]:
                rates.append(line["mfu"] * start["peak_flops"])
        if not rates:
            raise StditError(
                f"--rate {given} is neither a number of FLOP/s per rank, such as 2e14, nor a run folder whose "
                f"metrics.jsonl has training steps."
            ) from None
        rate = statistics.median(rates)
    if not 0 < rate < math.inf:
        raise StditError(f"--rate {given}: it must be positive.")
    return rate


def summarise(plan: Plan, assignment: Assignment, measures: Measures, groups: int, bound: int) -> dict[str, Any]:
    """The plan's numbers, as `--json` prints them. Work is in forward FLOPs, or in pixels when training a VAE."""
    count = len(measures.steps)
    return {
        "format": FORMAT,
        "clips": len(assignment.bucket),
        "planned": plan.num_items,
        "dropped": assignment.reasons,
        "crop_loss": float(assignment.lost[assignment.bucket >= 0].mean()),
        "buckets": [
            {
                "shape": str(shape),
                "clips": int(plan.counts[b]),
                "tokens": plan.tokens[b],
                "work": plan.work[b],
                "share_of_work": int(plan.counts[b]) * plan.work[b] / plan.total_work,
                "crop_loss": float(assignment.crop_losses[b]),
            }
            for b, shape in enumerate(assignment.shapes)
        ],
        "steps_per_epoch": plan.num_steps,
        "work_per_step_wanted": plan.work_per_step,
        "largest_clip_work": max(work for work, clips in zip(plan.work, plan.counts) if clips),
        "groups": groups,
        "tokens_per_pack": bound,
        "measured_steps": count,
        "clips_per_step": sum(measures.clips) / count,
        "tokens_per_step": sum(measures.tokens) / count,
        "work_per_step": sum(measures.work) / count,
        "micro_steps_per_step": sum(measures.micro_steps) / count,
        "fullest_pack": max(measures.fullest),
        "balance": measures.total_balance,
        "balance_least": min(measures.balance),
        "balance_best": measures.best_balance,
        "steps_with_a_clip_over_a_share": measures.indivisible,
    }


def advice(summary: dict[str, Any], each: str = "rank") -> list[str]:
    """Suggests how to improve the plan, if it is not good. each: "group" if ranks share packs."""
    lines, empty = [], summary["empty"]
    if empty:
        more = f" and {len(empty) - SHAPES_NAMED} more" if len(empty) > SHAPES_NAMED else ""
        lines.append(
            f"no clip goes to {', '.join(empty[:SHAPES_NAMED])}{more}, in any epoch: remove shapes you do not need "
            "from data.shapes (or data.rule, data.stages), or add clips that fit."
        )
    if over := summary["steps_with_a_clip_over_a_share"]:
        lines.append(
            f"{over} of {summary['measured_steps']} steps have a clip with more work than a {each}'s share of the "
            f"step: the best possible balance is {summary['balance_best']:.3f}."
        )
    if summary["balance"] >= GOOD or summary["groups"] == 1:
        return lines
    share = summary["work_per_step"] / summary["groups"] / summary["largest_clip_work"]
    in_epoch = share * summary["steps_per_epoch"]
    if in_epoch < 1:
        most = max(1, int(in_epoch * summary["groups"]))
        lines.append(
            f"a whole epoch has, per {each}, the work of {in_epoch:.2g} of the largest clip, which cannot be divided: "
            f"at most {most} {each}{'s have' if most > 1 else ' has'} enough to do. Use fewer ranks, or add clips."
        )
    elif share < 1:
        lines.append(
            f"a step has, per {each}, the work of {share:.2g} of the largest clip, which cannot be divided: raise "
            f"plan.largest_clips_per_step to {summary['groups']} or more, or let more ranks share a transformer's "
            f"clips (parallel.sequence_parallel)."
        )
    else:
        lines.append(
            "larger steps (plan.largest_clips_per_step), larger packs (plan.tokens_per_pack), or more images and short "
            "clips to fill gaps would improve the balance."
        )
    return lines


def _stages(data: DataConfig, assignment: Assignment, plan_of: Callable[[int], Plan]) -> list[dict[str, Any]]:
    """The stages of a curriculum."""
    found, first = [], 0
    for stage, assigned in zip(data.stages, assignment.stages):
        made = plan_of(first)
        found.append({
            "epoch": first, "epochs": stage.epochs, "area": stage.area, "frames": stage.frames,
            "clips": made.num_items, "steps_per_epoch": made.num_steps, "dropped": assigned.reasons,
        })  # fmt: skip
        first += stage.epochs or 0
    return found


def _sources(clips: Manifest, sources: dict[str, float], plan: Plan) -> list[dict[str, Any]]:
    from stdit.data.plan.filters import source_of

    if not sources:
        return []
    source, found = source_of(clips, list(sources)), []
    for number, pattern, weight in zip([*range(len(sources)), -1], [*sources, "others"], [*sources.values(), 1.0]):
        mine = source == number
        found.append({
            "source": pattern, "weight": weight, "clips": int((mine & (plan.bucket >= 0)).sum()),
            "clips_in_epoch": int(mine[plan.rows].sum()),
        })  # fmt: skip
    return found


def _print_records(title: str, rows: list[dict[str, Any]]) -> None:
    values = [["" if value in (None, {}) else str(value) for value in row.values()] for row in rows]
    print_table(title, [name.replace("_", " ") for name in next(iter(rows), ())], values)


def _print_plan(s: dict[str, Any]) -> None:
    """Prints a summary's buckets, those with the most work first, and its steps."""
    from stdit.data.plan.picture import readable_work

    buckets = sorted(s["buckets"], key=lambda bucket: (-bucket["share_of_work"], bucket["tokens"]))
    rows = [
        (
            bucket["shape"],
            f"{bucket['clips']:,}",
            f"{bucket['tokens']:,}",
            readable_work(bucket["work"], s["work_unit"]),
            f"{bucket['share_of_work']:.1%}",
            f"{bucket['crop_loss']:.1%}",
        )
        for bucket in buckets[:SHOWN]
    ]
    if rest := buckets[SHOWN:]:
        clips, share = (sum(bucket[name] for bucket in rest) for name in ("clips", "share_of_work"))
        rows.append((f"and {len(rest)} more", f"{clips:,}", "", "", f"{share:.1%}", ""))
    header = ("shape", "clips", "tokens", "forward", "share of work", "cut off")
    print_table(f"Shape buckets: {s['planned']:,} clips", header, rows, right=range(1, 6))

    work = readable_work(s["work_per_step"], s["work_unit"])
    measured = "all" if s["measured_steps"] == s["steps_per_epoch"] else f"{s['measured_steps']:,}"
    ranks = f"{s['world_size']} rank{'s' * (s['world_size'] > 1)}"
    if (shared := s["world_size"] // s["groups"]) > 1:
        ranks += f", {shared} to a pack"
    times = {per: s[key] for per, key in TIMES.items() if key in s}
    parts = {name: size for name, size in s["memory_per_rank"].items() if name != "total"}
    steps = [
        ("steps per epoch", f"{s['steps_per_epoch']:,}"),
        ("clips per step", f"{s['clips_per_step']:,.1f}"),
        ("tokens per step", f"{s['tokens_per_step']:,.0f}"),
        ("work per step, forward", f"{work} ({s['work_per_step'] / s['largest_clip_work']:.2f} × the largest clip)"),
        ("micro-steps per step", f"{s['micro_steps_per_step']:.1f}"),
        ("tokens of the fullest pack", f"{s['fullest_pack']:,} of {s['tokens_per_pack']:,}"),
        ("balance (mean work / largest)", f"{s['balance']:.4f} (least {s['balance_least']:.4f})"),
        ("area lost to cropping", f"{s['crop_loss']:.1%}"),
        ("memory per rank", f"{s['memory_per_rank']['total'] / 2**30:.2f} GiB"),
        *((f"  {name.replace('_', ' ')}", f"{size / 2**30:.2f} GiB") for name, size in parts.items() if size),
        *((f"time {per}", f"{t:.3g} s" if t < 100 else readable_time(t)) for per, t in times.items()),
        ("plan", s["hash"][:16]),
    ]
    print_table(f"Plan on {ranks} ({measured} steps measured)", ("", ""), steps, right=(1,))
