"""`stdit data plan`: the dry run of a training's data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from stdit.data.buckets import Assignment
    from stdit.data.plan_picture import Measures
    from stdit.data.planner import Plan
    from stdit.training.objective import Objective
    from stdit.training.settings import RunConfig

FORMAT = 1  # of the JSON
SHOWN = 40  # buckets in the table
GOOD = 0.95  # a balance below this comes with advice


def plan(
    manifest: Annotated[Path, typer.Argument(help="What `stdit data scan` wrote.")],
    config: Annotated[Path, typer.Option(help="The training's config.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Set on top of it.")] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks of the training.")] = 1,
    steps: Annotated[int, typer.Option(min=0, help="How many steps to deal and measure; 0: all.")] = 200,
    picture: Annotated[Path | None, typer.Option(metavar="PNG", help="Also draw the plan.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """What training will do with a manifest: buckets, drops, steps, packs and their balance. Nothing is decoded.

    Example: stdit data plan clips.parquet --config configs/toy/dit.yaml --world-size 8 --picture plan.png
    """
    from rich.console import Console

    from stdit.config import load_config
    from stdit.data.buckets import assign
    from stdit.data.manifest import read_manifest
    from stdit.data.plan_picture import draw_plan, measure_plan
    from stdit.errors import StditError
    from stdit.training.build import make_plan

    settings = load_config(config, overrides or [])
    group_size = settings.parallel.sequence_parallel
    if world_size % group_size:
        raise StditError(f"--world-size {world_size} is not a multiple of parallel.sequence_parallel {group_size}.")
    groups = world_size // group_size
    clips = read_manifest(manifest)
    assignment = assign(clips, settings.data)
    console = Console(stderr=as_json)
    if not as_json or not len(assignment.counts) or not assignment.counts.sum():
        _print_drops(console, assignment, len(clips))
    made = make_plan(clips, assignment, costs(settings), settings, 0)
    work_unit = "pixel" if settings.objective.kind == "vae" else "FLOP"
    bound = made.token_bound(group_size)
    measures = measure_plan(made, groups, bound, steps, _progress)
    if picture is not None:
        draw_plan(made, assignment.shapes, groups, bound, picture, measures, work_unit)
    summary = summarise(made, assignment, measures, groups, bound)
    summary |= {"world_size": world_size, "work_unit": work_unit}
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
        return
    _print_buckets(console, summary)
    _print_steps(console, summary)
    for line in advice(summary):
        console.print(line, style="yellow", highlight=False, soft_wrap=True)
    if picture is not None:
        console.print(f"picture: {picture}", highlight=False, soft_wrap=True)


def costs(config: RunConfig) -> Objective:
    """The training's own objective, which says what clips cost, over models of the run's sizes without any weights."""
    import torch

    from stdit.models.transformer import STDiT, TransformerConfig
    from stdit.training.objective import FlowObjective
    from stdit.training.start import follow_init, transformer_path
    from stdit.training.vae_objective import VaeObjective
    from stdit.vae.autoencoder import CausalVAE, VaeConfig, preset
    from stdit.weights.io import find, vae_config

    config = follow_init(config)
    if config.vae.path:
        vae = vae_config(config.vae.path)
    else:
        vae = VaeConfig(**(vars(preset(config.vae.preset or "toy")) | config.vae.overrides))
    nowhere = torch.device("meta")
    with nowhere:
        if config.objective.kind == "vae":
            return VaeObjective(config.objective, lambda: CausalVAE(vae), device=nowhere, dtype=torch.float32)
        if config.model.init:
            model = find("transformer", transformer_path(config.model)).config
            model = model.inflated() if config.model.inflate else model
        else:
            channels = {"in_channels": vae.z_dim, "out_channels": vae.z_dim}
            model = TransformerConfig.preset(config.model.preset or "toy", **(config.model.overrides | channels))
        return FlowObjective(
            config.objective,
            STDiT(model),
            CausalVAE(vae),
            None,  # type: ignore[arg-type]  # captions cost nothing in a plan
            train_text=False,
            text_padding=0,
            conditions=None,  # type: ignore[arg-type]  # nor do these
            device=nowhere,
        )


def summarise(plan: Plan, assignment: Assignment, measures: Measures, groups: int, bound: int) -> dict[str, Any]:
    """What `--json` prints. Work is in forward FLOPs; of a VAE's training, in pixels (`work_unit`)."""
    count = len(measures.steps)
    kept = assignment.bucket >= 0
    return {
        "format": FORMAT,
        "clips": len(assignment.bucket),
        "planned": plan.num_items,
        "dropped": assignment.reasons,
        "crop_loss": float(assignment.lost[kept].mean()),
        "buckets": [
            {
                "shape": str(shape),
                "clips": int(plan.counts[b]),
                "tokens": plan.tokens[b],
                "work": plan.work[b],
                "share_of_work": int(plan.counts[b]) * plan.work[b] / plan.total_work,
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
        "hash": plan.hash,
    }


def advice(summary: dict[str, Any]) -> list[str]:
    """What would make the plan better, if it is not good."""
    lines = [
        f"no clip reaches {bucket['shape']}: the bucket is empty; take it out of data.shapes or add such clips."
        for bucket in summary["buckets"]
        if not bucket["clips"]
    ]
    if summary["balance"] >= GOOD or summary["groups"] == 1:
        return lines
    share = summary["work_per_step"] / summary["groups"] / summary["largest_clip_work"]
    if share < 1:
        lines.append(
            f"a step is the work of {share:.2g} of the largest clip a group, and a clip cannot be divided: the balance "
            f"cannot exceed {summary['balance_best']:.3f}. Raise plan.largest_clips_per_step to {summary['groups']} or "
            f"more, or parallel.sequence_parallel."
        )
    else:
        lines.append(
            "larger steps (plan.largest_clips_per_step), more memory (plan.tokens_per_pack) or more images and short "
            "clips, which fill gaps, raise the balance."
        )
    return lines


def _progress(steps: Sequence[int]) -> Iterable[int]:
    from rich.console import Console
    from rich.progress import track

    return track(steps, "dealing steps", console=Console(stderr=True), transient=True)


def _print_drops(console: Any, assignment: Assignment, clips: int) -> None:
    from rich.table import Table

    from stdit.data.buckets import REASONS

    if not assignment.reasons:
        return
    dropped = sum(assignment.reasons.values())
    table = Table("clips", "reason", title=f"Left out: {dropped:,} of {clips:,} clips", title_justify="left")
    table.columns[0].justify = "right"
    for name, count in assignment.reasons.items():
        table.add_row(f"{count:,}", REASONS[name])
    console.print(table)


def _print_buckets(console: Any, summary: dict[str, Any]) -> None:
    from rich.table import Table

    from stdit.data.plan_picture import readable_work

    rows = sorted(summary["buckets"], key=lambda bucket: (-bucket["share_of_work"], bucket["tokens"]))
    table = Table("shape", title=f"Shape buckets: {summary['planned']:,} clips", title_justify="left")
    for name in ("clips", "tokens", "forward", "share of work"):
        table.add_column(name, justify="right")
    for row in rows[:SHOWN]:
        table.add_row(
            row["shape"],
            f"{row['clips']:,}",
            f"{row['tokens']:,}",
            readable_work(row["work"], summary["work_unit"]),
            f"{row['share_of_work']:.1%}",
        )
    if len(rows) > SHOWN:
        rest = rows[SHOWN:]
        share = sum(row["share_of_work"] for row in rest)
        table.add_row(f"and {len(rest)} more", f"{sum(row['clips'] for row in rest):,}", "", "", f"{share:.1%}")
    console.print(table)


def _print_steps(console: Any, summary: dict[str, Any]) -> None:
    from rich.table import Table

    from stdit.data.plan_picture import readable_work

    s = summary
    work = readable_work(s["work_per_step"], s["work_unit"])
    work += f" ({s['work_per_step'] / s['largest_clip_work']:.2f} × the largest clip)"
    measured = "all" if s["measured_steps"] == s["steps_per_epoch"] else f"{s['measured_steps']:,}"
    groups = f"{s['groups']} groups" if s["groups"] != s["world_size"] else f"{s['groups']} ranks"
    table = Table(title=f"Plan on {groups} ({measured} steps measured)", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("steps an epoch", f"{s['steps_per_epoch']:,}"),
        ("clips a step", f"{s['clips_per_step']:,.1f}"),
        ("tokens a step", f"{s['tokens_per_step']:,.0f}"),
        ("work a step, forward", work),
        ("micro-steps a step", f"{s['micro_steps_per_step']:.1f}"),
        ("tokens of the fullest pack", f"{s['fullest_pack']:,} of {s['tokens_per_pack']:,}"),
        ("balance (mean work / largest)", f"{s['balance']:.4f} (least {s['balance_least']:.4f})"),
        ("area lost to cropping", f"{s['crop_loss']:.1%}"),
        ("plan", s["hash"][:16]),
    ):
        table.add_row(name, value)
    console.print(table)
